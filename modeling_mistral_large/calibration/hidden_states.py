"""Hidden states of all sequences between two decoder layers, in a file that a later run can go on with."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mistral_large_conversion.checkpoint.atomic_write import PARTIAL_SUFFIX, sync_folder
from mistral_large_conversion.destination import Journal
from mistral_large_conversion.manifest import new_checksum
from mistral_large_conversion.stream import file_checksum
from modeling_mistral_large.streamed.tensors import bytes_of, fill

# What the model computes in on GPUs, and half the bytes of fp32.
DTYPE = torch.bfloat16


def file_name(layer: int) -> str:
    """Name the file of the states that enter a layer, without its suffix."""
    return f"calibration-{layer:05}"


class HiddenStates:
    """The states [1, tokens, width] of each sequence that enter a decoder layer, in BF16.

    They are written in order, once, and take their name when they are whole. With its suffix `.partial`, a conversion
    removes the file where it is of no use.
    """

    def __init__(self, folder: Path, layer: int, lengths: Sequence[int], width: int) -> None:
        self.layer, self.lengths, self.width = layer, lengths, width
        self.path = folder / (file_name(layer) + PARTIAL_SUFFIX)
        self._row_bytes = width * DTYPE.itemsize
        self.size = sum(lengths) * self._row_bytes

    def is_left_by(self, journal: Journal) -> bool:
        """Whether an earlier run has left them whole, as its journal says."""
        wanted = journal.checksums.get(file_name(self.layer))
        return wanted is not None and self.path.exists() and file_checksum(self.path, 0, self.size) == wanted

    def write(self, states: Iterable[Tensor], journal: Journal) -> None:
        """Write the states of all sequences in their order, and note in the journal that they are there."""
        checksum = new_checksum()
        unnamed = self.path.with_name(f"{file_name(self.layer)}.new{PARTIAL_SUFFIX}")
        with unnamed.open("wb") as stream:
            for hidden in states:
                data = bytes_of(hidden.detach().to("cpu", DTYPE).contiguous())
                checksum.update(data)
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        unnamed.replace(self.path)
        sync_folder(self.path.parent)
        journal.record(file_name(self.layer), checksum.hexdigest())

    def __iter__(self) -> Iterator[Tensor]:
        with self.path.open("rb", buffering=0) as stream:
            for length in self.lengths:
                hidden = torch.empty(1, length, self.width, dtype=DTYPE)
                if not fill(stream, hidden):
                    raise OSError(f"{self.path} ends early")
                yield hidden

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

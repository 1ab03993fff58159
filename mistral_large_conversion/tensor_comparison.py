"""Tensors of a folder compared with what its source gives, or with its manifest."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy

from mistral_large_conversion.checkpoint.safetensors_header import BYTES_OF, FileTensor
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.manifest import Manifest, ManifestTensor
from mistral_large_conversion.planned_tensor import PlannedTensor, transformed
from mistral_large_conversion.stream import file_checksum
from mistral_large_conversion.transforms import numbers_of

# Calibrated int4 weights are 10 to 20 % from the source's; those of another layer or model are 140 %.
MOST_ERROR = 0.5


def unchanged_tensor(source: FileTensor, own: FileTensor) -> PlannedTensor:
    """The way of a tensor that is the same in both files."""
    return PlannedTensor(source, (), (own,))


def manifest_difference(tensor: PlannedTensor, *, manifest: Manifest) -> str | None:
    """What the manifest says otherwise of a tensor, or None."""
    own = tensor.source
    assert isinstance(own, FileTensor)
    entry = manifest.tensors.get(own.name)
    is_known = entry is None or entry.checksum is not None
    checksum = (file_checksum(own.path, own.offset, own.size) or "") if is_known else None
    found = ManifestTensor(own.path.name, own.dtype, own.shape, checksum)
    return None if found == entry else f"{own.name}: {found}, the manifest has {entry}"


def source_difference(
    tensor: PlannedTensor, *, stored: Mapping[str, FileTensor], calibrated: Manifest | None = None
) -> str | None:
    """Where what is stored first differs from what the source gives, or None.

    calibrated: the manifest of a folder whose quantized weights are, see `_calibrated_difference`.
    """
    if calibrated is not None and tensor.quantize is not None:
        return _calibrated_difference(tensor, stored=stored, manifest=calibrated)
    own = [stored[output.name] for output in tensor.outputs]
    start = 0
    with ExitStack() as stack:
        streams = [stack.enter_context(part.open()) for part in own]
        for blocks in transformed(tensor):
            for part, stream, wanted in zip(own, streams, blocks, strict=True):
                found = numpy.frombuffer(stream.read(wanted.nbytes), numpy.uint8)
                if found.size != wanted.size:
                    raise CheckpointError(f"tensor {part.name!r} ends early: its file has changed since it was checked")
                found = found.reshape(wanted.shape)
                if not numpy.array_equal(found, wanted):
                    row, byte = numpy.argwhere(found != wanted)[0].tolist()
                    column = byte // BYTES_OF[part.dtype]
                    place = [start + row, column][: len(part.shape)]
                    values = (numbers_of(rows[row].copy(), part.dtype)[column].item() for rows in (found, wanted))
                    return "{} at {}: {!r}, the source has {!r}".format(part.name, place, *values)
            start += len(blocks[0])
    return None


def _calibrated_difference(
    tensor: PlannedTensor, *, stored: Mapping[str, FileTensor], manifest: Manifest
) -> str | None:
    """What the manifest says otherwise of a calibrated weight, or how far it is from the source's, or None.

    The source alone does not give its codes: they are compared with the manifest, and their values with the source's.
    """
    own = [stored[output.name] for output in tensor.outputs]
    for part in own:
        if difference := manifest_difference(unchanged_tensor(part, part), manifest=manifest):
            return difference
    error = _relative_error(tensor, own)
    if error <= MOST_ERROR:
        return None
    values = f"{own[0].name}: its values differ by {error:.0%} from the source's"
    return f"{values}, those of a calibrated weight by less than {MOST_ERROR:.0%}"


def _relative_error(tensor: PlannedTensor, own: Sequence[FileTensor]) -> float:
    """The norm of the difference of an int4 weight from the source's, as a share of the source's."""
    import torch

    assert tensor.quantize is not None
    difference, norm = 0.0, 0.0
    with ExitStack() as stack:
        streams = [stack.enter_context(part.open()) for part in own]
        for (rows,) in transformed(replace(tensor, quantize=None)):
            source = numbers_of(rows, tensor.quantize.dtype).double()
            packed, scales = (
                torch.frombuffer(bytearray(stream.read(len(rows) * part.size // part.shape[0])), dtype=torch.uint8)
                for stream, part in zip(streams, own, strict=True)
            )
            codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(len(rows), -1, tensor.quantize.group_size)
            wide = scales.view(torch.bfloat16).view(len(rows), -1, 1).double()
            values = ((codes.double() - 8) * wide).view(source.shape)
            difference += (values - source).square().sum().item()
            norm += source.square().sum().item()
    return (difference / norm) ** 0.5 if norm else difference

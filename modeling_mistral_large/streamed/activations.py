"""Hidden states of many sequences between two layers, in memory or, where they are large, in a temporary file."""

import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mistral_large_conversion.errors import DestinationError
from modeling_mistral_large.streamed.tensors import bytes_of, fill

# More than this goes to disk.
BYTES_IN_MEMORY = 2**29


class Activations:
    """Hidden states [1, tokens, width] by sequence, on the CPU; each is written as a whole before it is read.

    Close it, or use it as a context, to have the temporary file removed.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        *,
        folder: Path | str | None = None,
    ) -> None:
        """Make room for sequences of `lengths` tokens; more than `BYTES_IN_MEMORY` of all together go to disk.

        folder: where the temporary file is; without it, where Python keeps them (`TMPDIR`).
        """
        self.dtype, self.width, self.lengths = dtype, width, tuple(lengths)
        self.folder = folder or tempfile.gettempdir()
        row_bytes = width * dtype.itemsize
        self.total_bytes = sum(self.lengths) * row_bytes
        self._starts = [sum(self.lengths[:index]) * row_bytes for index in range(len(self.lengths))]
        self._tensors: list[Tensor | None] = [None] * len(self.lengths)
        self._file = None
        if self.total_bytes > BYTES_IN_MEMORY:
            # Closed by `close`.
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        if self._file is None:
            found = self._tensors[index]
            assert found is not None, "read before it was written"
            return found
        found = torch.empty(1, self.lengths[index], self.width, dtype=self.dtype)
        self._file.seek(self._starts[index])
        is_whole = fill(self._file, found)
        assert is_whole, "read before it was written"
        return found

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        assert hidden.shape == (1, self.lengths[index], self.width)
        hidden = hidden.detach().to("cpu", self.dtype).contiguous()
        if self._file is None:
            self._tensors[index] = hidden
            return
        self._file.seek(self._starts[index])
        left = bytes_of(hidden)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DestinationError(
                f"{self.folder}: no room for {self.total_bytes / 1e9:.1f} GB of activations "
                f"({error.strerror}); they go to a temporary file where they are large; set TMPDIR to a larger disk, "
                "or take fewer or shorter samples"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._tensors = []

    def __enter__(self) -> "Activations":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

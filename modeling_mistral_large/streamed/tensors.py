"""Tensors of a checkpoint's files, read a few rows at a time into the dtype and on the device where they are used."""

from typing import Any, BinaryIO

import torch
from torch import Tensor

from mistral_large_conversion.checkpoint.rope import split_rope_pairs
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES, FileTensor
from mistral_large_conversion.errors import CheckpointError

# Bytes of the file that are read at once where they are converted.
BYTES_AT_ONCE = 2**25


def stored_dtype(tensor: FileTensor) -> torch.dtype:
    """Return the dtype of a tensor in its file."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    return dtype


def read_rows(
    tensor: FileTensor,
    rows: range,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    head_dim: int | None = None,
) -> Tensor:
    """Return consecutive rows of a tensor [rows, ...].

    head_dim: of query and key weights in the consolidated layout, whose rows are brought into the HF order; `rows` are
        those of whole heads.

    Raises:
        CheckpointError: the file is shorter than it was.
    """
    stored, row_bytes = stored_dtype(tensor), tensor.size // tensor.shape[0]
    found = torch.empty((len(rows), *tensor.shape[1:]), dtype=dtype, device=device)
    is_unchanged = stored == dtype and found.device.type == "cpu" and head_dim is None
    step = len(rows) if is_unchanged else max(1, BYTES_AT_ONCE // row_bytes)
    if head_dim is not None:
        step = -(-step // head_dim) * head_dim
    with tensor.open() as stream:
        stream.seek(tensor.offset + rows.start * row_bytes)
        for start in range(0, len(rows), step):
            target = found[start : start + step]
            part = target if is_unchanged else torch.empty(target.shape, dtype=stored)
            _fill(stream, part, tensor)
            if head_dim is not None:
                part = split_rope_pairs(part, head_dim=head_dim)
            if part is not target:
                target.copy_(part)
    return found


def gather_rows(tensor: FileTensor, ids: Tensor, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return the rows of a tensor [rows, columns] that `ids` of any shape name: [..., columns].

    Each is read once, and no others are.

    Raises:
        CheckpointError: the file is shorter than it was.
    """
    wanted, places = torch.unique(ids.cpu(), return_inverse=True)
    found = torch.empty((len(wanted), *tensor.shape[1:]), dtype=stored_dtype(tensor))
    row_bytes = tensor.size // tensor.shape[0]
    with tensor.open() as stream:
        for row, index in zip(found, wanted.tolist(), strict=True):
            stream.seek(tensor.offset + index * row_bytes)
            _fill(stream, row, tensor)
    return found.to(device, dtype)[places.to(device)]


def _fill(stream: BinaryIO, target: Tensor, tensor: FileTensor) -> None:
    """Read the next bytes of a tensor's file, or raise a CheckpointError where there are fewer."""
    if not fill(stream, target):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name!r} ends before its last byte: the file has changed since it was opened; "
            "a checkpoint stays as it is while it is read; run it again"
        )


def fill(stream: Any, target: Tensor) -> bool:
    """Read the next bytes of a stream into a contiguous tensor on the CPU, and return whether there were so many."""
    left = bytes_of(target)
    while left:
        # A read of more than 2 GB comes back in parts.
        count = stream.readinto(left)
        if not count:
            return False
        left = left[count:]
    return True


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, to be read or written."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")

"""Moving of the weights: one buffer's worth of one tensor in memory at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from modeling_mistral_large.conversion.destination import json_bytes, whole_file
from modeling_mistral_large.conversion.plan import ConversionPlan, PlannedTensor
from modeling_mistral_large.conversion.rope import join_rope_pairs, split_rope_pairs
from modeling_mistral_large.errors import CheckpointError

# Writes of several megabytes at once are slow at times, 300 instead of 2,500 MB/s on ext4; smaller ones never are.
BUFFER_BYTES = 2**20

Progress = Callable[[int], None]
Rows = numpy.ndarray[Any, numpy.dtype[numpy.uint8]]

REGROUP = {"hf": split_rope_pairs, "consolidated": join_rope_pairs}


def write_weights(plan: ConversionPlan, destination: Path, progress: Progress | None = None) -> None:
    """Write the files of a plan, and last the index; `progress` is told the bytes of tensors as they are written."""
    regroup = partial(REGROUP[plan.to], head_dim=plan.config.head_dim)
    for file in plan.files:
        with whole_file(destination / file.name) as out:
            out.write(file.header)
            for tensor in file.tensors:
                _copy_tensor(tensor, out, regroup, plan.config.head_dim, progress)
    if plan.index is not None:
        with whole_file(destination / plan.index_name) as out:
            out.write(json_bytes(plan.index))


def _copy_tensor(
    tensor: PlannedTensor, out: BinaryIO, regroup: Callable[[Rows], Rows], head_dim: int, progress: Progress | None
) -> None:
    step = BUFFER_BYTES
    row_bytes = tensor.source.size // tensor.source.shape[0]
    if tensor.has_rope_pairs:
        # Whole heads, at least one.
        head_bytes = head_dim * row_bytes
        step = max(1, BUFFER_BYTES // head_bytes) * head_bytes
    buffer = bytearray(min(step, tensor.source.size))
    with tensor.source.open() as stream:
        for start in range(0, tensor.source.size, step):
            chunk = memoryview(buffer)[: tensor.source.size - start]
            _read_exactly(stream, chunk, tensor.source.name)
            if tensor.has_rope_pairs:
                rows: Rows = numpy.frombuffer(chunk, numpy.uint8).reshape(-1, row_bytes)
                chunk = regroup(rows).data.cast("B")
            for piece in range(0, len(chunk), BUFFER_BYTES):
                out.write(chunk[piece : piece + BUFFER_BYTES])
            if progress is not None:
                progress(len(chunk))


def _read_exactly(stream: BinaryIO, chunk: memoryview, name: str) -> None:
    filled = 0
    while filled < len(chunk):
        count = stream.readinto(chunk[filled:])  # type: ignore[attr-defined]  # every stream of ours is raw or BytesIO
        if not count:
            raise CheckpointError(f"tensor {name!r} ends early: its file has changed since it was checked; run again")
        filled += count

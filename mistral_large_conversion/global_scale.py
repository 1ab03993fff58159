"""The global scale of nvfp4: one for all weights of a layer that engines fuse, found by reading them ahead."""

from dataclasses import dataclass, replace
from io import BytesIO
from threading import Lock
from typing import BinaryIO

from mistral_large_conversion.checkpoint.safetensors_header import TensorEntry
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.planned_tensor import PlannedTensor, transformed
from mistral_large_conversion.quantize import MadeTensor, global_scale_bytes, largest_magnitude


class FusedWeights:
    """The weights of one fused layer, each read once for the global scale of all, block by block."""

    def __init__(self) -> None:
        self._tensors: list[PlannedTensor] = []
        self._content: bytes | None = None
        self._lock = Lock()

    def add(self, tensor: PlannedTensor, entry: TensorEntry) -> "GlobalScale":
        """Take a weight in, and return its tensor of the global scale; to be read when all weights are in."""
        self._tensors.append(replace(tensor, quantize=None))
        return GlobalScale(entry.name, entry.dtype, entry.shape, entry.size, self)

    def content(self) -> bytes:
        """The global scale; threads that need it at once wait for the one that reads."""
        with self._lock:
            if self._content is None:
                self._content = global_scale_bytes(max(map(_largest, self._tensors)))
            return self._content


@dataclass(frozen=True)
class GlobalScale(MadeTensor):
    """The tensor `weight_global_scale` of a weight."""

    weights: FusedWeights

    def open(self) -> BinaryIO:
        return BytesIO(self.weights.content())


def _largest(tensor: PlannedTensor) -> float:
    largest = 0.0
    for (rows,) in transformed(tensor):
        try:
            largest = max(largest, largest_magnitude(rows, tensor.source.dtype))
        except ValueError as error:
            raise CheckpointError(f"tensor {tensor.source.name!r} {error}") from error
    return largest

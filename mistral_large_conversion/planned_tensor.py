"""One tensor on its way into a file of weights, a block of rows in memory at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy

from mistral_large_conversion.checkpoint.safetensors_header import StoredTensor, TensorEntry, read_exactly
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.merge import MergeLora
from mistral_large_conversion.quantize import Quantize
from mistral_large_conversion.transforms import Rows, Step

# A block is read, transformed, summed up and written while it is in the processor's cache.
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor on its way: its rows go through the steps, a few at a time, and become those of the outputs.

    quantize: makes the rows of several outputs of what comes out of the steps.
    """

    source: StoredTensor
    steps: tuple[Step, ...]
    outputs: tuple[TensorEntry, ...]
    quantize: Quantize | None = None

    @property
    def rows_at_once(self) -> int:
        """The number of rows of which the steps take multiples."""
        return math.lcm(*(step.rows_at_once for step in self.steps))

    @property
    def size(self) -> int:
        """Bytes to be written."""
        return sum(output.size for output in self.outputs)

    def begin(self) -> "PlannedTensor":
        """The same for one run through all rows, from the first on; what its steps need is read."""
        steps = tuple(step.begin() if isinstance(step, MergeLora) else step for step in self.steps)
        return replace(self, steps=steps, quantize=None if self.quantize is None else self.quantize.begin())

    def transform(self, rows: Rows) -> tuple[Rows, ...]:
        """The rows of each output that come of these rows of the source."""
        for step in self.steps:
            rows = step(rows)
        return (rows,) if self.quantize is None else self.quantize(rows)


def transformed(tensor: PlannedTensor) -> Iterator[tuple[Rows, ...]]:
    """The rows of the outputs of a tensor, block by block; they are valid until the next block is asked for."""
    tensor = tensor.begin()
    source = tensor.source
    row_bytes = source.size // source.shape[0]
    unit_bytes = tensor.rows_at_once * row_bytes
    step = max(1, BLOCK_BYTES // unit_bytes) * unit_bytes
    buffer = bytearray(min(step, source.size))
    with source.open() as stream:
        for start in range(0, source.size, step):
            chunk = memoryview(buffer)[: source.size - start]
            read_exactly(stream, chunk, source)
            rows: Rows = numpy.frombuffer(chunk, numpy.uint8).reshape(-1, row_bytes)
            try:
                yield tensor.transform(rows)
            except ValueError as error:
                raise CheckpointError(f"tensor {source.name!r} {error}") from error

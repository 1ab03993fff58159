"""What becomes of the rows of a tensor on its way into another file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy

from mistral_large_conversion.checkpoint.rope import join_rope_pairs, split_rope_pairs
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES

if TYPE_CHECKING:
    import torch

# [rows, bytes of a row]
Rows = numpy.ndarray[Any, numpy.dtype[numpy.uint8]]

REGROUP = {"hf": split_rope_pairs, "consolidated": join_rope_pairs}


def numbers_of(rows: Rows, dtype: str) -> "torch.Tensor":
    """Some rows as numbers of their dtype, in the same memory."""
    import torch

    numbers: torch.Tensor = torch.from_numpy(rows).view(getattr(torch, TORCH_NAMES[dtype]))
    return numbers


class Step(Protocol):
    """A function of some rows of a tensor, always a multiple of `rows_at_once`."""

    @property
    def rows_at_once(self) -> int: ...

    def __call__(self, rows: Rows) -> Rows: ...


@dataclass(frozen=True)
class RegroupRopePairs:
    """The rows of whole heads in the order of layout `to`."""

    to: Literal["consolidated", "hf"]
    head_dim: int

    @property
    def rows_at_once(self) -> int:
        return self.head_dim

    def __call__(self, rows: Rows) -> Rows:
        return REGROUP[self.to](rows, head_dim=self.head_dim)


@dataclass(frozen=True)
class Cast:
    """Numbers rounded to the nearest of another dtype."""

    dtype: str
    to: str

    rows_at_once = 1

    def __call__(self, rows: Rows) -> Rows:
        """The rows in the other dtype; a ValueError where a finite number would become infinite."""
        import torch

        numbers = numbers_of(rows, self.dtype)
        rounded = numbers.to(getattr(torch, TORCH_NAMES[self.to]))
        too_large = rounded.isinf() & numbers.float().isfinite()
        if too_large.any():
            number = numbers[too_large][0].item()
            raise ValueError(f"holds {number:g}, too large for {self.to}; choose another dtype")
        cast: Rows = rounded.view(torch.uint8).numpy()
        return cast

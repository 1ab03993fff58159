"""The order of the rotary pairs: the one difference of values between the two layouts."""

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy
    import torch

Array = TypeVar("Array", "torch.Tensor", "numpy.ndarray[Any, Any]")


def split_rope_pairs(weight: Array, *, head_dim: int) -> Array:
    """Rows of each head from x0 y0 x1 y1 … (consolidated) to x0 x1 … y0 y1 … (HF).

    `weight` is [heads * head_dim, …] of any dtype, of query or of key heads: the number of heads is in its shape.
    """
    return _swap_axes_of_pairs(weight, head_dim, head_dim // 2, 2)


def join_rope_pairs(weight: Array, *, head_dim: int) -> Array:
    """Rows of each head from x0 x1 … y0 y1 … (HF) to x0 y0 x1 y1 … (consolidated); undoes `split_rope_pairs`."""
    return _swap_axes_of_pairs(weight, head_dim, 2, head_dim // 2)


def _swap_axes_of_pairs(weight: Array, head_dim: int, outer: int, inner: int) -> Array:
    rows, *columns = weight.shape
    if head_dim % 2 or rows % head_dim:
        raise ValueError(f"{rows} rows of rotary pairs: must be a multiple of head_dim {head_dim}, which must be even")
    # [heads, outer, inner, columns] -> [heads, inner, outer, columns]
    return weight.reshape(rows // head_dim, outer, inner, *columns).swapaxes(1, 2).reshape(rows, *columns)

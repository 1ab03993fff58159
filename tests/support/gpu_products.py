"""Weights of every kind for the GPU kernels, and what they stand for in float64."""

from typing import Any

import torch
from torch import Tensor

from modeling_mistral_large.quantization.linear import pack_words

KINDS = ("bf16", "fp8", "fp8_bits", "int4")


def random_weights(kind: str, rows: tuple[int, ...], columns: int, device: str, group: int = 128) -> tuple[Any, Tensor]:
    """`gpu_kernels.Weights` of one to three matrices, and all of them as one float64 [rows, columns]."""
    from modeling_mistral_large.inference.gpu_kernels import Weights

    weights, scales, dense = [], [], []
    for count in rows:
        if kind == "int4":
            codes = torch.randint(0, 16, (count, columns), dtype=torch.uint8, device=device)
            scale = (torch.rand(count, columns // group, device=device) * 0.1 + 0.01).bfloat16()
            groups = (codes.double() - 8).view(count, -1, group) * scale.double()[..., None]
            weights.append(pack_words(codes))
            dense.append(groups.flatten(1))
        elif kind == "bf16":
            scale = torch.randn(count, columns, device=device).bfloat16()
            weights.append(scale)
            dense.append(scale.double())
        else:
            weight = (torch.randn(count, columns, device=device) * 20).to(torch.float8_e4m3fn)
            scale = torch.rand(count, 1, device=device) + 0.1
            weights.append(weight.view(torch.uint8) if kind == "fp8_bits" else weight)
            dense.append(weight.double() * scale.double())
        scales.append(scale)
    return Weights(kind, columns, group if kind == "int4" else 0, tuple(weights), tuple(scales)), torch.cat(dense)


def placed(x: Tensor, group: int) -> Tensor:
    """Activations [m, columns] in the order that int4 products want, written without `place_of`."""
    if not group:
        return x
    # Column 8 * word + 4 * half + pair of a group to [pair, word, half].
    m = x.shape[0]
    return x.view(m, -1, group // 8, 2, 4).permute(0, 1, 4, 2, 3).reshape(m, -1).contiguous()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())

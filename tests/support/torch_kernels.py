"""What `gpu_kernels` computes, by torch on the CPU: for tests of everything around the kernels, without Triton.

`tests/modeling/inference/test_gpu_kernels.py` compares the two.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling_mistral_large.inference.static_cache import Fp8States, States, of_each, write
from modeling_mistral_large.modeling_mistral_large import rotate as rotated
from modeling_mistral_large.quantization.linear import round_to_fp8, unpack_words

NAME = "modeling_mistral_large.inference.gpu_kernels"


@dataclass(frozen=True)
class Weights:
    kind: str
    columns: int
    group: int
    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        return sum(weight.shape[0] for weight in self.weights)

    @property
    def takes_fp8(self) -> bool:
        return self.kind == "fp8"

    def splits(self, m: int) -> int:
        return 1

    def matrices(self) -> Iterator[Tensor]:
        """Each weight in FP32, dequantized."""
        for weight, scale in zip(self.weights, self.scales, strict=True):
            if self.kind == "int4":
                codes = unpack_words(weight).float() - 8
                groups = codes.view(len(codes), -1, self.group) * scale.float()[..., None]
                yield groups.flatten(1)
            elif self.kind == "fp8":
                yield weight.float() * scale.float()
            else:
                yield weight.float()


# Activations stay in their order: `multiply` here wants no other.
def multiply(
    x: Tensor, weights: Weights, part: Tensor, scales: Tensor | None = None, *, splits: int | None = None
) -> int:
    wide = x.float()
    if weights.takes_fp8:
        if scales is None:
            codes, column = round_to_fp8(x)
            wide, scales = codes.float(), column[:, 0]
        wide = wide * scales[:, None]
    product = torch.cat([wide @ matrix.T for matrix in weights.matrices()], dim=-1)
    part.view(-1)[: product.numel()] = product.view(-1)
    return 1


def norm(
    stream: Tensor, part: Tensor, splits: int, gain: Tensor, eps: float, y: Tensor, group: int,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    if splits:
        stream += part[: stream.numel()].view_as(stream).bfloat16()
    wide = stream.float()
    y.copy_(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain.float())
    if scales is not None:
        codes, column = round_to_fp8(y)
        y.copy_(codes.float())
        scales.copy_(column[:, 0])


def rotate(part: Tensor, splits: int, q: Tensor, keys: States, values: States, angles: Any, at: Any) -> None:
    m, heads, head_dim = q.shape
    sequences, kv_heads = shape_of(keys)[:2]
    lengths, starts = (each.long() for each in at)
    states = part[: m * (heads + 2 * kv_heads) * head_dim].view(m, -1, head_dim)
    cos, sin = (table.float()[lengths - starts][:, None] for table in angles)
    turned = rotated(states[:, :-kv_heads], cos, sin)
    q.copy_(turned[:, :heads])
    for row, slot in enumerate(lengths.tolist()):
        sequence = slice(row // (m // sequences), row // (m // sequences) + 1)
        for kept, new in ((keys, turned[row, heads:]), (values, states[row, -kv_heads:])):
            write(of_each(lambda each, one=sequence: each[one], kept), slot, new[None, :, None].bfloat16())  # type: ignore[misc]


def shape_of(states: States) -> tuple[int, ...]:
    return tuple(states.codes.shape if isinstance(states, Fp8States) else states.shape)


def attend(
    q: Tensor, keys: States, values: States, at: Any, scaling: float, parts: Tensor, stats: Tensor, y: Tensor,
    group: int,
) -> None:  # fmt: skip
    queries = len(q) // shape_of(keys)[0]
    wide = [
        states.codes.float() * states.scales.float()[..., None] if isinstance(states, Fp8States) else states.float()
        for states in (keys, values)
    ]
    for row, (length, start) in enumerate(zip(*(each.tolist() for each in at), strict=True)):
        key, value = (states[row // queries, :, start : length + 1] for states in wide)
        y[row] = nn.functional.scaled_dot_product_attention(
            q[row, :, None].float(), key, value, scale=scaling, enable_gqa=True
        ).flatten()


def gate(part: Tensor, splits: int, y: Tensor, group: int) -> None:
    first, second = part[: 2 * y.numel()].view(len(y), 2, -1).unbind(1)
    y.copy_(nn.functional.silu(first) * second)


def use(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let recorded steps run on the CPU by these functions; return a list that gets the rows of each step."""
    steps: list[int] = []
    module: Any = ModuleType(NAME)
    functions: dict[str, Callable[..., Any]] = {
        "norm": norm, "rotate": rotate, "attend": attend, "gate": gate, "Weights": Weights
    }  # fmt: skip
    vars(module).update(functions)

    def counted(x: Tensor, weights: Weights, part: Tensor, scales: Any = None, *, splits: int | None = None) -> int:
        if splits is not None:
            # The head's product, once in a step.
            steps.append(len(x))
        return multiply(x, weights, part, scales)

    module.multiply = counted
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setattr("modeling_mistral_large.inference.gpu_kernels", module, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("modeling_mistral_large.quantization.gpu_int4.HAS_TRITON", True)
    return steps

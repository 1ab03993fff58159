"""Linear layers for batches of single tokens in bf16 on CPUs without instructions for bf16.

There torch multiplies each row by itself: 32 rows take 32 times as long as one. Blocks of the weights that fit the
cache, widened to float32, take a few times as long as one row for all of them. Sums are in float32 in both, and are
rounded to bf16 once.
"""

import platform

import torch
from torch import Tensor, nn

from modeling_mistral_large.inference.attention import is_bf16_inference

# With fewer rows, widening takes longer than it saves.
LEAST_ROWS = 8
BLOCK_ELEMENTS = 2**18


def is_bf16_slow() -> bool:
    """Whether the processor is an x86 without instructions for products in bf16."""
    # The function is torch's own, and not in all its versions.
    has_products = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return platform.machine() in ("x86_64", "AMD64") and not has_products


def blocked_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows [rows, in_features] with a weight [out_features, in_features], both in bf16, by its blocks."""
    out_features, in_features = weight.shape
    wide = rows.float()
    size = max(1, BLOCK_ELEMENTS // in_features)
    product = rows.new_empty(len(rows), out_features)
    buffer = wide.new_empty(min(size, out_features), in_features)
    for start in range(0, out_features, size):
        block = weight[start : start + size]
        product[:, start : start + size] = wide @ buffer[: len(block)].copy_(block).T
    return product


class _BatchLinear(nn.Linear):
    """A linear layer that multiplies single tokens of many rows by blocks, and is torch's in all else."""

    def forward(self, input: Tensor) -> Tensor:
        is_batch = input.ndim == 3 and input.shape[1] == 1 and len(input) >= LEAST_ROWS
        # Not the weights that a subclass of Tensor shards over ranks or quantizes.
        if is_batch and type(self.weight) is nn.Parameter and is_bf16_inference(self, input):
            return blocked_product(input[:, 0], self.weight)[:, None]
        return super().forward(input)


def use_blocked_products_(model: nn.Module) -> None:
    """Let a loaded model compute the next tokens of a batch by blocks, in its plain layers without bias on the CPU."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and module.weight.device.type == "cpu":
            module.__class__ = _BatchLinear

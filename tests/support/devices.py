"""Tests that run on a GPU where there is one, each next to its twin on the CPU.

The twin runs the kernels in Triton's interpreter with TRITON_INTERPRET=1, as `.ci/kernels` does, and torch's in their
place otherwise.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support import torch_kernels

HAS_GPU = torch.cuda.is_available()
on_both_devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu"),
        pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not HAS_GPU, reason="no GPU; its twin ran")]),
    ],
)


def use_kernels_of(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps be recorded on a device by the kernels that there are."""
    if device == "cuda":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        use_large_tiles(monkeypatch)
    else:
        torch_kernels.use(monkeypatch)


def use_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and larger programs: the interpreter runs one after another."""
    from modeling_mistral_large.inference import gpu_kernels

    tables: list[dict[str, Any]] = [gpu_kernels.VECTOR_TILE, gpu_kernels.DOT_TILE]
    for tiles in tables:
        for kind, tile in tiles.items():
            monkeypatch.setitem(tiles, kind, replace(tile, rows=256))
    monkeypatch.setattr("modeling_mistral_large.recorded_steps.decoding.LEAST_SPLITS", 2)

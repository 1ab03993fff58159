"""Products of batches in bf16 by blocks: those of float64, rounded."""

import platform
from typing import Any

import pytest
import torch

from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.inference import batch_products
from modeling_mistral_large.inference.batch_products import blocked_product, is_bf16_slow, use_blocked_products_
from tests.support.models import ours_only, random_ids


@pytest.mark.parametrize("shape", [(80, 112), (80, 7), (5000, 300), (300_000, 3)], ids=str)
def test_products_are_those_of_float64(shape: tuple[int, int]) -> None:
    in_features, out_features = shape
    rows, weight = (torch.randn(count, in_features).bfloat16() for count in (9, out_features))
    exact = rows.double() @ weight.double().T
    product = blocked_product(rows, weight)
    assert product.dtype == torch.bfloat16
    # Half a unit in the last place, and the sums' rounding where they cancel.
    assert ((product.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * in_features**0.5).all()


def test_only_batches_of_single_tokens_are_computed_so(
    tiny_config: MistralLargeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = ours_only(tiny_config).to(torch.bfloat16)
    shapes = [(8, 1), (7, 1), (1, 8), (8, 2)]
    prompts = [random_ids(tiny_config, *shape) for shape in shapes]
    with torch.no_grad():
        before = [model(ids).logits for ids in prompts]
    calls: list[int] = []

    def counted(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return blocked_product(rows, weight)

    monkeypatch.setattr(batch_products, "blocked_product", counted)
    use_blocked_products_(model)
    with torch.no_grad():
        after = [model(ids).logits for ids in prompts]
    # Seven of each layer, and the output matrix.
    assert calls == [8] * (7 * tiny_config.num_hidden_layers + 1)
    torch.testing.assert_close(after[0], before[0], rtol=0.05, atol=0.3)
    for mine, other in zip(after[1:], before[1:], strict=True):
        assert torch.equal(mine, other)
    # With gradients, the product is torch's.
    model(prompts[0]).logits.sum().backward()
    assert len(calls) == 7 * tiny_config.num_hidden_layers + 1


@pytest.mark.parametrize(
    ("machine", "has_products", "slow"), [("x86_64", False, True), ("x86_64", True, False), ("aarch64", False, False)]
)
def test_which_processors_need_it(
    monkeypatch: pytest.MonkeyPatch, machine: str, has_products: bool, slow: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_products, raising=False)
    assert is_bf16_slow() is slow

"""The growing cache holds what transformers' own holds, alone and as a row of a ragged batch."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.inference.growing_cache import GrowingCache, RaggedCache
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.transformers_api.keywords import cache_argument
from tests.support.errors import raises_exactly
from tests.support.models import ours_only, random_ids


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Cache, **options: Any) -> torch.Tensor:
    logits: torch.Tensor = model(ids, **options, **cache_argument(cache)).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits_are_those_of_transformers_cache(tiny_config: MistralLargeConfig, dtype: torch.dtype, fp8: bool) -> None:
    model = ours_only(tiny_config).to(dtype)
    own = GrowingCache(tiny_config, fp8=fp8)
    other: Cache = Fp8Cache(tiny_config) if fp8 else DynamicCache(config=tiny_config)
    for tokens in (20, 7, *[1] * 50):
        ids = random_ids(tiny_config, 1, tokens)
        assert torch.equal(read(model, ids, own), read(model, ids, other))
    own.crop(-30)
    other.crop(-30)
    ids = random_ids(tiny_config, 1, 3)
    assert torch.equal(read(model, ids, own), read(model, ids, other))
    assert own.get_seq_length() == other.get_seq_length() == 50


@pytest.mark.slow
def test_memory_grows_by_an_eighth_and_is_given_back(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    cache = GrowingCache(tiny_config)
    read(model, random_ids(tiny_config, 1, 400), cache)
    (layer, *_) = cache.layers
    assert layer.capacity == 450
    first = layer.states
    for _ in range(50):
        read(model, random_ids(tiny_config, 1, 1), cache)
    assert layer.states is first
    read(model, random_ids(tiny_config, 1, 1), cache)
    assert layer.capacity == 451 + 451 // 8
    kept = layer.states
    assert kept is not None
    cache.crop_to(100)
    assert layer.capacity == 100
    assert layer.states is not None
    assert torch.equal(layer.states, kept[:, :, :, :100])
    cache.reserve(300)
    assert layer.capacity == 300
    cache.crop_to(0)
    assert cache.bytes_by_device() == {}


@pytest.mark.parametrize("attention", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_row_attends_to_its_own_cache(tiny_config: MistralLargeConfig, attention: str, fp8: bool) -> None:
    model = ours_only(tiny_config, attention)
    lengths = (1, 30, 200, 7)
    caches = [GrowingCache(tiny_config, fp8=fp8) for _ in lengths]
    others = [GrowingCache(tiny_config, fp8=fp8) for _ in lengths]
    for length, cache, other in zip(lengths, caches, others, strict=True):
        ids = random_ids(tiny_config, 1, length)
        read(model, ids, cache)
        other.copy_from(cache, length)
    for step in range(3):
        ids = random_ids(tiny_config, len(lengths), 1)
        positions = torch.tensor([[length + step] for length in lengths])
        together = read(model, ids, RaggedCache(caches), position_ids=positions)
        alone = torch.cat([read(model, row[None], other) for row, other in zip(ids, others, strict=True)])
        torch.testing.assert_close(together, alone)
    assert [cache.get_seq_length() for cache in caches] == [length + 3 for length in lengths]


def test_a_prefix_is_copied_in_pieces(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 60)
    source, copied = GrowingCache(tiny_config), GrowingCache(tiny_config)
    read(model, ids, source)
    for end in (10, 11, 40):
        copied.copy_from(source, end)
    source.crop_to(40)
    assert torch.equal(read(model, ids[:, 40:], copied), read(model, ids[:, 40:], source))


def test_only_tokens_can_be_taken_off(tiny_config: MistralLargeConfig) -> None:
    cache = GrowingCache(tiny_config)
    with raises_exactly(ValueError, "crop(3): pass the number of tokens to remove as a negative number"):
        cache.crop(3)
    with raises_exactly(NotImplementedError, "a GrowingCache holds one sequence; pass another cache, or none"):
        cache.layers[0].batch_repeat_interleave(2)

"""Decoding: caches, positions, padding, beams, assistants, batches, compilation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    StaticCache,
)

from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeModel, MistralLargeTokenizer
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.transformers_api.keywords import cache_argument
from tests.support.models import ATTENTION, GREEDY, left_padded, ours_only, random_ids, stock_and_ours


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_decode_equals_the_uncached_forward(tiny_config: MistralLargeConfig, attention: str, cache: str) -> None:
    model = ours_only(tiny_config, attention)
    ids = random_ids(tiny_config, 2, 23)
    past = DynamicCache(config=tiny_config) if cache == "dynamic" else StaticCache(tiny_config, max_cache_len=32)
    steps = [ids[:, :9], *ids[:, 9:].split(1, dim=1)]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        pieces = [model(step, past_key_values=past, use_cache=True).logits for step in steps]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "prefill_chunk_size": 4},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_greedy_generation_is_the_same_whatever_the_cache(
    tiny_config: MistralLargeConfig, options: dict[str, Any]
) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 17)
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("an offloaded cache needs a device to offload from")
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)


@pytest.mark.usefixtures("quanto_kernels")
def test_generation_with_a_quantized_cache_equals_stock_mistral(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids = random_ids(tiny_config, 1, 17)
    quantized = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 32},
    }
    assert torch.equal(ours.generate(ids, **GREEDY, **quantized), stock.generate(ids, **GREEDY, **quantized))


@pytest.mark.slow
def test_generation_equals_stock_mistral(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids, mask = left_padded(tiny_config, [17, 5])
    for options in (GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "num_beams": 3, "num_return_sequences": 2}):
        found = ours.generate(ids, attention_mask=mask, **options)
        assert torch.equal(found, stock.generate(ids, attention_mask=mask, **options))


@pytest.mark.slow
def test_assisted_generation_gives_the_greedy_tokens(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    assistant = ours_only(MistralLargeConfig(**{**tiny_config.to_dict(), "num_hidden_layers": 1}))
    ids = random_ids(tiny_config, 1, 17)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), model.generate(ids, **GREEDY))


def test_a_cache_in_8_bits_goes_back_when_an_assistant_was_wrong(tiny_config: MistralLargeConfig) -> None:
    model, ids = ours_only(tiny_config), random_ids(tiny_config, 1, 17)
    caches: list[Any] = [Fp8Cache(tiny_config), Fp8Cache(tiny_config)]
    alone = model.generate(ids, **cache_argument(caches[0]), **GREEDY)
    assert torch.equal(model.generate(ids, **cache_argument(caches[1]), **GREEDY, prompt_lookup_num_tokens=3), alone)


def test_a_left_padded_batch_gives_each_rows_own_greedy_tokens(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    lengths = [17, 5, 1]
    ids, mask = left_padded(tiny_config, lengths)
    batch = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], **GREEDY)[0, length:]
        assert torch.equal(batch[row], alone), f"row {row} of length {length}"


def test_position_ids_move_the_rope(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids = random_ids(tiny_config, 1, 9)
    scattered = torch.tensor([[0, 1, 2, 7, 8, 9, 90, 91, 400]])
    with torch.no_grad():
        found = ours(ids, position_ids=scattered).logits
        assert torch.equal(found, stock(ids, position_ids=scattered).logits)
        assert not torch.equal(found, ours(ids).logits)


def test_far_positions_are_exact_in_bfloat16_under_autocast(tiny_config: MistralLargeConfig) -> None:
    rotary = MistralLargeModel(tiny_config).rotary_emb
    positions = torch.tensor([[131070, 131071]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotary(torch.zeros(1, 2, 80), positions)
    frequencies = 1e6 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    angles = positions[..., None].double() * frequencies
    # fp32 holds 131071 * 1 exactly and its product with a frequency to 2^-24: 0.008 radians at most.
    assert (cos[..., :16].double() - angles.cos()).abs().max() < 0.01
    assert (sin[..., 16:].double() - angles.sin()).abs().max() < 0.01


@pytest.mark.slow
def test_stop_strings_end_an_answer(demo_folder: Path) -> None:
    """`generate` hands the tokenizer that it takes for them on to the model."""
    tokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=30, stop_strings=["tiny"], tokenizer=tokenizer)
    assert str(tokenizer.decode(output[0], skip_special_tokens=True)).endswith("I am a tiny")

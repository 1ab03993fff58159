"""Long prompts are read in chunks, at full length too, and the cache can be kept in FP8."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mistral_large_conversion.sharding.memory import Workload, activation_bytes, cache_bytes_of_layer
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.inference import attention as attention_module
from modeling_mistral_large.inference.attention import sdpa_attention
from modeling_mistral_large.inference.kv_cache import Fp8Cache, Fp8Layer, pack, unpack
from modeling_mistral_large.inference.static_cache import Fp8States, write
from modeling_mistral_large.transformers_api.keywords import cache_argument
from tests.support.models import GREEDY, left_padded, ours_only, random_ids, stock_and_ours
from tests.support.peak_memory import PeakMemory


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each forward of our models has read."""
    read: list[int] = []
    forward = MistralLargeForCausalLM.forward

    @wraps(forward)  # `generate` looks at what it takes
    def watched_forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **inputs: Any) -> Any:
        read.append((input_ids if inputs_embeds is None else inputs_embeds).shape[1])
        outputs = forward(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)
        assert outputs.logits.shape[1] == 1
        return outputs

    monkeypatch.setattr(MistralLargeForCausalLM, "forward", watched_forward)
    return read


def prompt_chunks(lengths: list[int]) -> list[int]:
    """The forwards before the first token was written."""
    return lengths[: len(lengths) - GREEDY["max_new_tokens"] + 1]


# Parts


@pytest.mark.slow
def test_long_prompts_are_read_in_parts_by_themselves(tiny_config: MistralLargeConfig, lengths: list[int]) -> None:
    tiny_config.max_position_embeddings = 8192
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    for length, chunks in {2048: [2048], 2049: [2048, 1], 4100: [2048, 2048, 4]}.items():
        lengths.clear()
        ids = random_ids(tiny_config, 1, length)
        assert torch.equal(ours.generate(ids, **GREEDY), stock.generate(ids, **GREEDY))
        assert prompt_chunks(lengths) == chunks


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"max_new_tokens": 1},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
@pytest.mark.parametrize("rows", [[37], [37, 5, 19]], ids=["one", "padded"])
def test_parts_give_the_tokens_of_the_whole(
    tiny_config: MistralLargeConfig, lengths: list[int], rows: list[int], options: dict[str, Any]
) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids, mask = left_padded(tiny_config, rows)
    asked = {**GREEDY, **options, "attention_mask": mask}
    expected = stock.generate(ids, **asked)
    assert torch.equal(ours.generate(ids, **asked, prefill_chunk_size=7), expected)
    assert lengths[:6] == [7, 7, 7, 7, 7, 2]


def test_parts_of_embeddings(tiny_config: MistralLargeConfig, lengths: list[int]) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids, mask = left_padded(tiny_config, [20, 13])
    embeds = stock.model.embed_tokens(ids)
    asked = {**GREEDY, "attention_mask": mask}
    expected = stock.generate(inputs_embeds=embeds, **asked)
    assert torch.equal(ours.generate(inputs_embeds=embeds, **asked, prefill_chunk_size=8), expected)
    assert prompt_chunks(lengths) == [8, 8, 4]


@pytest.mark.slow
@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize("rows", [[41], [41, 30]], ids=["one", "padded"])
def test_parts_go_on_from_a_cache(
    tiny_config: MistralLargeConfig, lengths: list[int], rows: list[int], only_new: bool
) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids, mask = left_padded(tiny_config, rows)
    expected = stock.generate(ids, attention_mask=mask, **GREEDY)[:, 41:]
    cache: Any = DynamicCache(config=tiny_config)
    ours.generate(ids[:, :12], attention_mask=mask[:, :12], **{**GREEDY, "max_new_tokens": 1}, **cache_argument(cache))
    assert cache.get_seq_length() == 12
    lengths.clear()
    given = ids[:, 12:] if only_new else ids
    written = ours.generate(given, attention_mask=mask, **GREEDY, **cache_argument(cache), prefill_chunk_size=10)
    assert torch.equal(written[:, given.shape[1] :], expected)
    assert prompt_chunks(lengths) == [10, 10, 9]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_what_is_asked_of_the_whole_prompt_is_of_the_whole(tiny_config: MistralLargeConfig, wanted: str) -> None:
    tiny_config.max_position_embeddings = 4096
    tiny_config.num_hidden_layers = 1
    model = ours_only(tiny_config, "eager")
    ids = random_ids(tiny_config, 1, 2060)
    asked = {**GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True, wanted: True}
    outputs = model.generate(ids, **asked)
    ((first, *_),) = outputs[wanted.removeprefix("output_")]
    assert first.shape[-2] == 2060


@pytest.mark.slow
def test_parts_need_a_cache(tiny_config: MistralLargeConfig, lengths: list[int]) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 20)
    model.generate(ids, **GREEDY, use_cache=False)
    assert lengths[0] == 20
    with pytest.raises(ValueError, match="chunking without a cache"):
        model.generate(ids, **GREEDY, use_cache=False, prefill_chunk_size=8)


# Masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_heads", [1, 6])
@pytest.mark.parametrize("is_added", [False, True], ids=["bool", "added"])
def test_masked_attention_is_transformers_bit_for_bit(dtype: torch.dtype, mask_heads: int, is_added: bool) -> None:
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    query = torch.randn(2, 6, 19, 32, dtype=dtype)
    key, value = torch.randn(2, 2, 2, 40, 32, dtype=dtype)
    mask: Any = torch.rand(2, mask_heads, 19, 40) < 0.7
    mask[..., 0] = True
    if is_added:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    asked: tuple[Any, Any, Any, Any, Any] = (module, query, key, value, mask)
    found, _ = sdpa_attention(*asked, scaling=0.2)
    assert torch.equal(found, sdpa_attention_forward(*asked, scaling=0.2)[0])


def test_masked_attention_does_not_repeat_the_cache() -> None:
    query = torch.randn(1, 24, 64, 16)
    key, value = torch.randn(2, 1, 2, 4096, 16)
    module, mask = SimpleNamespace(num_key_value_groups=12), torch.ones(1, 1, 64, 4096).bool()
    asked: tuple[Any, Any, Any, Any, Any] = (module, query, key, value, mask)
    peaks = []
    for attention in (sdpa_attention, sdpa_attention_forward):
        with PeakMemory() as memory:
            attention(*asked, scaling=0.2)
        peaks.append(memory.peak)
    ours, stock = peaks
    assert ours < key.nbytes + value.nbytes + 2 * query.nbytes
    assert stock > 12 * (key.nbytes + value.nbytes)


@pytest.mark.parametrize("option", ["position_bias", "is_causal"])
def test_options_of_transformers_attention_are_left_to_it(tiny_config: MistralLargeConfig, option: str) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids, mask = left_padded(tiny_config, [17, 9])
    asked = {"attention_mask": mask, option: torch.randn(1, 6, 17, 17) if option == "position_bias" else False}
    with torch.no_grad():
        assert torch.equal(ours(ids, **asked).logits, stock(ids, **asked).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_through_masked_attention_are_stock_mistrals(tiny_config: MistralLargeConfig, attention: str) -> None:
    stock, ours = stock_and_ours(tiny_config, attention)
    ids, mask = left_padded(tiny_config, [17, 9])
    labels = ids.where(mask.bool(), -100)
    for model in (stock, ours):
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


# Full length


NARROW: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
ONE_LOGIT = {**GREEDY, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}


def check_memory(peak: int, config: MistralLargeConfig, demand: Workload, cache: Any) -> None:
    cached = config.num_hidden_layers * cache_bytes_of_layer(config, demand)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == cached
    planned = cached + activation_bytes(config, demand)
    assert planned * 0.9 < peak < planned * 1.1


def last_query_attention(module: Any, query: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor, None]:
    """transformers' SDPA of the last query alone; that of the others stays zero."""
    options |= {"is_causal": False, "attention_mask": None}
    last, _ = sdpa_attention_forward(module, query[:, :, -1:], *inputs[:2], **options)
    states = last.new_zeros(query.shape[0], query.shape[2], *last.shape[2:])
    states[:, -1:] = last
    return states, None


def edges_alone(attention: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Attention of the first two chunks and the last of a prompt of 131072 tokens; that of the others is zero."""

    def attend(module: Any, query: Tensor, key: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor, None]:
        if 2 * 2048 < key.shape[2] <= 131072 - 2048:
            return query.new_zeros(query.transpose(1, 2).shape), None
        return attention(module, query, key, *inputs, **options)

    return attend


@pytest.mark.slow
def test_131072_tokens_have_stock_mistrals_completion_in_the_planned_memory(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MistralLargeConfig(**NARROW)
    stock, ours = stock_and_ours(config, "sdpa")
    ids = random_ids(config, 1, 131072)
    cache: Any = DynamicCache(config=config)
    memory = PeakMemory()
    # In a model of one layer the last token's logits depend on no query but its own, and the last chunk's attention
    # takes the most memory.
    monkeypatch.setattr(attention_module, "sdpa_attention", edges_alone(sdpa_attention))
    with memory:
        found = ours.generate(ids, **ONE_LOGIT, **cache_argument(cache))
    assert lengths == [2048] * 64
    check_memory(memory.peak, config, Workload(131072, weights="fp32"), cache)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", last_query_attention)
    expected = stock.generate(ids, **ONE_LOGIT)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits[0], expected.logits[0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_fp8_cache_takes_the_planned_memory(dtype: torch.dtype) -> None:
    config = MistralLargeConfig(
        **{**NARROW, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    )
    model = ours_only(config).to(dtype)
    cache: Any = Fp8Cache(config)
    memory = PeakMemory()
    with memory:
        model.generate(random_ids(config, 1, 4096), **ONE_LOGIT, **cache_argument(cache), prefill_chunk_size=512)
    weights = "bf16" if dtype == torch.bfloat16 else "fp32"
    check_memory(memory.peak, config, Workload(4096, weights=weights, kv="fp8", prefill_chunk=512), cache)


# 8 bits


def rounded(states: Tensor) -> Tensor:
    """Each vector of [..., head_dim] rounded to the nearest numbers of three bits behind the leading one."""
    scale = (states.abs().amax(-1, keepdim=True).float() / 448).bfloat16().double()
    numbers = (states.double() / scale).clamp(-448, 448)
    # 2 ** -6 is the smallest normal number; what is smaller has the same step.
    step = numbers.abs().clamp(min=2**-6).log2().floor().exp2() / 8
    return ((numbers / step).round() * step).clamp(-448, 448) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 50, 64) * torch.logspace(-4, 4, 50)[:, None]
    states[0, 0, 0] = 0
    states[0, 0, 1, 1:] = 0
    packed = pack(states.to(dtype))
    assert packed.shape == (2, 3, 50, 66)
    assert packed.dtype == torch.uint8
    expected = rounded(states.to(dtype)).nan_to_num(0).to(dtype)
    assert torch.equal(unpack(packed, dtype), expected)


def test_answers_with_8_bits_are_near(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    ids, mask = left_padded(tiny_config, [40, 31])
    cache: Any = Fp8Cache(tiny_config)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        chunks = [
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for start, end in ((0, 20), (20, 39), (39, 40))
        ]
    near = torch.cat(chunks, dim=1)
    seen = mask.bool()
    assert not torch.equal(near[seen], whole[seen])
    error = (near[seen] - whole[seen]).norm() / whole[seen].norm()
    assert error < 0.05
    assert cache.get_seq_length() == 40
    assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}


def test_a_static_fp8_cache_keeps_and_gives_what_fp8_cache_does() -> None:
    """Bit for bit, chunk after chunk."""
    torch.manual_seed(0)
    keys, values = (
        Fp8States(torch.zeros(2, 3, 20, 32, dtype=torch.float8_e4m3fn), torch.zeros(2, 3, 20, dtype=torch.bfloat16))
        for _ in range(2)
    )
    reference: Any = Fp8Layer()
    for start, count in ((0, 5), (5, 1), (6, 9)):
        chunk = [torch.randn(2, 3, count, 32).bfloat16() for _ in range(2)]
        for states, new, expected in zip((keys, values), chunk, reference.update(*chunk), strict=True):
            assert torch.equal(write(states, start, new), expected)
    for states, packed in ((keys, reference.keys), (values, reference.values)):
        assert packed is not None
        assert torch.equal(states.codes[:, :, :15].view(torch.uint8), packed[..., :-2])
        assert torch.equal(states.scales[:, :, :15], packed[..., -2:].contiguous().view(torch.bfloat16)[..., 0])
        assert not bool(states.codes[:, :, 15:].view(torch.uint8).any())
        assert not bool(states.scales[:, :, 15:].any())


def test_later_tokens_may_be_larger(tiny_config: MistralLargeConfig) -> None:
    # A scale for all positions, taken of the first ones, would cut them.
    cache: Any = Fp8Cache(tiny_config)
    states = torch.randn(1, 2, 8, 32)
    cache.update(states, states, 0)
    keys, values = cache.update(1000 * states, 1000 * states, 0)
    for found in (keys, values):
        torch.testing.assert_close(found, torch.cat((states, 1000 * states), dim=2), rtol=2**-4, atol=20)


def test_8_bits_with_beams_rows_and_crops(tiny_config: MistralLargeConfig) -> None:
    cache: Any = Fp8Cache(tiny_config)
    plain: Any = DynamicCache(config=tiny_config)
    states = torch.randn(4, 2, 9, 32)
    kept = unpack(pack(states), torch.float32)
    for each, rows in ((cache, states), (plain, kept)):
        for layer in range(tiny_config.num_hidden_layers):
            each.update(rows, rows, layer)
        each.reorder_cache(torch.tensor([2, 0, 0, 1]))
        each.crop(-3)
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([7, 0, 3]))
    more = torch.randn(3, 2, 1, 32)
    found = cache.update(more, more, 0)
    expected = plain.update(unpack(pack(more), torch.float32), unpack(pack(more), torch.float32), 0)
    assert all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_a_static_cache_can_be_longer_than_a_chunk(tiny_config: MistralLargeConfig, lengths: list[int]) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids = random_ids(tiny_config, 1, 21)
    cache = StaticCache(tiny_config, max_cache_len=64)
    found = ours.generate(ids, **GREEDY, **cache_argument(cache), prefill_chunk_size=8)
    assert torch.equal(found, stock.generate(ids, **GREEDY))
    assert prompt_chunks(lengths) == [8, 8, 5]

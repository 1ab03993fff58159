"""The fast paths of decoding on the CPU: where they are taken, and what they change, which is bf16's rounding."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import StaticCache

from mistral_large_cli.demo import golden_conversations
from modeling_mistral_large import (
    MistralLargeConfig,
    MistralLargeForCausalLM,
    MistralLargeTokenizer,
    cpu_decode,
    modeling_mistral_large,
)
from modeling_mistral_large.cpu_decode import PATHS, grouped_attention_forward, turn_off, turn_on
from modeling_mistral_large.errors import SettingError

from .models import GREEDY, left_padded, ours_only, random_ids, stock_and_ours
from .test_demo import answers, expected

LAYERS = 3
# Four projections of the attention and three of the feed-forward in each layer, and the head.
LINEARS = 7 * LAYERS + 1


@pytest.fixture(autouse=True)
def _all_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where the environment or the processor of the tests says otherwise."""
    monkeypatch.setattr(cpu_decode, "HAS_AMX", True)
    turn_on(*PATHS)
    yield
    turn_on(*PATHS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each path's function is called."""
    counts: Counter[str] = Counter()
    product = torch.mv

    def counted_product(matrix: Tensor, vector: Tensor) -> Tensor:
        counts["linear"] += 1
        return product(matrix, vector)

    def counted_attention(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        counts["attention"] += 1
        return grouped_attention_forward(*arguments, **options)

    monkeypatch.setattr(torch, "mv", counted_product)
    monkeypatch.setattr(modeling_mistral_large, "grouped_attention_forward", counted_attention)
    return counts


def bf16_model(config: MistralLargeConfig, attention: str = "sdpa") -> Any:
    return ours_only(config, attention).to(torch.bfloat16)


@torch.no_grad()
def decode_one(model: Any, ids: Tensor, past: Any = None, **options: Any) -> Tensor:
    """Logits of the last position [batch, vocabulary], computed after those before it are in the cache."""
    past = model(ids[:, :-1], past_key_values=past, use_cache=True).past_key_values
    logits: Tensor = model(ids[:, -1:], past_key_values=past, **options).logits[:, -1]
    return logits


def test_a_single_bf16_token_takes_both_paths_in_every_layer(
    tiny_config: MistralLargeConfig, calls: Counter[str]
) -> None:
    decode_one(bf16_model(tiny_config), random_ids(tiny_config, 1, 9))
    assert calls == {"linear": LINEARS, "attention": LAYERS}


def test_several_sequences_share_the_attention_and_keep_the_matrix_product(
    tiny_config: MistralLargeConfig, calls: Counter[str]
) -> None:
    decode_one(bf16_model(tiny_config), random_ids(tiny_config, 8, 9))
    assert calls == {"attention": LAYERS}


def test_processors_without_amx_keep_the_matrix_product(
    tiny_config: MistralLargeConfig, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_decode, "HAS_AMX", False)
    decode_one(bf16_model(tiny_config), random_ids(tiny_config, 1, 9))
    assert calls == {"attention": LAYERS}


def test_an_explicit_attention_is_kept(tiny_config: MistralLargeConfig, calls: Counter[str]) -> None:
    decode_one(bf16_model(tiny_config, "eager"), random_ids(tiny_config, 1, 9))
    assert calls == {"linear": LINEARS}


def prefill(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids)


def in_fp32(model: Any, ids: Tensor) -> None:
    decode_one(model.float(), ids)


def in_fp16(model: Any, ids: Tensor) -> None:
    decode_one(model.half(), ids)


def in_training(model: Any, ids: Tensor) -> None:
    decode_one(model.train(), ids)


def with_gradients(model: Any, ids: Tensor) -> None:
    past = model(ids[:, :-1]).past_key_values
    model(ids[:, -1:], past_key_values=past)


def under_autocast(model: Any, ids: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decode_one(model, ids)


@pytest.mark.parametrize("use", [prefill, in_fp32, in_fp16, in_training, with_gradients, under_autocast])
def test_everything_else_goes_the_plain_way(tiny_config: MistralLargeConfig, calls: Counter[str], use: Any) -> None:
    use(bf16_model(tiny_config), random_ids(tiny_config, 1, 9))
    assert not calls


class OtherWeight(Tensor):
    """As a weight that is spread over ranks or quantized: a tensor that computes its own products."""


def test_weights_that_are_more_than_a_parameter_are_left_to_torch(calls: Counter[str]) -> None:
    layer = cpu_decode.Linear(16, 8, bias=False).to(torch.bfloat16).eval()
    row = torch.randn(1, 1, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(row)
        assert calls.pop("linear") == 1
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OtherWeight))
        layer(row)
        biased = cpu_decode.Linear(16, 8).to(torch.bfloat16).eval()
        assert torch.equal(biased(row), nn.functional.linear(row, biased.weight, biased.bias))
    assert not calls


def test_other_devices_are_left_to_torch(calls: Counter[str]) -> None:
    layer = cpu_decode.Linear(16, 8, bias=False, dtype=torch.bfloat16, device="meta").eval()
    with torch.no_grad():
        layer(torch.empty(1, 1, 16, dtype=torch.bfloat16, device="meta"))
    assert not calls


def test_lora_layers_add_to_the_fast_products(tiny_config: MistralLargeConfig, calls: Counter[str]) -> None:
    model: Any = bf16_model(tiny_config)
    ids = random_ids(tiny_config, 1, 9)
    plain = decode_one(model, ids)
    calls.clear()
    adapted: Any = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    # A fresh adapter adds zeros.
    assert torch.equal(decode_one(adapted, ids), plain)
    assert calls == {"linear": LINEARS, "attention": LAYERS}


def test_layers_put_in_the_place_of_linear_ones_are_called_as_they_are(
    tiny_config: MistralLargeConfig, calls: Counter[str]
) -> None:
    model: Any = bf16_model(tiny_config)
    own = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = nn.Linear(own.in_features, own.out_features, bias=False, dtype=torch.bfloat16)
    decode_one(model, random_ids(tiny_config, 1, 9))
    assert calls["linear"] == LINEARS - 1


@pytest.mark.parametrize("option", ["cache", "is_causal", "position_bias", "softcap"])
def test_attention_with_options_is_left_to_transformers(tiny_config: MistralLargeConfig, option: str) -> None:
    attention = bf16_model(tiny_config).model.layers[0].self_attn
    query = torch.zeros(1, 6, 1, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert cpu_decode.takes_grouped_attention(attention, query, {"use_cache": True})
        assert not cpu_decode.takes_grouped_attention(attention, query, {option: None})


@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_path_is_turned_off_and_on_by_name(tiny_config: MistralLargeConfig, calls: Counter[str], path: str) -> None:
    model, ids = bf16_model(tiny_config), random_ids(tiny_config, 1, 9)
    turn_off(path)
    decode_one(model, ids)
    assert set(calls) == PATHS - {path}
    turn_on(path)
    decode_one(model, ids)
    assert set(calls) == PATHS


def test_with_all_paths_off_bf16_is_stock_mistral_bit_for_bit(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa", torch.bfloat16)
    ids = random_ids(tiny_config, 1, 33)
    turn_off(*PATHS)
    assert torch.equal(decode_one(ours, ids), decode_one(stock, ids))


@pytest.mark.parametrize("batch", [1, 8])
def test_fp32_is_stock_mistral_bit_for_bit(tiny_config: MistralLargeConfig, batch: int) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids = random_ids(tiny_config, batch, 33)
    assert torch.equal(decode_one(ours, ids), decode_one(stock, ids))
    prompt = ids[:, :9]
    assert torch.equal(ours.generate(prompt, **GREEDY), stock.generate(prompt, **GREEDY))


@pytest.mark.parametrize("names", [["matmul"], ["attention", "matmul"]])
def test_names_of_no_path_are_refused(names: list[str]) -> None:
    for function in (turn_off, turn_on):
        with pytest.raises(SettingError, match=f"{function.__name__}: {REFUSAL}"):
            function(*names)
    assert cpu_decode.switched_off() == set()


REFUSAL = "'matmul' is no fast path of decoding on the CPU; name one of attention, linear"


@pytest.mark.parametrize(
    ("value", "off"), [("", set()), ("linear", {"linear"}), ("attention, linear", {"attention", "linear"})]
)
def test_the_environment_turns_paths_off(monkeypatch: pytest.MonkeyPatch, value: str, off: set[str]) -> None:
    monkeypatch.setenv(cpu_decode.OFF_VARIABLE, value)
    assert cpu_decode.named_in_environment() == off


def test_the_environment_is_read_at_the_import(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import modeling_mistral_large"],
        env={**os.environ, cpu_decode.OFF_VARIABLE: "attention,matmul"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert f"SettingError: {cpu_decode.OFF_VARIABLE}: {REFUSAL}" in found.stderr


def exact_logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of the same bf16 weights, computed in fp32: how far bf16 is from them anyway is the tolerance."""
    wide: Any = MistralLargeForCausalLM._from_config(model.config, attn_implementation="eager", dtype=torch.float32)
    wide.load_state_dict(model.state_dict())
    logits: Tensor = wide.eval()(ids, attention_mask=mask).logits[:, -1].detach()
    return logits.double()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("paths", [["attention"], ["linear"], ["attention", "linear"]])
def test_logits_are_as_near_to_the_exact_ones_as_with_the_paths_off(
    tiny_config: MistralLargeConfig, paths: list[str]
) -> None:
    model, ids = bf16_model(tiny_config), random_ids(tiny_config, 1, 65)
    exact = exact_logits(model, ids)
    turn_off(*PATHS)
    plain = decode_one(model, ids)
    turn_on(*paths)
    fast = decode_one(model, ids)
    assert fast.dtype == torch.bfloat16
    assert error(fast, exact) <= 1.2 * error(plain, exact)
    assert error(fast, plain.double()) <= 2 * error(plain, exact)


@pytest.mark.parametrize("lengths", [[37, 12, 1], [8, 3, 8, 2, 5, 8, 1, 7]])
def test_padding_stays_hidden(tiny_config: MistralLargeConfig, lengths: list[int]) -> None:
    model = bf16_model(tiny_config)
    ids, mask = left_padded(tiny_config, lengths)
    ids, mask = (torch.cat((each, each[:, -1:]), dim=1) for each in (ids, mask))
    found = {}
    for fill in (0, 500):
        # What is padding has no influence, however it is filled.
        filled = ids.where(mask == 1, fill)
        with torch.no_grad():
            past = model(filled[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
            found[fill] = model(filled[:, -1:], attention_mask=mask, past_key_values=past).logits[:, -1]
    assert torch.equal(found[0], found[500])
    exact = exact_logits(model, ids, mask)
    turn_off(*PATHS)
    with torch.no_grad():
        past = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        plain = model(ids[:, -1:], attention_mask=mask, past_key_values=past).logits[:, -1]
    # A position that is seen though it is hidden makes an error of another order.
    assert error(found[0], exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_attention_is_each_head_with_its_own_mask(masked: bool) -> None:
    batch, heads, kv_heads, keys, head_dim = 2, 6, 2, 11, 32
    query = torch.randn(batch, heads, 1, head_dim, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, kv_heads, keys, head_dim, dtype=torch.bfloat16)
    mask = torch.rand(batch, heads, 1, keys) < 0.7 if masked else None
    found, weights = grouped_attention_forward(nn.Module(), query, key, value, mask, scaling=0.3)
    assert weights is None
    wide_key, wide_value = (each.double().repeat_interleave(heads // kv_heads, dim=1) for each in (key, value))
    scores = query.double() @ wide_key.transpose(2, 3) * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    exact = (scores.softmax(dim=-1) @ wide_value).transpose(1, 2)
    assert found.shape == exact.shape
    assert error(found, exact) < 5e-3


DECODINGS: dict[str, dict[str, Any]] = {
    "one sequence": {"batch": 1},
    "eight sequences": {"batch": 8},
    "static cache": {"batch": 1, "cache_implementation": "static", "disable_compile": True},
    "static cache of two": {"batch": 2, "cache_implementation": "static", "disable_compile": True},
    "beams": {"batch": 1, "num_beams": 3},
    "beams of two": {"batch": 2, "num_beams": 3},
}


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_demo_generates_the_same_tokens_with_the_paths_on_and_off(
    demo_folder: Path, calls: Counter[str], decoding: str
) -> None:
    options = dict(DECODINGS[decoding])
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="bfloat16")
    tokenizer: MistralLargeTokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    conversations = list(golden_conversations().values())[: options.pop("batch")]
    prompts = [tokenizer.apply_chat_template(item.messages, item.tools, return_dict=False) for item in conversations]
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, **options)
    assert calls["attention"]
    turn_off(*PATHS)
    calls.clear()
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False, **options), tokens)
    assert not calls


@pytest.mark.parametrize("off", [[], ["attention"], ["linear"], ["attention", "linear"]])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_demos_golden_answers_are_the_same(demo_folder: Path, off: list[str], batch: int) -> None:
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="bfloat16")
    tokenizer: MistralLargeTokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    turn_off(*off)
    conversations = list(golden_conversations().values())
    assert answers(model, tokenizer, conversations, batch) == expected(conversations)


def test_decoding_compiles_into_one_graph_and_again_when_a_path_is_turned_off(tiny_config: MistralLargeConfig) -> None:
    model, ids = bf16_model(tiny_config), random_ids(tiny_config, 1, 9)
    products: list[int] = []

    def counting_backend(graph: Any, _: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes]
        products.append(targets.count(torch.ops.mistral_large.matrix_vector.default))
        return graph.forward

    compiled: Any = torch.compile(model, fullgraph=True, backend=counting_backend)
    position = torch.tensor([[8]])
    for off, expected_products in ((set(), LINEARS), ({"linear"}, 0)):
        turn_off(*off)
        with torch.no_grad():
            past = StaticCache(tiny_config, max_cache_len=16)
            model(ids[:, :8], past_key_values=past)
            found = compiled(ids[:, 8:], past_key_values=past, position_ids=position).logits[:, -1]
        assert products.pop() == expected_products
        assert torch.equal(found, decode_one(model, ids, StaticCache(tiny_config, max_cache_len=16)))


def test_the_product_for_torch_compile_is_registered_as_torch_wants_it() -> None:
    weight, row = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    torch.library.opcheck(cpu_decode.matrix_vector, (weight, row))
    assert torch.equal(cpu_decode.matrix_vector(weight, row), torch.mv(weight, row))

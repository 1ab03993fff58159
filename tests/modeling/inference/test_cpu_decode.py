"""Faster products of a single token on the CPU: where they run, and what they change, which is bf16's rounding."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import StaticCache

from mistral_large_cli.demo import golden_conversations
from mistral_large_conversion.errors import SettingError
from modeling_mistral_large import (
    MistralLargeConfig,
    MistralLargeForCausalLM,
    MistralLargeTokenizer,
)
from modeling_mistral_large.inference import attention as attention_functions
from modeling_mistral_large.inference import cpu_decode
from modeling_mistral_large.inference.attention import sdpa_attention
from modeling_mistral_large.inference.cpu_decode import use_vector_products_
from modeling_mistral_large.transformers_api.keywords import cache_argument, cache_in
from tests.cli.test_demo import answers, expected
from tests.support.errors import raises_exactly
from tests.support.models import GREEDY, left_padded, ours_only, random_ids, stock_and_ours

LAYERS = 3
# Four projections of the attention and three of the feed-forward in each layer, and the head.
LINEARS = 7 * LAYERS + 1


@pytest.fixture(autouse=True)
def _amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor of the tests has none."""
    monkeypatch.setattr(cpu_decode, "HAS_AMX", True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each product's function is called."""
    counts: Counter[str] = Counter()
    product = torch.mv

    def counted_product(matrix: Tensor, vector: Tensor) -> Tensor:
        counts["linear"] += 1
        return product(matrix, vector)

    single_token_attention = attention_functions._single_token_attention

    def counted_attention(*arguments: Any) -> Tensor:
        counts["attention"] += 1
        return single_token_attention(*arguments)

    monkeypatch.setattr(torch, "mv", counted_product)
    monkeypatch.setattr(attention_functions, "_single_token_attention", counted_attention)
    return counts


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as transformers computes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_functions, "is_bf16_inference", lambda *_: False)
        yield


def bf16_model(config: MistralLargeConfig, attention: str = "sdpa") -> Any:
    return ours_only(config, attention).to(torch.bfloat16)


def vector_model(config: MistralLargeConfig, attention: str = "sdpa") -> Any:
    model = bf16_model(config, attention)
    use_vector_products_(model)
    return model


@torch.no_grad()
def decode_one(model: Any, ids: Tensor, past: Any = None, **options: Any) -> Tensor:
    """Logits of the last position [batch, vocabulary], computed after those before it are in the cache."""
    past = cache_in(model(ids[:, :-1], **cache_argument(past), use_cache=True))
    logits: Tensor = model(ids[:, -1:], **cache_argument(past), **options).logits[:, -1]
    return logits


def test_the_model_is_made_of_plain_linear_layers(tiny_config: MistralLargeConfig, calls: Counter[str]) -> None:
    model = bf16_model(tiny_config)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [type(layer) for layer in layers] == [nn.Linear] * LINEARS
    decode_one(model, random_ids(tiny_config, 1, 9))
    assert calls == {"attention": LAYERS}


def test_a_single_token_takes_both_products_in_every_layer_once_asked_to(
    tiny_config: MistralLargeConfig, calls: Counter[str]
) -> None:
    decode_one(vector_model(tiny_config), random_ids(tiny_config, 1, 9))
    assert calls == {"linear": LINEARS, "attention": LAYERS}


def test_several_sequences_share_the_attention_and_keep_the_matrix_product(
    tiny_config: MistralLargeConfig, calls: Counter[str]
) -> None:
    decode_one(vector_model(tiny_config), random_ids(tiny_config, 8, 9))
    assert calls == {"attention": LAYERS}


def test_processors_without_amx_refuse_vector_products(
    tiny_config: MistralLargeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_decode, "HAS_AMX", False)
    model = bf16_model(tiny_config)
    with raises_exactly(
        SettingError,
        "use_vector_products_: this processor has no AMX, without which torch's own product is as fast or faster; "
        "leave the call out",
    ):
        use_vector_products_(model)
    assert type(model.lm_head) is nn.Linear


def test_models_without_linear_layers_in_bf16_refuse_vector_products(tiny_config: MistralLargeConfig) -> None:
    with torch.device("meta"):
        elsewhere: Any = MistralLargeForCausalLM(tiny_config)
    elsewhere.to(torch.bfloat16)
    for model in (ours_only(tiny_config), elsewhere, nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16))):
        with raises_exactly(
            SettingError,
            "use_vector_products_: the model has no linear layer in bf16 on the CPU; load it with dtype='bfloat16' "
            "and without a quantization or device_map, or leave the call out",
        ):
            use_vector_products_(model)
        assert not any(isinstance(module, cpu_decode._VectorLinear) for module in model.modules())


def test_an_explicit_attention_is_kept(tiny_config: MistralLargeConfig, calls: Counter[str]) -> None:
    decode_one(vector_model(tiny_config, "eager"), random_ids(tiny_config, 1, 9))
    assert calls == {"linear": LINEARS}


def test_a_copy_of_the_model_has_its_own_weights_and_the_same_products(
    tiny_config: MistralLargeConfig, calls: Counter[str]
) -> None:
    model, ids = vector_model(tiny_config), random_ids(tiny_config, 1, 9)
    twin = copy.deepcopy(model)
    expected_logits = decode_one(model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls.clear()
    assert torch.equal(decode_one(twin, ids), expected_logits)
    assert calls == {"linear": LINEARS, "attention": LAYERS}


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
    past = cache_in(model(ids[:, :-1]))
    model(ids[:, -1:], **cache_argument(past))


def under_autocast(model: Any, ids: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decode_one(model, ids)


@pytest.mark.parametrize("use", [prefill, in_fp32, in_fp16, in_training, with_gradients, under_autocast])
def test_everything_else_goes_the_plain_way(tiny_config: MistralLargeConfig, calls: Counter[str], use: Any) -> None:
    use(vector_model(tiny_config), random_ids(tiny_config, 1, 9))
    assert not calls


class OtherWeight(Tensor):
    """As a weight that is spread over ranks or quantized: a tensor that computes its own products."""


def test_weights_that_are_more_than_a_parameter_are_left_to_torch(calls: Counter[str]) -> None:
    layer = nn.Linear(16, 8, bias=False, dtype=torch.bfloat16).eval()
    use_vector_products_(layer)
    row = torch.randn(1, 1, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(row)
        assert calls.pop("linear") == 1
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OtherWeight))
        layer(row)
    assert not calls


def test_other_devices_are_left_to_torch(calls: Counter[str]) -> None:
    layer = nn.Linear(16, 8, bias=False, dtype=torch.bfloat16).eval()
    use_vector_products_(layer)
    layer.to("meta")
    with torch.no_grad():
        layer(torch.empty(1, 1, 16, dtype=torch.bfloat16, device="meta"))
    assert not calls


def test_lora_layers_add_to_the_fast_products(tiny_config: MistralLargeConfig, calls: Counter[str]) -> None:
    model: Any = vector_model(tiny_config)
    ids = random_ids(tiny_config, 1, 9)
    plain = decode_one(model, ids)
    calls.clear()
    adapted: Any = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    # A fresh adapter adds zeros.
    assert torch.equal(decode_one(adapted, ids), plain)
    assert calls == {"linear": LINEARS, "attention": LAYERS}


def test_layers_put_in_the_place_of_linear_ones_are_called_unchanged(
    tiny_config: MistralLargeConfig, calls: Counter[str]
) -> None:
    model: Any = vector_model(tiny_config)
    own = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = nn.Linear(own.in_features, own.out_features, bias=False, dtype=torch.bfloat16)
    decode_one(model, random_ids(tiny_config, 1, 9))
    assert calls["linear"] == LINEARS - 1


@pytest.mark.parametrize("option", ["cache", "is_causal", "position_bias", "softcap"])
def test_attention_with_options_is_left_to_transformers(
    tiny_config: MistralLargeConfig, calls: Counter[str], option: str
) -> None:
    layer = bf16_model(tiny_config).model.layers[0].self_attn
    query = torch.zeros(1, 6, 1, 32, dtype=torch.bfloat16)
    key = torch.zeros(1, 2, 9, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        sdpa_attention(layer, query, key, key, None, layer.scaling, use_cache=True)
        assert calls == {"attention": 1}
        sdpa_attention(layer, query, key, key, None, layer.scaling, 0.0, **{option: None})
        assert calls == {"attention": 1}


def test_with_plain_attention_bf16_is_stock_mistral_bit_for_bit(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa", torch.bfloat16)
    ids = random_ids(tiny_config, 1, 33)
    with plain_attention():
        assert torch.equal(decode_one(ours, ids), decode_one(stock, ids))


@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_fp32_is_stock_mistral_bit_for_bit(tiny_config: MistralLargeConfig, batch: int) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids = random_ids(tiny_config, batch, 33)
    assert torch.equal(decode_one(ours, ids), decode_one(stock, ids))
    prompt = ids[:, :9]
    assert torch.equal(ours.generate(prompt, **GREEDY), stock.generate(prompt, **GREEDY))


def exact_logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of the same bf16 weights, computed in fp32: how far bf16 is from them anyway is the tolerance."""
    wide: Any = MistralLargeForCausalLM._from_config(model.config, attn_implementation="eager", dtype=torch.float32)
    wide.load_state_dict(model.state_dict())
    logits: Tensor = wide.eval()(ids, attention_mask=mask).logits[:, -1].detach()
    return logits.double()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "products",
    [
        pytest.param(["attention"], marks=pytest.mark.slow),
        pytest.param(["linear"], marks=pytest.mark.slow),
        ["attention", "linear"],
    ],
)
def test_logits_are_as_near_to_the_exact_ones_as_those_of_the_plain_products(
    tiny_config: MistralLargeConfig, products: list[str]
) -> None:
    model, ids = bf16_model(tiny_config), random_ids(tiny_config, 1, 65)
    exact = exact_logits(model, ids)
    with plain_attention():
        plain = decode_one(model, ids)
    if "linear" in products:
        use_vector_products_(model)
    with nullcontext() if "attention" in products else plain_attention():
        fast = decode_one(model, ids)
    assert fast.dtype == torch.bfloat16
    assert error(fast, exact) <= 1.2 * error(plain, exact)
    assert error(fast, plain.double()) <= 2 * error(plain, exact)


@torch.no_grad()
def padded_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    past = cache_in(model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True))
    logits: Tensor = model(ids[:, -1:], attention_mask=mask, **cache_argument(past)).logits[:, -1]
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[37, 12, 1], [8, 3, 8, 2, 5, 8, 1, 7]])
def test_padding_stays_hidden(tiny_config: MistralLargeConfig, lengths: list[int]) -> None:
    model = bf16_model(tiny_config)
    ids, mask = left_padded(tiny_config, lengths)
    ids, mask = (torch.cat((each, each[:, -1:]), dim=1) for each in (ids, mask))
    found = {}
    for fill in (0, 500):
        # What is padding has no influence, however it is filled.
        found[fill] = padded_logits(model, ids.where(mask == 1, fill), mask)
    assert torch.equal(found[0], found[500])
    exact = exact_logits(model, ids, mask)
    with plain_attention():
        plain = padded_logits(model, ids, mask)
    # A position that is seen though it is hidden makes an error of another order.
    assert error(found[0], exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_grouped_attention_is_each_head_with_its_own_mask(calls: Counter[str], masked: bool) -> None:
    batch, heads, kv_heads, keys, head_dim = 2, 6, 2, 11, 32
    query = torch.randn(batch, heads, 1, head_dim, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, kv_heads, keys, head_dim, dtype=torch.bfloat16)
    mask = torch.rand(batch, heads, 1, keys) < 0.7 if masked else None
    found, weights = sdpa_attention(nn.Module().eval(), query, key, value, mask, scaling=0.3)
    assert weights is None
    assert calls == {"attention": 1}
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


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Any:
    """Tests that change it take a copy."""
    return MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="bfloat16")


@pytest.fixture(scope="module")
def demo_tokenizer(demo_folder: Path) -> MistralLargeTokenizer:
    found: MistralLargeTokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_demo_generates_the_same_tokens_with_and_without_the_fast_products(
    demo: Any, demo_tokenizer: MistralLargeTokenizer, calls: Counter[str], decoding: str
) -> None:
    options = dict(DECODINGS[decoding])
    model = copy.deepcopy(demo)
    conversations = list(golden_conversations().values())[: options.pop("batch")]
    prompts = [
        demo_tokenizer.apply_chat_template(item.messages, item.tools, return_dict=False) for item in conversations
    ]
    inputs = demo_tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with plain_attention():
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, **options)
    assert not calls
    use_vector_products_(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False, **options), tokens)
    assert calls["attention"]


@pytest.mark.slow
@pytest.mark.parametrize("products", [[], ["attention"], ["linear"], ["attention", "linear"]])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_demos_golden_answers_are_the_same(
    demo: Any, demo_tokenizer: MistralLargeTokenizer, products: list[str], batch: int
) -> None:
    model = copy.deepcopy(demo)
    if "linear" in products:
        use_vector_products_(model)
    # All of them by both, one by one; `tests/cli/test_demo.py` has all by the one that is used without being asked for,
    # in a batch too.
    conversations = list(golden_conversations().values())[:: 1 if (len(products), batch) == (2, 1) else 3]
    with nullcontext() if "attention" in products else plain_attention():
        assert answers(model, demo_tokenizer, conversations, batch) == expected(conversations)


@pytest.mark.slow
@pytest.mark.parametrize("has_vectors", [False, True])
def test_decoding_compiles_into_one_graph(tiny_config: MistralLargeConfig, has_vectors: bool) -> None:
    model, ids = (vector_model if has_vectors else bf16_model)(tiny_config), random_ids(tiny_config, 1, 9)
    products: list[int] = []

    def counting_backend(graph: Any, _: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes]
        products.append(targets.count(torch.ops.mistral_large.matrix_vector.default))
        return graph.forward

    compiled: Any = torch.compile(model, fullgraph=True, backend=counting_backend)
    with torch.no_grad():
        past = StaticCache(tiny_config, max_cache_len=16)
        model(ids[:, :8], **cache_argument(past))
        found = compiled(ids[:, 8:], **cache_argument(past), position_ids=torch.tensor([[8]])).logits[:, -1]
    assert products == [LINEARS if has_vectors else 0]
    assert torch.equal(found, decode_one(model, ids, StaticCache(tiny_config, max_cache_len=16)))


@pytest.mark.slow
def test_the_product_for_torch_compile_is_registered_as_torch_wants_it() -> None:
    weight, row = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    torch.library.opcheck(cpu_decode.matrix_vector, (weight, row))
    assert torch.equal(cpu_decode.matrix_vector(weight, row), torch.mv(weight, row))

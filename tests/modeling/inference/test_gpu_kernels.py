"""The kernels of a recorded step against float64, and recorded steps against the model.

They run on a GPU where there is one; elsewhere in Triton's interpreter, as `.ci/kernels` does.
"""

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mistral_large_conversion.checkpoint.quantization import Scheme
from mistral_large_conversion.errors import SettingError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.modeling_mistral_large import rotate
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear, QuantizedLinear
from modeling_mistral_large.quantization.loading import quantize_modules_, use_kernels_
from tests.support.gpu_products import KINDS, placed, random_weights, relative_error
from tests.support.models import left_padded, random_ids

pytest.importorskip("triton", reason="the kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU", allow_module_level=True)

from modeling_mistral_large.generation.recorded_steps import RecordedDecoding, record_decoding
from modeling_mistral_large.inference import gpu_kernels

DEVICE = "cpu" if INTERPRETED else "cuda"
# Sums of FP32; tensor cores add up with a few bits less.
EXACT = 1e-6 if INTERPRETED else 1e-4
# Results of BF16, to which the interpreter does not round to nearest.
ROUNDED = 1e-2 if INTERPRETED else 4e-3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("m", [1, 2, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "group"), [((40,), 1152, 128), ((70, 33, 5), 320, 64)])
def test_products(kind: str, m: int, rows: tuple[int, ...], columns: int, group: int) -> None:
    """One to three matrices, rows and columns that fill no block, any number of splits."""
    weights, dense = random_weights(kind, rows, columns, DEVICE, group)
    x = torch.randn(m, columns, device=DEVICE).bfloat16()
    for splits in (1, 3):
        part = torch.full((splits, m, sum(rows)), math.nan, device=DEVICE)
        assert gpu_kernels.multiply(placed(x, weights.group), weights, part, splits=splits) == splits
        assert relative_error(part.sum(0), x.double() @ dense.T) < EXACT


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8_bits"])
def test_a_single_row_as_a_matrix(kind: str) -> None:
    weights, dense = random_weights(kind, (40, 24), 320, DEVICE)
    x = torch.randn(1, 320, device=DEVICE).bfloat16()
    part = torch.full((1, 1, 64), math.nan, device=DEVICE)
    gpu_kernels.multiply(x, weights, part, tile=gpu_kernels.DOT_TILE[kind], splits=1)
    assert relative_error(part[0], x.double() @ dense.T) < EXACT


def test_every_fp8_code_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes = codes[~codes.view(torch.float8_e4m3fn).float().isnan()]
    one = torch.ones(1, 16, device=DEVICE).bfloat16()
    expected = codes.view(torch.float8_e4m3fn).float()
    # A code in the first of 16 columns.
    matrix = torch.zeros(len(codes), 16, dtype=torch.uint8, device=DEVICE)
    matrix[:, 0] = codes
    scales = torch.ones(len(codes), 1, device=DEVICE)
    for kind, weight in (("fp8", matrix.view(torch.float8_e4m3fn)), ("fp8_bits", matrix)):
        weights = gpu_kernels.Weights(kind, 16, 0, (weight,), (scales,))
        for tile in (gpu_kernels.VECTOR_TILE[kind], gpu_kernels.DOT_TILE[kind]):
            part = torch.full((len(codes),), math.nan, device=DEVICE)
            gpu_kernels.multiply(one, weights, part, tile=tile, splits=1)
            assert torch.equal(part, expected)


def test_every_int4_code_is_at_its_column() -> None:
    """A product with each unit vector gives each column; codes and scales are all different."""
    columns = 128
    weights, dense = random_weights("int4", (16,), columns, DEVICE, 64)
    for start in range(0, columns, 16):
        units = torch.eye(columns, device=DEVICE).bfloat16()[start : start + 16]
        part = torch.full((16, 16), math.nan, device=DEVICE)
        gpu_kernels.multiply(placed(units, 64), weights, part, splits=1)
        assert torch.equal(part.double(), dense.T[start : start + 16])


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("splits", [0, 1, 3])
def test_add_and_norm(group: int, splits: int) -> None:
    m, columns = 3, 320
    stream, gain = (torch.randn(*shape, device=DEVICE).bfloat16() for shape in ((m, columns), (columns,)))
    part = torch.randn(max(splits, 1), m, columns, device=DEVICE)
    expected = (stream + part.sum(0).bfloat16()) if splits else stream.clone()
    y = torch.full_like(stream, math.nan)
    gpu_kernels.norm(stream, part, splits, gain, 1e-5, y, group)
    assert relative_error(stream, expected) < ROUNDED
    wide = stream.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * gain.double()
    assert relative_error(y, placed(normed, group)) < ROUNDED


@pytest.mark.parametrize("group", [0, 64])
def test_silu_and_multiply(group: int) -> None:
    m, columns, splits = 2, 1088, 2
    part = torch.randn(splits, m, 2 * columns, device=DEVICE)
    y = torch.full((m, columns), math.nan, device=DEVICE).bfloat16()
    gpu_kernels.gate(part, splits, y, group)
    gate, up = part.double().sum(0).chunk(2, dim=-1)
    assert relative_error(y, placed(nn.functional.silu(gate) * up, group)) < ROUNDED


def test_rotate_and_store() -> None:
    m, heads, kv_heads, head_dim, room, splits, length = 3, 6, 2, 32, 50, 2, 37
    starts = torch.tensor([0, 5, 37], dtype=torch.int32, device=DEVICE)
    part = torch.randn(splits, m, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    angles = torch.randn(room, head_dim // 2, device=DEVICE).repeat(1, 2)
    tables = (angles.cos().bfloat16(), angles.sin().bfloat16())
    query = torch.full((m, heads, head_dim), math.nan, device=DEVICE).bfloat16()
    keys, values = (torch.full((m, kv_heads, room, head_dim), 7.0, device=DEVICE).bfloat16() for _ in range(2))
    at = (torch.tensor([length], dtype=torch.int32, device=DEVICE), starts)
    gpu_kernels.rotate(part, splits, query, keys, values, tables, at)
    states = part.double().sum(0).view(m, heads + 2 * kv_heads, head_dim)
    cos, sin = (table.double()[length - starts.long()][:, None] for table in tables)
    turned = rotate(states[:, :-kv_heads], cos, sin)
    assert relative_error(query, turned[:, :heads]) < ROUNDED
    assert relative_error(keys[:, :, length], turned[:, heads:]) < ROUNDED
    assert relative_error(values[:, :, length], states[:, -kv_heads:]) < ROUNDED
    untouched = [slot for slot in range(room) if slot != length]
    assert bool((keys[:, :, untouched] == 7).all())
    assert bool((values[:, :, untouched] == 7).all())


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "group", "filled"),
    [(24, 2, 128, 0, 0), (24, 2, 128, 0, 299), (12, 1, 128, 64, 63), (6, 2, 32, 64, 64)],
)
def test_attention_reads_what_is_filled(
    splits: int, heads: int, kv_heads: int, head_dim: int, group: int, filled: int
) -> None:
    """Padding and slots that are not filled are NaN: nobody may look at them."""
    room, starts = 320, [0, filled // 3, filled]
    m = len(starts)
    query = torch.randn(m, heads, head_dim, device=DEVICE).bfloat16()
    keys, values = (torch.randn(m, kv_heads, room, head_dim, device=DEVICE).bfloat16() for _ in range(2))
    for tensor in (keys, values):
        tensor[:, :, filled + 1 :] = math.nan
        for row, start in enumerate(starts):
            tensor[row, :, :start] = math.nan
    at = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([filled], starts)]
    parts = torch.full((m, heads, splits, head_dim), math.nan, device=DEVICE)
    stats = torch.full((m, heads, splits, 2), math.nan, device=DEVICE)
    y = torch.full((m, heads * head_dim), math.nan, device=DEVICE).bfloat16()
    gpu_kernels.attend(query, keys, values, at, head_dim**-0.5, parts, stats, y, group)
    for row, start in enumerate(starts):
        seen = slice(start, filled + 1)
        expected = nn.functional.scaled_dot_product_attention(
            query[row, :, None].double(), keys[row, :, seen].double(), values[row, :, seen].double(), enable_gqa=True
        )
        assert relative_error(y[row : row + 1], placed(expected.reshape(1, -1), group)) < ROUNDED


CONFIG = MistralLargeConfig(
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_hidden_layers=2,
    vocab_size=400,
    max_position_embeddings=512,
)


def random_model(weights: str, config: MistralLargeConfig = CONFIG) -> Any:
    """A model in BF16, or with quantized layers, with random weights and norms."""
    model: Any = MistralLargeForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    if weights != "bf16":
        quantization: Scheme = "fp8" if weights == "fp8" else "int4"
        quantize_modules_(model, quantization, 64)
        for module in model.modules():
            if isinstance(module, Fp8Linear):
                module.weight.copy_(torch.randn(module.weight.shape))
                module.weight_scale.copy_(torch.rand(module.weight_scale.shape) * 0.2 + 0.05)
            elif isinstance(module, Int4Linear):
                module.weight_packed.random_(-(2**31), 2**31 - 1)
                module.weight_scale.copy_(torch.rand(module.weight_scale.shape) * 0.05 + 0.01)
    use_kernels_(model)
    return model.to(DEVICE).eval()


def dense_model(model: Any) -> Any:
    """The same weights in float32, dequantized."""
    dense: Any = MistralLargeForCausalLM._from_config(model.config, dtype=torch.float32, attn_implementation="eager")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(("_packed", "_scale"))}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = torch.cat(list(module.dequantized_rows(torch.float32)))
            state[f"{name}.weight"] = weight * module.weight_scale if isinstance(module, Fp8Linear) else weight
    dense.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return dense.to(DEVICE).eval()


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and larger programs: the interpreter runs one after another."""
    if INTERPRETED:
        for tiles in (gpu_kernels.VECTOR_TILE, gpu_kernels.DOT_TILE):
            for kind, tile in tiles.items():
                monkeypatch.setitem(tiles, kind, replace(tile, rows=256))
        monkeypatch.setattr("modeling_mistral_large.generation.recorded_steps.LEAST_SPLITS", 2)


@torch.no_grad()
def check_steps(decoding: RecordedDecoding, dense: Any, output: Tensor, mask: Tensor, prompt: int) -> None:
    """The last logits are those of the same text in float32, and each token is nearly the most likely one there."""
    mask = torch.cat((mask, torch.ones(len(mask), output.shape[1] - prompt, dtype=mask.dtype)), dim=-1).to(DEVICE)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = dense(output.to(DEVICE), attention_mask=mask, position_ids=positions).logits[:, prompt - 1 : -1]
    # The model rounds the prompt's activations to FP8 where the weights are.
    assert relative_error(decoding.logits, logits[:, -1]) < (0.06 if decoding.layers[0].qkv.kind == "fp8" else 0.03)
    chosen = logits.gather(-1, output[:, prompt:, None].to(DEVICE))[..., 0]
    assert float((logits.amax(-1) - chosen).max()) < 0.05 * float(logits.std())


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("weights", ["bf16", "fp8", "int4"])
def test_recorded_steps_are_those_of_the_model(weights: str) -> None:
    """One sequence, then another prompt of another length in the same recording."""
    model = random_model(weights)
    dense = dense_model(model)
    decoding = record_decoding(model, context_length=40)
    for length in (20, 9):
        ids = random_ids(CONFIG, 1, length)
        output = decoding.generate(ids, max_new_tokens=3, eos_token_id=[])
        assert torch.equal(output[:, :length], ids)
        check_steps(decoding, dense, output, torch.ones_like(ids), length)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_a_padded_batch(weights: str) -> None:
    model = random_model(weights)
    decoding = record_decoding(model, context_length=40, batch=3)
    ids, mask = left_padded(CONFIG, [11, 20, 1])
    output = decoding.generate(ids, mask, max_new_tokens=3, eos_token_id=[])
    check_steps(decoding, dense_model(model), output, mask, 20)


@pytest.mark.usefixtures("large_tiles")
def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_mistral_large.generation.recorded_steps.PREFILL_CHUNK", 8)
    model = random_model("bf16")
    decoding = record_decoding(model, context_length=40, batch=2)
    ids, mask = left_padded(CONFIG, [19, 13])
    output = decoding.generate(ids, mask, max_new_tokens=3, eos_token_id=[])
    check_steps(decoding, dense_model(model), output, mask, 19)


@pytest.mark.usefixtures("large_tiles")
def test_completions_end_where_they_should() -> None:
    """Each row on its own, and the rest of it is padding; the cache may be filled to its last slot."""
    model = random_model("bf16")
    model.generation_config.pad_token_id = 384
    decoding = record_decoding(model, context_length=12, batch=2)
    ids = random_ids(CONFIG, 2, 8)
    free = decoding.generate(ids, max_new_tokens=5, eos_token_id=[])
    assert free.shape == (2, 13)
    first, second = free[:, 8:].tolist()
    # One row ends with its first token, the other one later, but before the last.
    ends = {first[0], second[2]}
    completions = []
    for row in (first, second):
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        completions.append(row[:end])
    longest = max(map(len, completions))
    assert min(map(len, completions)) < longest < 5
    padded = [row + [384] * (longest - len(row)) for row in completions]
    ended = decoding.generate(ids, max_new_tokens=5, eos_token_id=sorted(ends))
    assert ended[:, 8:].tolist() == padded
    # The step that was launched too far does no harm.
    assert torch.equal(decoding.generate(ids, max_new_tokens=5, eos_token_id=[]), free)


@pytest.mark.usefixtures("large_tiles")
def test_samples_are_drawn_as_the_logits_say() -> None:
    model = random_model("bf16")
    decoding = record_decoding(model, context_length=40)
    ids = random_ids(CONFIG, 1, 8)
    greedy = decoding.generate(ids, max_new_tokens=3, eos_token_id=[])
    settings: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": [], "do_sample": True}

    def sampled(**options: Any) -> Tensor:
        return decoding.generate(ids, generator=torch.Generator(DEVICE).manual_seed(7), **settings, **options)

    assert torch.equal(sampled(top_k=1), greedy)
    assert torch.equal(sampled(top_p=1e-6), greedy)
    assert torch.equal(sampled(temperature=1e-4), greedy)
    assert torch.equal(sampled(), sampled())
    assert not torch.equal(sampled(temperature=5.0), greedy)


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("bf16")
    for batch in (0, 17):
        with pytest.raises(SettingError, match="1 to 16 sequences"):
            record_decoding(model, 32, batch)
    for context in (0, 513):
        with pytest.raises(SettingError, match="must be 1 to 512"):
            record_decoding(model, context)
    with pytest.raises(SettingError, match="training mode"):
        record_decoding(model.train(), 32)
    model.eval()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(SettingError, match=r"layers\.1\.mlp has hooks"):
        record_decoding(model, 32)
    handle.remove()
    with pytest.raises(SettingError, match="float32"):
        record_decoding(dense_model(model), 32)
    with pytest.raises(SettingError, match="not MistralLargeForCausalLM"):
        record_decoding(model.model, 32)
    model.lm_head = nn.Linear(128, 400, bias=True, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(SettingError, match="lm_head is Linear"):
        record_decoding(model.eval(), 32)
    grouped = random_model("int4")
    grouped.model.layers[0].mlp.up_proj.group_size = 32
    with pytest.raises(SettingError, match="groups of 32"):
        record_decoding(grouped, 32)
    if INTERPRETED:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(SettingError, match="lies on the CPU"):
            record_decoding(random_model("bf16"), 32)


def test_requests_that_do_not_fit_the_recording_are_refused() -> None:
    decoding = record_decoding(random_model("bf16"), context_length=12, batch=2)
    ids = random_ids(CONFIG, 2, 8)
    with pytest.raises(SettingError, match="context of 12"):
        decoding.generate(ids, max_new_tokens=6)
    with pytest.raises(SettingError, match="context of 12"):
        decoding.generate(ids, max_new_tokens=0)
    with pytest.raises(SettingError, match="recorded for 2 sequences"):
        decoding.generate(ids[:1], max_new_tokens=2)
    with pytest.raises(SettingError, match="padded on its left only"):
        decoding.generate(ids, torch.tensor([[1] * 8, [1] * 7 + [0]]), max_new_tokens=2)
    with pytest.raises(SettingError, match="padded on its left only"):
        decoding.generate(ids, torch.tensor([[1] * 8, [0, 1, 0] + [1] * 5]), max_new_tokens=2)
    with pytest.raises(SettingError, match="not be empty"):
        decoding.generate(ids, torch.tensor([[1] * 8, [0] * 8]), max_new_tokens=2)
    with pytest.raises(SettingError, match="do_sample=True"):
        decoding.generate(ids, max_new_tokens=2, temperature=0.5)

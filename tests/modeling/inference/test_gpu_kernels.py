"""The kernels of a recorded step against float64, and recorded steps against the model.

They run on a GPU where there is one; elsewhere in Triton's interpreter, as `.ci/kernels` does.
"""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mistral_large_conversion.errors import SettingError
from modeling_mistral_large.inference.kv_cache import Fp8Cache, pack
from modeling_mistral_large.inference.static_cache import Fp8States
from modeling_mistral_large.modeling_mistral_large import rotate
from modeling_mistral_large.quantization import gpu_int4
from modeling_mistral_large.quantization.linear import (
    Int4Linear,
    kernel_layout,
    round_to_fp8,
)
from tests.support.devices import use_large_tiles
from tests.support.gpu_models import CONFIG, dense_model, random_model
from tests.support.gpu_products import KINDS, placed, random_weights, relative_error
from tests.support.models import PAD, left_padded, random_ids

pytest.importorskip("triton", reason="the kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU", allow_module_level=True)

from modeling_mistral_large.generation import RecordedCache, record_decoding, release_recording
from modeling_mistral_large.inference import gpu_kernels
from modeling_mistral_large.recorded_steps import automatic
from modeling_mistral_large.recorded_steps.decoding import RecordedDecoding
from modeling_mistral_large.transformers_api.keywords import cache_argument

DEVICE = "cpu" if INTERPRETED else "cuda"
# Without a GPU the interpreter runs the same tests.
pytestmark = [] if INTERPRETED else [pytest.mark.cuda]
# Sums of FP32; tensor cores add up with a few bits less.
EXACT = 1e-6 if INTERPRETED else 1e-4
# Results of BF16.
ROUNDED = 4e-3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


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
        assert relative_error(part.sum(0), as_read(x, weights) @ dense.T) < EXACT


@pytest.mark.parametrize("m", [1, 8, 9])
@pytest.mark.parametrize("columns", [64, 128, 256, 512])
def test_int4_takes_several_groups_at_a_time(columns: int, m: int) -> None:
    """As many as divide a row, with room for 8 or 16 rows of activations."""
    weights, dense = random_weights("int4", (40,), 512, DEVICE, 64)
    x = torch.randn(m, 512, device=DEVICE).bfloat16()
    tile = gpu_kernels.Tile(64, columns, inputs=8)
    for splits in (1, 3):
        part = torch.full((splits, m, 40), math.nan, device=DEVICE)
        gpu_kernels.multiply(placed(x, 64), weights, part, tile=tile, splits=splits)
        assert relative_error(part.sum(0), x.double() @ dense.T) < EXACT


@pytest.mark.parametrize(
    ("capability", "is_small"), [((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False)]
)
def test_older_gpus_have_a_smaller_int4_tile(
    capability: tuple[int, int], is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    expected = gpu_kernels.SMALL_INT4_TILE if is_small else gpu_kernels.DOT_TILE["int4"]
    assert gpu_kernels.int4_tile(torch.device("cuda")) == expected


def as_read(x: Tensor, weights: Any) -> Tensor:
    """Activations [m, columns] in float64 as a product with weights takes them: FP8 with FP8, W8A8."""
    if not weights.takes_fp8:
        return x.double()
    codes, scales = round_to_fp8(x)
    return codes.double() * scales.double()


@pytest.mark.parametrize("columns", [320, 1000])
def test_activations_are_rounded_as_the_layers_round_them(columns: int) -> None:
    """Bit for bit, by the kernel of its own and by that of norms, zeros and the smallest numbers among them."""
    x = torch.randn(5, columns, device=DEVICE).bfloat16() * torch.logspace(-30, 3, 5, device=DEVICE).bfloat16()[:, None]
    x[1] = 0
    x[2, ::3] *= 1e-4
    codes, scales = round_to_fp8(x)
    found, found_scales = gpu_kernels.rounded(x)
    assert torch.equal(found, codes.bfloat16())
    assert torch.equal(found_scales, scales[:, 0])
    y, normed, gain = torch.empty_like(x), torch.empty_like(x), torch.ones(columns, device=DEVICE).bfloat16()
    gpu_kernels.norm(x.clone(), x, 0, gain, 1e-5, normed, 0)
    gpu_kernels.norm(x.clone(), x, 0, gain, 1e-5, y, 0, found_scales.fill_(math.nan))
    codes, scales = round_to_fp8(normed)
    assert torch.equal(y, codes.bfloat16())
    assert torch.equal(found_scales, scales[:, 0])


@pytest.mark.parametrize("columns", [64, 320, 1152])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("rows", [1, 70])
def test_dequantized_int4_is_what_the_layer_dequantizes(rows: int, group: int, columns: int) -> None:
    """Bit for bit, of any rows and columns."""
    layer = Int4Linear(columns, rows, group_size=group, device=DEVICE)
    layer.weight_packed.random_(-(2**31), 2**31 - 1)
    layer.weight_scale.copy_(torch.rand_like(layer.weight_scale, dtype=torch.float32) * 0.1)
    expected = torch.cat(list(layer.cpu().dequantized_rows(torch.bfloat16)))
    found = gpu_kernels.dequantized_int4(layer.weight_packed.to(DEVICE), layer.weight_scale.to(DEVICE))
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
@pytest.mark.parametrize("group", [32, 64])
def test_int4_layers_multiply_by_these_kernels(tokens: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and many, one rule for activations; the weights stay in the layout of the checkpoint."""
    monkeypatch.setattr("modeling_mistral_large.quantization.gpu_int4.has_int4_kernels", lambda device: True)
    kernel_layout.cache_clear()
    layer = Int4Linear(192, 50, group_size=group, device=DEVICE)
    layer.weight_packed.random_(-(2**31), 2**31 - 1)
    layer.weight_scale.copy_(torch.rand_like(layer.weight_scale, dtype=torch.float32) * 0.1)
    packed = layer.weight_packed.clone()
    layer.after_loading_()
    assert torch.equal(layer.weight_packed, packed)
    calls: list[str] = []

    def noted(name: str, operator: Any) -> Any:
        def run(*given: Tensor) -> Any:
            calls.append(name)
            return operator(*given)

        return run

    for name in ("dequantize_int4", "int4_product"):
        monkeypatch.setattr(gpu_int4, name, noted(name, getattr(gpu_int4, name)))
    x = torch.randn(tokens, 192, device=DEVICE).bfloat16()[None]
    y = layer(x)
    assert calls == ["int4_product" if tokens <= 16 and group == 64 else "dequantize_int4"]
    calls.clear()
    assert layer(x.float()).dtype == torch.float32
    assert calls == []
    dense = torch.cat(list(layer.dequantized_rows(torch.float32))).double()
    assert y.shape == (*x.shape[:-1], 50)
    assert relative_error(y, x.double() @ dense.T) < ROUNDED
    kernel_layout.cache_clear()


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8_bits"])
def test_a_single_row_as_a_matrix(kind: str) -> None:
    weights, dense = random_weights(kind, (40, 24), 320, DEVICE)
    x = torch.randn(1, 320, device=DEVICE).bfloat16()
    part = torch.full((1, 1, 64), math.nan, device=DEVICE)
    gpu_kernels.multiply(x, weights, part, tile=gpu_kernels.DOT_TILE[kind], splits=1)
    assert relative_error(part[0], as_read(x, weights) @ dense.T) < EXACT


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
            gpu_kernels.multiply(one, weights, part, torch.ones(1, device=DEVICE), tile=tile, splits=1)
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


@pytest.mark.parametrize("queries", [1, 2])
def test_rotate_and_store(queries: int) -> None:
    """Every row at a length of its own; with several queries, rows in turn belong to one sequence.

    An FP8 cache gets the bytes that `Fp8Cache` makes of what a BF16 cache gets.
    """
    sequences, heads, kv_heads, head_dim, room, splits = 3, 6, 2, 32, 50, 2
    m = sequences * queries
    ends, begins = [37, 5, 48], [0, 5, 37]
    lengths = int32([end + query for end in ends for query in range(queries)])
    starts = int32([begin for begin in begins for _ in range(queries)])
    part = torch.randn(splits, m, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    angles = torch.randn(room, head_dim // 2, device=DEVICE).repeat(1, 2)
    tables = (angles.cos().bfloat16(), angles.sin().bfloat16())
    query = torch.full((m, heads, head_dim), math.nan, device=DEVICE).bfloat16()
    keys, values = (torch.full((sequences, kv_heads, room, head_dim), 7.0, device=DEVICE).bfloat16() for _ in range(2))
    gpu_kernels.rotate(part, splits, query, keys, values, tables, (lengths, starts))
    states = part.double().sum(0).view(m, heads + 2 * kv_heads, head_dim)
    cos, sin = (table.double()[(lengths - starts).long()][:, None] for table in tables)
    turned = rotate(states[:, :-kv_heads], cos, sin)
    assert relative_error(query, turned[:, :heads]) < ROUNDED
    sequence = torch.arange(m, device=DEVICE) // queries
    assert relative_error(keys[sequence, :, lengths.long()], turned[:, heads:]) < ROUNDED
    assert relative_error(values[sequence, :, lengths.long()], states[:, -kv_heads:]) < ROUNDED
    fp8_keys, fp8_values = (fp8_states(tensor * 0) for tensor in (keys, values))
    part[:, 0] = 0
    gpu_kernels.rotate(part, splits, query, keys, values, tables, (lengths, starts))
    gpu_kernels.rotate(part, splits, torch.empty_like(query), fp8_keys, fp8_values, tables, (lengths, starts))
    for tensor, states in ((keys, fp8_keys), (values, fp8_values)):
        slots = (sequence, slice(None), lengths.long())
        expected = fp8_states(tensor)
        assert not bool(expected.codes[slots][0].float().any())
        assert torch.equal(states.codes[slots].view(torch.uint8), expected.codes[slots].view(torch.uint8))
        assert torch.equal(states.scales[slots], expected.scales[slots])
        tensor[slots] = 7.0
        assert bool((tensor == 7).all())
        untouched = fp8_states(tensor * 0)
        states.codes.view(torch.uint8)[slots], states.scales[slots] = 0, untouched.scales[0, 0, 0]
        assert torch.equal(states.codes.view(torch.uint8), untouched.codes.view(torch.uint8))
        assert torch.equal(states.scales, untouched.scales)


def fp8_states(states: Tensor) -> Any:
    """What `Fp8Cache` keeps, codes and scales apart."""
    packed = pack(states)
    codes, scales = packed[..., :-2].contiguous(), packed[..., -2:].contiguous()
    return Fp8States(codes.view(torch.float8_e4m3fn), scales.view(torch.bfloat16)[..., 0])


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "group", "filled"),
    [(24, 2, 128, 0, 0), (24, 2, 128, 0, 299), (12, 1, 128, 64, 63), (6, 2, 32, 64, 64)],
)
def test_attention_reads_what_is_filled(
    splits: int, heads: int, kv_heads: int, head_dim: int, group: int, filled: int
) -> None:
    """Padding and slots that are not filled are NaN: nobody may look at them."""
    spans = [(0, filled), (filled // 3, filled), (filled, filled), (filled // 2, filled // 2 + filled // 3)]
    check_attention(heads, kv_heads, head_dim, group, splits, spans, queries=1)


@pytest.mark.parametrize("cache", ["bf16", "fp8", "fp8 bits"])
@pytest.mark.parametrize("splits", [1, 4])
def test_attention_of_several_tokens_of_a_sequence(splits: int, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cache == "fp8 bits":
        monkeypatch.setattr(gpu_kernels, "has_fp8_type", lambda device: False)
    spans = [(0, 70), (0, 71), (0, 72), (9, 20), (9, 21), (9, 22)]
    check_attention(12, 2, 32, 0, splits, spans, queries=3, is_fp8=cache != "bf16")


def check_attention(
    heads: int, kv_heads: int, head_dim: int, group: int, splits: int, spans: list[tuple[int, int]], queries: int,
    *, is_fp8: bool = False,
) -> None:  # fmt: skip
    """First and last slot that each row sees; all that no row of a sequence sees is NaN."""
    room, m = 320, len(spans)
    query = torch.randn(m, heads, head_dim, device=DEVICE).bfloat16()
    keys, values = (torch.randn(m // queries, kv_heads, room, head_dim, device=DEVICE).bfloat16() for _ in range(2))
    given: list[Any] = [keys, values]
    if is_fp8:
        given = [fp8_states(states) for states in given]
        keys, values = (states.codes.float() * states.scales.float()[..., None] for states in given)
    for tensor in [scales for _, scales in given] if is_fp8 else given:
        for row in range(0, m, queries):
            tensor[row // queries, :, : spans[row][0]] = math.nan
            tensor[row // queries, :, spans[row + queries - 1][1] + 1 :] = math.nan
    at = (int32([last for _, last in spans]), int32([first for first, _ in spans]))
    parts = torch.full((m, heads, splits, head_dim), math.nan, device=DEVICE)
    stats = torch.full((m, heads, splits, 2), math.nan, device=DEVICE)
    y = torch.full((m, heads * head_dim), math.nan, device=DEVICE).bfloat16()
    gpu_kernels.attend(query, given[0], given[1], at, head_dim**-0.5, parts, stats, y, group)
    for row, (first, last) in enumerate(spans):
        key, value = (tensor[row // queries, :, first : last + 1].double() for tensor in (keys, values))
        expected = nn.functional.scaled_dot_product_attention(query[row, :, None].double(), key, value, enable_gqa=True)
        assert relative_error(y[row : row + 1], placed(expected.reshape(1, -1), group)) < ROUNDED


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        use_large_tiles(monkeypatch)


@torch.no_grad()
def check_steps(decoding: RecordedDecoding, model: Any, dense: Any, output: Tensor, mask: Tensor, prompt: int) -> None:
    """The last logits are those of the model's own forward, and nearly those in float32, as is each chosen token."""
    mask = torch.cat((mask, torch.ones(len(mask), output.shape[1] - prompt, dtype=mask.dtype)), dim=-1).to(DEVICE)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = decoding.logits[: decoding.batch]
    logits = dense(output.to(DEVICE), attention_mask=mask, position_ids=positions).logits[:, prompt - 1 : -1]
    is_fp8, has_fp8_cache = decoding.layers[0].qkv.takes_fp8, decoding.cache_dtype == "fp8"
    # What both round to FP8 is different now and then.
    assert relative_error(found, logits[:, -1]) < (0.06 if is_fp8 or has_fp8_cache else 0.03)
    own = model(
        output[:, :-1].to(DEVICE),
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        past_key_values=Fp8Cache(model.config) if has_fp8_cache else None,
    ).logits
    assert relative_error(found, own[:, -1]) < (0.03 if is_fp8 else 0.012)
    chosen = logits.gather(-1, output[:, prompt:, None].to(DEVICE))[..., 0]
    assert float((logits.amax(-1) - chosen).max()) < 0.05 * float(logits.std())


def complete(model: Any, decoding: RecordedDecoding, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """What `generate` writes by the steps of a recording."""
    cache = RecordedCache(decoding)
    cache.reset()
    if mask is not None:
        options["attention_mask"] = mask.to(DEVICE)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    output: Tensor = model.generate(ids.to(DEVICE), **settings, **cache_argument(cache)).cpu()
    assert decoding.filled == output.shape[1] - 1
    return output


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("weights", "cache"), [("bf16", "bf16"), ("fp8", "bf16"), ("int4", "bf16"), ("bf16", "fp8")])
def test_recorded_steps_are_those_of_the_model(weights: str, cache: Any) -> None:
    """One sequence, then another prompt of another length in the same recording."""
    model = random_model(DEVICE, weights)
    dense = dense_model(model)
    decoding = record_decoding(model, context_length=40, cache=cache)
    for length in (20, 9):
        ids = random_ids(CONFIG, 1, length)
        output = complete(model, decoding, ids)
        assert torch.equal(output[:, :length], ids)
        check_steps(decoding, model, dense, output, torch.ones_like(ids), length)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_a_padded_batch(weights: str) -> None:
    model = random_model(DEVICE, weights)
    decoding = record_decoding(model, context_length=40, batch=3)
    ids, mask = left_padded(CONFIG, [11, 20, 1])
    output = complete(model, decoding, ids, mask)
    check_steps(decoding, model, dense_model(model), output, mask, 20)


@pytest.mark.usefixtures("large_tiles")
def test_long_prompts_are_read_in_chunks() -> None:
    model = random_model(DEVICE, "bf16")
    decoding = record_decoding(model, context_length=40, batch=2)
    ids, mask = left_padded(CONFIG, [19, 13])
    output = complete(model, decoding, ids, mask, prefill_chunk_size=8)
    check_steps(decoding, model, dense_model(model), output, mask, 19)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("weights", ["bf16", "fp8", "int4"])
@torch.no_grad()
def test_several_tokens_of_a_sequence_in_one_step(weights: str) -> None:
    """As drafts are checked; the rows that fill up the step leave nothing behind."""
    model = random_model(DEVICE, weights)
    ids = random_ids(CONFIG, 1, 17).to(DEVICE)
    cache: Any = RecordedCache(record_decoding(model, context_length=40))
    model(ids[:, :9], **cache_argument(cache))
    found = model(ids[:, 9:14], **cache_argument(cache)).logits
    cache.crop(-2)
    found = torch.cat(
        (found[:, :3], *(model(ids[:, at : at + 1], **cache_argument(cache)).logits for at in (12, 13))), 1
    )
    expected = model(ids[:, :14]).logits[:, 9:]
    assert cache.get_seq_length() == 14
    assert relative_error(found, expected) < (0.03 if weights == "fp8" else 0.012)


@pytest.mark.usefixtures("large_tiles")
def test_completions_end_where_they_should() -> None:
    """Each row on its own, and the rest of it is padding."""
    model = random_model(DEVICE, "bf16")
    decoding = record_decoding(model, context_length=12, batch=2)
    ids = random_ids(CONFIG, 2, 8)
    free = complete(model, decoding, ids, max_new_tokens=5)
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
    padded = [row + [PAD] * (longest - len(row)) for row in completions]
    ended = complete(model, decoding, ids, max_new_tokens=5, eos_token_id=sorted(ends))
    assert ended[:, 8:].tolist() == padded
    assert torch.equal(complete(model, decoding, ids, max_new_tokens=5), free)


@pytest.mark.usefixtures("large_tiles")
def test_samples_are_drawn_as_the_logits_say() -> None:
    model = random_model(DEVICE, "bf16")
    decoding = record_decoding(model, context_length=40)
    ids = random_ids(CONFIG, 1, 8)
    greedy = complete(model, decoding, ids)

    def sampled(**options: Any) -> Tensor:
        torch.manual_seed(7)
        return complete(model, decoding, ids, do_sample=True, **{"top_k": 0, **options})

    assert torch.equal(sampled(top_k=1), greedy)
    assert torch.equal(sampled(top_p=1e-6), greedy)
    assert torch.equal(sampled(temperature=1e-4), greedy)
    assert torch.equal(sampled(), sampled())
    assert not torch.equal(sampled(temperature=5.0), greedy)


@pytest.mark.usefixtures("large_tiles")
def test_generate_records_by_itself() -> None:
    """Once for two prompts; drafts by lookup in the second call; and what torch's kernels of the tests compute."""
    model = random_model(DEVICE, "bf16")
    plain: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    ids = random_ids(CONFIG, 1, 7).to(DEVICE)
    for prompt, options in ((ids, {}), (ids.repeat(1, 2), {"prompt_lookup_num_tokens": 2})):
        output = model.generate(prompt, **plain, **options)
        (decoding,) = [automatic._kept[model]]
        assert decoding.filled >= output.shape[1] - 1
        assert torch.equal(output, model.generate(prompt, **plain, cache_implementation="dynamic"))
    release_recording(model)
    assert model not in automatic._kept


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(DEVICE, "bf16")
    for batch in (0, 17):
        with pytest.raises(SettingError, match="1 to 16 sequences"):
            record_decoding(model, 32, batch)
    for context in (0, 513):
        with pytest.raises(SettingError, match="must be 1 to 512"):
            record_decoding(model, context)
    with pytest.raises(SettingError, match="cache 'fp16': must be 'bf16' or 'fp8'"):
        record_decoding(model, 32, cache="fp16")  # type: ignore[arg-type]  # what is tested
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
    mixed = random_model(DEVICE, "int4")
    mixed.model.layers[1].self_attn.k_proj.group_size = 128
    with pytest.raises(
        SettingError, match=r"q_proj, k_proj, v_proj of model\.layers\.1\.self_attn are not quantized alike"
    ):
        record_decoding(mixed, 32)
    model.lm_head = nn.Linear(128, 400, bias=True, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(SettingError, match="lm_head is Linear"):
        record_decoding(model.eval(), 32)
    grouped = random_model(DEVICE, "int4")
    grouped.model.layers[0].mlp.up_proj.group_size = 32
    with pytest.raises(SettingError, match="groups of 32"):
        record_decoding(grouped, 32)
    if INTERPRETED:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(SettingError, match="lies on the CPU"):
            record_decoding(random_model(DEVICE, "bf16"), 32)


@pytest.mark.usefixtures("large_tiles")
def test_prompts_that_are_not_padded_on_their_left_are_decoded_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(DEVICE, "bf16")
    ids = random_ids(CONFIG, 2, 8).to(DEVICE)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    for last in ([1] * 7 + [0], [0, 1, 0] + [1] * 5, [0] * 8):
        mask = torch.tensor([[1] * 8, last], device=DEVICE)
        found = model.generate(ids, attention_mask=mask, **options)
        expected = model.generate(ids, attention_mask=mask, **options, cache_implementation="dynamic")
        assert torch.equal(found, expected)

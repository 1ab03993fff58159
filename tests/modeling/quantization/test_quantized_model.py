"""Quantized checkpoints in transformers: loaded with no flag, right, and quantized as long as they are in memory."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]  # it has no types
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8  # type: ignore[import-untyped]  # it has no types
from compressed_tensors.quantization import QuantizationScheme  # type: ignore[import-untyped]  # it has no types
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize  # type: ignore[import-untyped]  # it has no types
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp  # type: ignore[import-untyped]  # it has no types
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, MistralForCausalLM

from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
from mistral_large_conversion import convert_checkpoint, retag_checkpoint
from mistral_large_conversion.checkpoint.quantization import FORMATS, Scheme, is_quantized, quantization_config
from mistral_large_conversion.errors import MissingLibraryError
from mistral_large_conversion.sharding.memory import DEQUANTIZED_AT_ONCE, run_time_bytes
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.quantization import gpu_int4
from modeling_mistral_large.quantization import linear as linear_module
from modeling_mistral_large.quantization.linear import (
    MOST_TOKENS_OF_KERNEL,
    Fp8Linear,
    Int4Linear,
    KernelLayout,
    QuantizedLinear,
    dequantize_fp8,
    kernel_layout,
    round_to_fp8,
)
from modeling_mistral_large.quantization.loading import quantize_modules_, use_kernels_
from modeling_mistral_large.quantization.nvfp4 import Nvfp4Linear, dequantize_fp4
from tests.cli.test_demo import answers, expected
from tests.support.checkpoints import write_consolidated
from tests.support.errors import raises_exactly
from tests.support.models import GREEDY, stock_config
from tests.support.tensor_parallel import PROMPT as RANKS_PROMPT
from tests.support.warm_python import WarmPython

QUANTIZATIONS: list[Scheme] = ["fp8", "int4", "nvfp4"]
# Of the demo; of fp8 it stands for no groups.
GROUPS: dict[Scheme, int] = {"fp8": 128, "int4": 64, "nvfp4": 16}
every_quantization = pytest.mark.parametrize("quantization", QUANTIZATIONS)
# For what is no matter of the format.
quick_with_int4 = pytest.mark.parametrize(
    "quantization", [pytest.param(each, marks=() if each == "int4" else pytest.mark.slow) for each in QUANTIZATIONS]
)
# A share of each row is a whole number of groups, for two ranks.
NARROW = MistralLargeConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
CPU = torch.device("cpu")
PROMPT = torch.tensor([[1, 3, 6312, 28709, 1526, 4, 1200, 5, 17]])


@pytest.fixture(scope="session")
def quantized_demos(tmp_path_factory: pytest.TempPathFactory) -> dict[Scheme, Path]:
    source = assemble_demo_checkpoint(tmp_path_factory.mktemp("source"))
    folders = {quantization: tmp_path_factory.mktemp(quantization) for quantization in QUANTIZATIONS}
    for quantization, folder in folders.items():
        convert_checkpoint(source, folder, quantize=quantization)
    return folders


@pytest.fixture
def folder(quantized_demos: dict[Scheme, Path], quantization: Scheme) -> Path:
    return quantized_demos[quantization]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = PROMPT) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def dequantized_weights(folder: Path, quantization: Scheme) -> dict[str, Tensor]:
    """All weights of a folder, expanded to FP32 by compressed-tensors."""
    scheme = QuantizationScheme(**quantization_config(quantization, GROUPS[quantization])["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(FORMATS[quantization])
    stored = load_file(folder / "model.safetensors")
    expanded = {}
    for name in [name for name in stored if name.endswith("weight_scale")]:
        prefix = name.removesuffix("weight_scale")
        parts = {key.removeprefix(prefix): stored.pop(key) for key in list(stored) if key.startswith(prefix)}
        parts["weight_scale"] = parts["weight_scale"].float()
        if quantization == "nvfp4":
            # Its compressor rounds to BF16.
            packed = parts["weight_packed"]
            codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
            expanded[f"{prefix}weight"] = dequantize(
                codes, parts["weight_scale"], args=scheme.weights, global_scale=parts["weight_global_scale"]
            )
        else:
            expanded[f"{prefix}weight"] = compressor.decompress(parts, scheme)["weight"]
    return {name: tensor.float() for name, tensor in (expanded | stored).items()}


@pytest.mark.slow
@every_quantization
def test_it_loads_with_no_flag_and_gives_the_golden_answers(folder: Path) -> None:
    model = load(folder)
    tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    conversations = list(golden_conversations().values())
    # Alone and in batches: a kernel may take a single token.
    alone = conversations[:2]
    assert answers(model, tokenizer, alone) == expected(alone)
    # By their length, as padding is computed too.
    conversations.sort(key=lambda each: len(json.dumps([each.messages, each.tools])))
    assert answers(model, tokenizer, conversations, batch=6) == expected(conversations)


@pytest.mark.slow
@every_quantization
def test_pipeline_needs_no_flag_either(folder: Path) -> None:
    golden = golden_conversations()["who_are_you"]
    chat = transformers.pipeline("text-generation", str(folder), device_map="auto")
    output = chat(golden.messages, max_new_tokens=64, do_sample=False)
    assert output[0]["generated_text"][-1]["content"] == golden.answer
    assert linears(chat.model)


@every_quantization
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_it_stays_quantized_after_the_first_forward(
    folder: Path, demo_folder: Path, quantization: Scheme, dtype: torch.dtype
) -> None:
    model = load(folder, dtype=dtype)
    assert logits(model).dtype == dtype
    found = linears(model)
    assert len(found) == 7 * model.config.num_hidden_layers
    for linear in found.values():
        shape = (linear.out_features, linear.in_features)
        assert bytes_of(linear) == run_time_bytes(shape, quantization, GROUPS[quantization])
        # No copy is kept anywhere else in the layer.
        assert not any(isinstance(value, Tensor) for value in vars(linear).values())
    whole = load(demo_folder, dtype=dtype)
    plain = sum(module.weight.nbytes for module in whole.model.layers.modules() if isinstance(module, nn.Linear))
    assert bytes_of(whole) - bytes_of(model) == plain - sum(map(bytes_of, found.values()))
    assert bytes_of(model.model.layers) < bytes_of(whole.model.layers) / (1.8 if dtype == torch.bfloat16 else 3.5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int4", "nvfp4"])
def test_logits_are_those_of_the_dequantized_weights(folder: Path, quantization: Scheme) -> None:
    model = load(folder, dtype=torch.float32)
    stock: Any = MistralForCausalLM._from_config(stock_config(model.config), dtype=torch.float32).eval()
    stock.load_state_dict(dequantized_weights(folder, quantization))
    for ids in (PROMPT, PROMPT.repeat(1, 8)):
        assert (ids.shape[1] > MOST_TOKENS_OF_KERNEL) == (ids.shape[1] != PROMPT.shape[1])
        torch.testing.assert_close(logits(model, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(
    "positions", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(64, marks=pytest.mark.slow)]
)
def test_fp8_products_are_those_of_compressed_tensors(
    quantized_demos: dict[Scheme, Path], dtype: torch.dtype, tolerance: float, positions: int
) -> None:
    """Activations are rounded as its own module does it."""
    weights = dequantized_weights(quantized_demos["fp8"], "fp8")
    model = load(quantized_demos["fp8"], dtype=dtype)
    arguments = QuantizationScheme(**quantization_config("fp8")["config_groups"]["group_0"]).input_activations
    assert arguments is not None
    for name, linear in linears(model).items():
        hidden = torch.randn(2, positions, linear.in_features).to(dtype) * 100
        scales, zeros = compute_dynamic_scales_and_zp(hidden.float(), arguments, linear)
        wanted = nn.functional.linear(
            fake_quantize(hidden.float(), scales, zeros, arguments), weights[f"{name}.weight"]
        )
        error = (linear(hidden).float() - wanted).norm() / wanted.norm()
        assert error < tolerance, name


def test_all_fp8_codes_are_dequantized_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wanted = codes.float()
    assert torch.equal(dequantize_fp8(codes).float()[~wanted.isnan()], wanted[~wanted.isnan()])


def test_nvfp4_rows_have_the_bits_of_compressed_tensors(quantized_demos: dict[Scheme, Path]) -> None:
    scheme = QuantizationScheme(**quantization_config("nvfp4")["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(FORMATS["nvfp4"])
    model = load(quantized_demos["nvfp4"])
    for name, linear in linears(model).items():
        wanted = compressor.decompress(linear.file_tensors(), scheme)["weight"]
        found = torch.cat(list(linear.dequantized_rows(torch.bfloat16)))
        assert found.dtype == wanted.dtype == torch.bfloat16
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16)), name


def test_nvfp4_groups_are_not_cut() -> None:
    """As two ranks would shard 48 columns."""
    linear = Nvfp4Linear(48, 8)
    linear.after_loading_()
    linear.weight_packed = nn.Parameter(linear.weight_packed[:, :12].clone(), requires_grad=False)
    for groups in (1, 2):
        scales = torch.zeros(8, groups).to(torch.float8_e4m3fn)
        linear.weight_scale = nn.Parameter(scales, requires_grad=False)
        with raises_exactly(
            ValueError,
            "tensor parallelism: 24 columns for a rank are no whole number of groups of 16; use fewer ranks, or "
            "device_map instead",
        ):
            linear.after_loading_()


def test_all_fp4_codes_are_dequantized_exactly() -> None:
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    found = dequantize_fp4(torch.arange(16, dtype=torch.uint8))
    assert found.tolist() == [*values, *(-value for value in values)]
    assert found.signbit().tolist() == [False] * 8 + [True] * 8


def test_zeros_are_no_trouble() -> None:
    linear = Fp8Linear(32, 16)
    nn.init.zeros_(linear.weight)
    nn.init.ones_(linear.weight_scale)
    assert torch.equal(linear(torch.zeros(3, 32)), torch.zeros(3, 16))


@pytest.mark.parametrize("rows", [64, 192, 80, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_form_of_the_kernel_says_what_the_file_says(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEQUANTIZED_AT_ONCE, "cpu", 20_000)
    linear = Int4Linear(256, rows, group_size=32)
    with torch.no_grad():
        linear.weight_packed.random_(-(2**31), 2**31)
        linear.weight_scale.uniform_(0.01, 0.02)
    before = {name: tensor.clone() for name, tensor in linear.file_tensors().items()}
    few, many = (torch.randn(positions, 256).to(dtype) for positions in (3, 100))
    wanted = [linear(hidden) for hidden in (few, many)]
    linear.use_kernel_()
    layout = kernel_layout(CPU)
    assert (linear.layout is not None) == (layout is not None and rows % layout.rows == 0)
    for hidden, product in zip((few, many), wanted, strict=True):
        torch.testing.assert_close(linear(hidden), product, rtol=2e-2, atol=2e-2 * product.abs().max().item())
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.file_tensors().items())
    linear.use_packed_layout_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.state_dict().items())


def test_this_processor_has_a_kernel() -> None:
    layout = kernel_layout(CPU)
    assert layout is not None
    assert layout.is_right()
    # No processor has tiles of so many rows.
    assert not KernelLayout(CPU, 48, 32).is_right()


def test_a_kernel_that_multiplies_in_another_order_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing is undone all the same, as its order is found out: only a product can tell."""
    right = kernel_layout(CPU)
    assert right is not None
    pack = KernelLayout.pack

    def swapped(layout: KernelLayout, codes: Tensor) -> Tensor:
        return pack(layout, codes.view(len(codes), -1, 2).flip(-1).flatten(1))

    monkeypatch.setattr(KernelLayout, "pack", swapped)
    layout = KernelLayout(CPU, right.rows, right.columns)
    codes = torch.arange(right.rows * 256).view(-1, 256).remainder(13).to(torch.uint8)
    assert torch.equal(layout.unpack(layout.pack(codes).view(torch.uint8).flatten(), 256), codes)
    assert not layout.is_right()
    kernel_layout.cache_clear()
    assert kernel_layout(CPU) is None
    kernel_layout.cache_clear()


@pytest.mark.parametrize(
    ("capability", "is_safe", "has_kernel"),
    [
        ((8, 0), True, False),
        ((8, 9), False, False),
        ((8, 9), True, True),
        ((9, 0), False, True),
        ((10, 0), False, True),
        ((12, 0), True, True),
    ],
)
def test_fp8_products_that_may_hang_are_not_used(
    capability: tuple[int, int], is_safe: bool, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    monkeypatch.setattr(linear_module, "IS_SAFE_ON_8_9", is_safe)
    assert linear_module.has_fp8_kernel(torch.device("cuda")) == has_kernel


def test_rows_that_are_dequantized_at_once_are_aligned_on_gpus() -> None:
    layer = Int4Linear(12288, 28672, device="meta")
    assert layer.rows_at_once() == 512
    assert Fp8Linear(12288, 16).rows_at_once() == 342


def test_torch_is_safe_from_2_12_on() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert ((major, minor) >= (2, 12)) == linear_module.IS_SAFE_ON_8_9


@pytest.mark.parametrize(
    ("capability", "has_triton", "has_kernels"), [((7, 5), True, False), ((8, 0), True, True), ((9, 0), False, False)]
)
def test_int4_stays_packed_where_triton_is(
    capability: tuple[int, int], has_triton: bool, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    monkeypatch.setattr(gpu_int4, "HAS_TRITON", has_triton)
    assert gpu_int4.has_int4_kernels(torch.device("cuda")) == has_kernels
    assert not gpu_int4.has_int4_kernels(CPU)
    if has_kernels:
        assert kernel_layout.__wrapped__(torch.device("cuda")) is None


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3, 17, 300])
@every_quantization
def test_the_number_of_tokens_does_not_change_what_is_computed(quantization: Scheme, rows: int) -> None:
    """Activations are rounded by one rule: W8A8 with FP8 weights, W4A16 with 4 bits. The rest is BF16's rounding."""
    torch.manual_seed(0)
    layer: Any = {"fp8": Fp8Linear, "int4": Int4Linear, "nvfp4": Nvfp4Linear}[quantization](128, 64)
    hidden = torch.randn(300, 128).bfloat16()
    if quantization == "fp8":
        layer.weight.copy_(torch.randn(64, 128))
        layer.weight_scale.copy_(torch.rand(64, 1))
        codes, scales = round_to_fp8(hidden)
        weight, taken = layer.weight.double() * layer.weight_scale.double(), codes.double() * scales.double()
    else:
        layer.weight_packed.view(torch.uint8).random_(0, 256)
        layer.weight_scale.copy_(torch.rand(layer.weight_scale.shape))
        if quantization == "nvfp4":
            layer.weight_global_scale.fill_(3)
        weight, taken = torch.cat(list(layer.dequantized_rows(torch.float32))).double(), hidden.double()
    layer.after_loading_()
    found = torch.cat([layer(some) for some in hidden.split(rows)]).double()
    assert float((found - taken @ weight.T).norm() / (taken @ weight.T).norm()) < 4e-3


@quick_with_int4
def test_saving_gives_the_same_checkpoint(folder: Path, quantization: Scheme, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["quantization_config"] == quantization_config(quantization, GROUPS[quantization])
    wanted, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert wanted.keys() == saved.keys()
    assert all(tensor.dtype == saved[name].dtype for name, tensor in wanted.items())
    assert all(torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)) for name, tensor in wanted.items())
    again = load(tmp_path / "saved")
    assert linears(again).keys() == linears(model).keys()
    assert torch.equal(logits(again), logits(model))


@quick_with_int4
def test_offloaded_layers_give_the_same_logits(folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    model = load(folder, device_map=places, offload_folder=tmp_path, dtype=torch.float32)
    assert all(tensor.is_meta for tensor in model.model.layers[0].mlp.parameters())
    with raises_exactly(
        ValueError,
        "a quantized model that is offloaded or sharded over ranks cannot be saved; copy the folder it was loaded "
        "from, or load it in one process without offload",
    ):
        model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(model), logits(load(folder, dtype=torch.float32)), rtol=1e-4, atol=1e-4)


@quick_with_int4
def test_another_dtype_leaves_the_codes_alone(folder: Path) -> None:
    model = load(folder)
    kinds = {name: tensor.dtype for linear in linears(model).values() for name, tensor in linear.named_parameters()}
    wanted = logits(load(folder, dtype=torch.float32))
    model.to(torch.float32)
    assert kinds == {
        name: tensor.dtype for linear in linears(model).values() for name, tensor in linear.named_parameters()
    }
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    # The kernel for int4 is compiled for BF16 only; compiled code rounds less often to it.
    [("fp8", torch.float32, 1e-4), ("int4", torch.bfloat16, 3e-2), ("nvfp4", torch.float32, 1e-4)],
)
def test_the_whole_graph_compiles(folder: Path, quantization: Scheme, dtype: torch.dtype, tolerance: float) -> None:
    """Code is made of the whole graph with one quantization, and with the others of what differs: a linear layer."""
    model = load(folder, dtype=dtype, num_hidden_layers=1)
    wanted = logits(model).float()
    is_code = quantization == "int4"
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if is_code else "aot_eager")
    assert (logits(compiled).float() - wanted).norm() / wanted.norm() < tolerance
    if not is_code:
        linear = model.model.layers[0].mlp.down_proj
        hidden = torch.randn(9, linear.in_features, dtype=dtype)
        product = linear(hidden)
        code = torch.compile(linear, fullgraph=True)
        assert (code(hidden) - product).norm() / product.norm() < tolerance


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="the ranks talk through gloo")
@pytest.mark.parametrize(("quantization", "tolerance"), [("fp8", 0.1), ("int4", 1e-5), ("nvfp4", 1e-5)])
def test_two_ranks_say_the_same_as_one(
    quantization: Scheme, tolerance: float, tmp_path: Path, known_tokenizer: None, warm_python: WarmPython
) -> None:
    """But for FP8 activations: each rank rounds its share of them by a scale of its own."""
    write_consolidated(tmp_path / "source", NARROW, torch.bfloat16)
    convert_checkpoint(tmp_path / "source", tmp_path / "quantized", quantize=quantization)
    model = load(tmp_path / "quantized", dtype=torch.float32)
    wanted = logits(model, torch.tensor(RANKS_PROMPT))
    result = run_ranks(warm_python, tmp_path / "quantized", tmp_path / "result")
    assert result["key_rows"] == NARROW.head_dim
    assert (result["logits"] - wanted).norm() / wanted.norm() < tolerance
    if quantization != "fp8":
        assert torch.equal(result["tokens"], model.generate(torch.tensor(RANKS_PROMPT), **GREEDY))


@quick_with_int4
def test_shares_are_not_saved(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    monkeypatch.setattr(model, "_tp_size", 2)
    with raises_exactly(
        ValueError,
        "a quantized model that is offloaded or sharded over ranks cannot be saved; copy the folder it was loaded "
        "from, or load it in one process without offload",
    ):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.slow
def test_groups_are_not_cut_by_ranks(
    quantized_demos: dict[Scheme, Path], tmp_path: Path, warm_python: WarmPython
) -> None:
    result = run_ranks(warm_python, quantized_demos["int4"], tmp_path / "result")
    assert "96 columns for a rank are no whole number of groups of 64; use fewer ranks" in result["error"]


def run_ranks(python: WarmPython, folder: Path, result: Path) -> dict[str, Any]:
    """What two ranks find, see `tensor_parallel`."""
    python.run_two_ranks("tests.support.tensor_parallel", folder, result)
    found: dict[str, Any] = torch.load(result, weights_only=True)
    return found


@quick_with_int4
def test_options_of_the_config_are_heard(folder: Path) -> None:
    model = MistralLargeForCausalLM.from_pretrained(folder, use_cache=False, attn_implementation="eager")
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert linears(model)
    config = MistralLargeConfig.from_pretrained(folder)
    given = MistralLargeForCausalLM.from_pretrained(folder, config=config)
    assert linears(given)
    assert config.quantization_config["quant_method"] == "compressed-tensors"
    _, info = MistralLargeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@quick_with_int4
def test_it_expands_the_weights_when_asked_to(folder: Path, quantization: Scheme) -> None:
    model = load(folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32)
    assert not linears(model)
    for name, weight in dequantized_weights(folder, quantization).items():
        if is_quantized(name):
            # With 5.17, nvfp4 becomes BF16 whatever the dtype.
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-2, atol=0, check_dtype=False)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int4", "nvfp4"])
def test_transformers_own_classes_have_the_same_weights(folder: Path, quantization: Scheme, tmp_path: Path) -> None:
    """As `convert --as mistral` writes it: dequantized to BF16 at the first forward."""
    shutil.copytree(folder, tmp_path / "stock")
    retag_checkpoint(tmp_path / "stock", "mistral")
    model = load(tmp_path / "stock", dtype=torch.bfloat16)
    assert type(model) is MistralForCausalLM
    found = logits(model)
    weights = {name: tensor.bfloat16() for name, tensor in dequantized_weights(folder, quantization).items()}
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight), name
    ours = MistralForCausalLM._from_config(stock_config(load(folder).config), dtype=torch.bfloat16).eval()
    ours.load_state_dict(weights)
    assert torch.equal(found, logits(ours))


@quick_with_int4
def test_compressed_tensors_is_needed_for_other_formats_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_mistral_large.quantization.loading.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert linears(load(folder))
    with raises_exactly(
        MissingLibraryError,
        f"{folder}: loading it this way needs compressed-tensors; pip install 'modeling-mistral-large[quantized]'",
    ):
        load(folder, quantization_config=CompressedTensorsConfig.__new__(CompressedTensorsConfig))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "mxfp4-pack-quantized"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises_exactly(
        MissingLibraryError,
        f"{tmp_path}: loading it this way needs compressed-tensors; pip install 'modeling-mistral-large[quantized]'",
    ):
        load(tmp_path)


@every_quantization
def test_a_model_can_be_built_empty_and_filled(quantization: Scheme) -> None:
    config = MistralLargeConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model: Any = MistralLargeForCausalLM(config)
        quantize_modules_(model, quantization)
    assert all(tensor.is_meta for tensor in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for linear in linears(model).values():
            if isinstance(linear, Int4Linear):
                linear.weight_packed.random_(-(2**31), 2**31)
                linear.weight_scale.fill_(0.01)
            elif isinstance(linear, Nvfp4Linear):
                linear.weight_packed.random_(0, 256)
                linear.weight_scale.fill_(2)
                linear.weight_global_scale.fill_(100)
            elif isinstance(linear, Fp8Linear):
                linear.weight.copy_(torch.randn(linear.weight.shape))
                linear.weight_scale.fill_(0.01)
    use_kernels_(model)
    assert isinstance(model.lm_head, nn.Linear)
    for linear in linears(model).values():
        shape = (linear.out_features, linear.in_features)
        assert bytes_of(linear) == run_time_bytes(shape, quantization)
        assert linear(torch.randn(2, 3, linear.in_features)).isfinite().all()
        assert linear(torch.randn(2, 3, linear.in_features)).shape == (2, 3, linear.out_features)

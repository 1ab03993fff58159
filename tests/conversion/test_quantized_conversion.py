"""`mistral-large convert --quantize`: the bits of compressed-tensors, and all that other conversions can."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]  # it has no types
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme  # type: ignore[import-untyped]  # it has no types
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme  # type: ignore[import-untyped]  # it has no types
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # type: ignore[import-untyped]  # it has no types
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import (
    Check,
    convert_checkpoint,
    export_checkpoint,
    inspect_checkpoint,
    planned_tensor,
    prepare_conversion,
    read_manifest,
    retag_checkpoint,
    verify_checkpoint,
)
from mistral_large_conversion.checkpoint.names import SHAPES, TO_HF
from mistral_large_conversion.checkpoint.quantization import (
    FORMATS,
    Quantization,
    Scheme,
    choose_group_size,
    is_quantized,
    quantization_config,
    quantization_of,
    quantized_entries,
)
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.manifest import MANIFEST_NAME
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from tests.support.checkpoints import contents, write_consolidated
from tests.support.command import run
from tests.support.edits import set_json
from tests.support.errors import raises_exactly

QUANTIZATIONS: list[Scheme] = ["fp8", "int4", "nvfp4"]
# Of what stands for no groups, too.
GROUPS: dict[Scheme, int] = {"fp8": 128, "int4": 32, "nvfp4": 16}
# What vLLM multiplies with at once, with one global scale.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
LAYER_PARTS = [*(f"self_attn.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down"]
NVFP4_PARTS = ("weight_packed", "weight_scale", "weight_global_scale")
every_quantization = pytest.mark.parametrize("quantization", QUANTIZATIONS)
int4_quickly = pytest.mark.parametrize(
    "quantization", ["int4", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("fp8", "nvfp4"))]
)


@pytest.fixture
def config(tiny_config: MistralLargeConfig) -> MistralLargeConfig:
    """A geometry in which all rows are groups of 32, no two sizes are alike and no side is a multiple of 128."""
    tiny_config.hidden_size, tiny_config.intermediate_size = 96, 160
    return tiny_config


@pytest.fixture
def source(config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None) -> Path:
    write_consolidated(tmp_path / "source", config, torch.bfloat16)
    return tmp_path / "source"


def converted(source: Path, name: str, **options: Any) -> Path:
    folder = source.with_name(name)
    convert_checkpoint(source, folder, **options)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def by_compressed_tensors(weight: Tensor, quantization: Scheme, fused: Sequence[Tensor]) -> dict[str, Tensor]:
    """What its own compressor makes of a weight, in FP32, with a BF16 scale or one of its own.

    fused: the weights of a layer that engines fuse, whose least global scale each of them gets.
    """
    settings = quantization_config(quantization, GROUPS[quantization])["config_groups"]["group_0"]
    scheme = QuantizationScheme(**settings)
    arguments = scheme.weights
    assert isinstance(arguments, QuantizationArgs)
    wide = weight.float()
    groups = wide if quantization == "fp8" else wide.unflatten(-1, (-1, GROUPS[quantization]))
    kept = quantization == "fp8"
    extremes = groups.amin(-1, keepdim=kept), groups.amax(-1, keepdim=kept)
    compressor = BaseCompressor.get_value_from_registry(FORMATS[quantization])
    if quantization == "nvfp4":
        least = torch.stack([generate_gparam(each.float().amin(), each.float().amax()) for each in fused]).amin(0)
        scales, _ = calculate_qparams(*extremes, arguments, global_scale=least)
        state = {"weight": wide, "weight_scale": scales, "weight_global_scale": least}
    else:
        scales, zeros = calculate_qparams(*extremes, arguments)
        state = {"weight": wide, "weight_scale": scales.bfloat16(), "weight_zero_point": zeros}
    parts: dict[str, Tensor] = compressor.compress(state, scheme)
    return parts


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.slow
@every_quantization
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_those_of_compressed_tensors(
    config: MistralLargeConfig, quantization: Scheme, dtype: torch.dtype, tmp_path: Path, known_tokenizer: None
) -> None:
    write_consolidated(tmp_path / "source", config, dtype)
    bits = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    # The same numbers, not quantized: names and rope pairs have tests of their own.
    plain = weights_of(converted(tmp_path / "source", "plain", dtype=bits))
    found = weights_of(converted(tmp_path / "source", "quantized", quantize=quantization))
    for name, weight in plain.items():
        if not is_quantized(name):
            assert same_bits(found.pop(name), weight.bfloat16())
            continue
        fused = next((names for names in FUSED if any(each in name for each in names)), None)
        weights = [plain[re.sub(r"\w+_proj", each, name)] for each in fused] if fused else [weight]
        wanted = by_compressed_tensors(weight, quantization, weights)
        for part, tensor in wanted.items():
            assert same_bits(found.pop(name.removesuffix("weight") + part), tensor), (name, part)
    assert not found


@pytest.mark.parametrize("block_bytes", [2000, 2**20])
def test_fused_layers_have_one_global_scale_and_are_read_ahead_once(
    source: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", block_bytes)
    # The greatest of all is in another weight of each fused layer.
    change(source, "layers.0.attention.wv.weight", lambda weight: weight[5, 6].fill_(9.0))
    change(source, "layers.0.feed_forward.w1.weight", lambda weight: weight[7, 8].fill_(-21.0))
    opened: Counter[str] = Counter()
    open_ = FileTensor.open

    def counted(tensor: FileTensor) -> BinaryIO:
        opened[tensor.name] += 1
        return open_(tensor)

    monkeypatch.setattr(FileTensor, "open", counted)
    found = weights_of(converted(source, "quantized", quantize="nvfp4"))
    scale_of = {name: found[f"model.layers.0.{name}_proj.weight_global_scale"] for name in LAYER_PARTS}
    attention = [scale_of[f"self_attn.{name}"] for name in "qkv"]
    assert {tuple(scale.tolist()) for scale in attention} == {
        tuple(generate_gparam(torch.tensor(-9.0), torch.tensor(9.0)).tolist())
    }
    assert scale_of["mlp.gate"] == scale_of["mlp.up"] == generate_gparam(torch.tensor(-21.0), torch.tensor(21.0))
    assert len({float(scale) for scale in scale_of.values()}) == 4
    # Once for the global scale, once for the codes; what is not quantized once.
    assert {count for name, count in opened.items() if "attention.w" in name or "feed_forward" in name} == {2}
    assert {count for name, count in opened.items() if "norm" in name or "embed" in name} == {1}


@pytest.mark.slow
def test_weights_too_small_for_a_global_scale_have_1(source: Path) -> None:
    for name in ("wq", "wk", "wv"):
        change(source, f"layers.1.attention.{name}.weight", lambda weight: weight.zero_())
    change(source, "layers.1.attention.wo.weight", lambda weight: weight.fill_(1e-37))
    found = weights_of(converted(source, "quantized", quantize="nvfp4"))
    for name in "qkvo":
        parts = {part: found[f"model.layers.1.self_attn.{name}_proj.{part}"] for part in NVFP4_PARTS}
        assert parts["weight_global_scale"].tolist() == [1]
        assert not expand(parts, "nvfp4").any()


@int4_quickly
def test_zeros_stay_zeros(source: Path, quantization: Scheme) -> None:
    change(source, "layers.1.feed_forward.w2.weight", lambda weight: weight[3, :64].zero_() + weight[5].zero_().sum())
    name = "model.layers.1.mlp.down_proj."
    found = {
        key.removeprefix(name): tensor
        for key, tensor in weights_of(converted(source, "quantized", quantize=quantization)).items()
        if key.startswith(name)
    }
    expanded = expand(found, quantization)
    assert expanded.isfinite().all()
    assert not expanded[5].any()
    assert not expanded[3, :64].any() or quantization == "fp8"
    assert expanded[4].any()
    assert (found["weight_scale"][5].float() == (2**-3 if quantization == "nvfp4" else 2**-7)).all()


def expand(parts: dict[str, Tensor], quantization: Scheme) -> Tensor:
    scheme = QuantizationScheme(**quantization_config(quantization, GROUPS[quantization])["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(FORMATS[quantization])
    weight: Tensor = compressor.decompress(parts, scheme)["weight"]
    return weight


def change(source: Path, name: str, act: Callable[[Tensor], object]) -> None:
    for path in source.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            act(weights[name])
            save_file(weights, path)


@every_quantization
@pytest.mark.parametrize("wrong", ["nan", *(pytest.param(value, marks=pytest.mark.slow) for value in ("inf", "-inf"))])
def test_numbers_that_are_none_are_refused(source: Path, quantization: Scheme, wrong: str) -> None:
    change(source, "layers.2.attention.wo.weight", lambda weight: weight[7, 3].fill_(float(wrong)))
    with raises_exactly(
        CheckpointError,
        f"tensor 'layers.2.attention.wo.weight' holds {wrong}: only finite weights can be quantized; download it again",
    ):
        converted(source, "quantized", quantize=quantization)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"to": "consolidated"}, "only the HF layout has a place for it; leave `to` out"),
        ({"dtype": "bf16"}, "what is not quantized is bf16, with dtype bf16 too; leave `dtype` out"),
        ({"dtype": "fp16"}, "what is not quantized is bf16, with dtype fp16 too; leave `dtype` out"),
        ({"dtype": "fp32"}, "what is not quantized is bf16, with dtype fp32 too; leave `dtype` out"),
    ],
)
@every_quantization
def test_options_that_do_not_fit_are_refused(
    source: Path, quantization: Scheme, options: dict[str, Any], reason: str
) -> None:
    with raises_exactly(CheckpointError, f"quantizing to {quantization}: {reason}"):
        prepare_conversion(source, source.with_name("quantized"), quantize=quantization, **options)


def test_the_groups_fit_the_geometry_or_it_is_refused() -> None:
    assert choose_group_size([(12288, 28672), (28672, 12288)], "int4") == 128
    assert choose_group_size([(192, 256), (256, 192)], "int4") == 64
    assert choose_group_size([(256, 96)], "int4") == 32
    with raises_exactly(
        CheckpointError,
        "weights with rows of 80 cannot be quantized to int4: groups have 128, 64, 32 weights; take fp8 or leave "
        "--quantize out",
    ):
        choose_group_size([(128, 128), (128, 80)], "int4")
    assert choose_group_size([(80, 112)], "fp8")
    assert choose_group_size([(12288, 28672), (256, 80)], "nvfp4") == 16
    with raises_exactly(
        CheckpointError,
        "weights with rows of 24 cannot be quantized to nvfp4: groups have 16 weights; leave --quantize out",
    ):
        choose_group_size([(128, 24)], "nvfp4")
    for shape in ((80, 24), (24, 80)):
        with raises_exactly(
            CheckpointError,
            "a weight with a side of 24 has no FP8 kernel: it must be a multiple of 16; leave --quantize out",
        ):
            choose_group_size([shape], "fp8")


def test_the_full_geometry_has_the_known_sizes() -> None:
    """The figures people choose their machines by."""
    config = MistralLargeConfig()
    sizes = {
        "query_rows": config.num_attention_heads * config.head_dim,
        "key_rows": config.num_key_value_heads * config.head_dim,
        **config.to_dict(),
    }
    totals: dict[Scheme, int] = {"fp8": 123_434_491_904, "int4": 64_419_432_064, "nvfp4": 70_128_920_992}
    for quantization, total in totals.items():
        found = 0
        for name, shape_names in SHAPES.items():
            shape = tuple(sizes[size] for size in shape_names)
            hf = TO_HF[name].format(layer=0)
            size = 2 * torch.Size(shape).numel()
            if is_quantized(hf):
                size = sum(entry.size for entry in quantized_entries(hf, shape, quantization))
            found += size * (config.num_hidden_layers if "{layer}" in name else 1)
        assert found == total


@int4_quickly
def test_the_config_says_what_compressed_tensors_understands(source: Path, quantization: Scheme) -> None:
    folder = converted(source, "quantized", quantize=quantization)
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    assert config["dtype"] == "bfloat16"
    assert settings["ignore"] == ["lm_head"]
    assert settings.get("use_optimized_inference") == (True if quantization == "fp8" else None)
    parsed = QuantizationConfig.model_validate(settings)
    assert (parsed.format, parsed.quantization_status) == (FORMATS[quantization], "compressed")
    scheme = parsed.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    assert scheme.weights is not None
    if quantization == "nvfp4":
        kind = (scheme.weights.num_bits, scheme.weights.type, scheme.weights.strategy, scheme.weights.group_size)
        assert kind == (4, "float", "tensor_group", 16)
        # What llm-compressor writes for the scheme of this name.
        assert scheme.weights == preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
        assert (scheme.weights.scale_dtype, scheme.input_activations) == (torch.float8_e4m3fn, None)
    elif quantization == "int4":
        assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.input_activations) == (4, 32, None)
    else:
        assert (scheme.weights.num_bits, scheme.weights.strategy) == (8, "channel")
        assert scheme.input_activations is not None
        assert (scheme.input_activations.strategy, scheme.input_activations.dynamic) == ("token", True)


@every_quantization
def test_what_other_programs_make_of_the_config_is_still_known(quantization: Scheme) -> None:
    size = 64 if quantization == "int4" else GROUPS[quantization]
    settings = quantization_config(quantization, size)
    saved = QuantizationConfig.model_validate(settings).model_dump(mode="json")
    assert quantization_of(saved) == quantization_of(settings) == (quantization, size)
    group = settings["config_groups"]["group_0"]
    for other in (
        {**settings, "quant_method": "fp8"},
        {**settings, "quantization_status": "frozen"},
        {**settings, "ignore": []},
        {**settings, "kv_cache_scheme": {"num_bits": 8}},
        {**settings, "config_groups": {"group_0": group, "group_1": group}},
        {**settings, "config_groups": {"group_0": {**group, "targets": ["re:.*mlp"]}}},
        {**settings, "config_groups": {"group_0": {**group, "weights": {**group["weights"], "symmetric": False}}}},
        {**settings, "config_groups": {"group_0": {**group, "weights": {**group["weights"], "actorder": "group"}}}},
        {**settings, "config_groups": {"group_0": {**group, "output_activations": group["weights"]}}},
        {},
        None,
    ):
        assert quantization_of(other) is None


@pytest.mark.slow
@every_quantization
def test_any_number_of_threads_and_an_interruption_give_the_same_bytes(
    source: Path, quantization: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"quantize": quantization, "max_shard_size": "60KB"}
    whole = contents(converted(source, "one", jobs=1, **options))
    assert len([name for name in whole if name.endswith(".safetensors")]) > 3
    assert contents(converted(source, "four", jobs=4, **options)) == whole
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", 5000)
    assert contents(converted(source, "small blocks", **options)) == whole
    written = 0

    def stop(count: int) -> None:
        nonlocal written
        written += count
        if written > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, "stopped", progress=stop, jobs=1, **options)
    seen = contents(source.with_name("stopped"))
    assert "conversion.unfinished" in seen
    assert contents(converted(source, "stopped", **options)) == whole


@pytest.mark.slow
@every_quantization
def test_a_folder_of_ours_in_the_hf_layout_gives_the_same_weights(source: Path, quantization: Scheme) -> None:
    by_detour = converted(converted(source, "hf"), "by detour", quantize=quantization, model_type="mistral")
    direct = contents(converted(source, "direct", quantize=quantization, model_type="mistral"))
    assert contents(by_detour) == direct


@pytest.mark.slow
@every_quantization
def test_settings_of_a_fine_tune_in_the_hf_layout_stay(source: Path, quantization: Quantization) -> None:
    hf = converted(source, "hf")
    set_json(hf / "config.json", eos_token_id=14)
    set_json(hf / "generation_config.json", eos_token_id=[2, 14], pad_token_id=10, temperature=0.7)
    (hf / "chat_template.jinja").write_text("{{ messages[0].content }}")
    folder = converted(hf, "quantized", quantize=quantization)
    # Generation takes generation_config.json's where the two differ.
    ids = {"bos_token_id": 1, "eos_token_id": [2, 14], "pad_token_id": 10}
    found, generation = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert {name: found[name] for name in ids} == ids
    assert generation == {**ids, "temperature": 0.7}
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((folder / "tokenizer_config.json").read_text())["prompt_format"] is None
    set_json(hf / "config.json", eos_token_id="</s>")
    with raises_exactly(CheckpointError, f"{hf}/config.json: eos_token_id is '</s>': must be an id or a list of ids"):
        converted(hf, "wrong", quantize=quantization)


def tensor_check(folder: Path, origin: Path | None) -> Check:
    (found,) = (check for check in verify_checkpoint(folder, origin) if check.name == "tensors")
    return found


@pytest.mark.slow
@every_quantization
def test_verify_names_one_changed_bit(source: Path, quantization: Scheme) -> None:
    folder = converted(source, "quantized", quantize=quantization)
    for origin in (source, converted(source, "hf"), folder, None):
        assert tensor_check(folder, origin).is_ok
    parts = quantized_entries("model.layers.1.mlp.up_proj.weight", (160, 96), quantization, GROUPS[quantization])
    for part in parts:
        damaged = Path(shutil.copytree(folder, folder.with_name("damaged"), dirs_exist_ok=True))
        change(damaged, part.name, lambda tensor: tensor.view(torch.uint8).flatten()[3:4].bitwise_xor_(1))
        for origin in (source, folder, None):
            found = tensor_check(damaged, origin)
            assert (found.is_ok, f"first {part.name}" in found.detail) == (False, True)


@pytest.mark.slow
@every_quantization
def test_verify_says_what_cannot_be_compared(source: Path, quantization: Scheme) -> None:
    folder = converted(source, "quantized", quantize=quantization)
    other: Scheme = "int4" if quantization == "fp8" else "fp8"
    for checked, origin in ((converted(source, "hf"), folder), (converted(source, "other", quantize=other), folder)):
        found = tensor_check(checked, origin)
        assert (found.is_ok, "the source is quantized" in found.detail) == (False, True)


@pytest.mark.slow
@every_quantization
def test_a_damaged_quantized_folder_is_described(source: Path, quantization: Scheme) -> None:
    folder = converted(source, "quantized", quantize=quantization)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    name = "model.layers.0.self_attn.k_proj.weight"
    part = name if quantization == "fp8" else f"{name}_packed"
    stored = "F8_E4M3" if quantization == "nvfp4" else "BF16"
    save_file({**weights, f"{name}_scale": weights[f"{name}_scale"].float()}, path)
    assert f"tensor '{name}_scale' has dtype F32, must be one of {stored}" in str(inspect_checkpoint(folder).problems)
    save_file({**weights, part: weights[part][:, :-1].clone()}, path)
    assert f"tensor '{part}' has shape" in str(inspect_checkpoint(folder).problems)
    save_file({key: weights[key] for key in weights if key != part}, path)
    assert f"tensor '{part}' is missing" in str(inspect_checkpoint(folder).problems)
    assert inspect_checkpoint(folder).loads_with == ()


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "bits"), [("fp8", 8 + 16 / 116.57), ("int4", 4 + 16 / 32), ("nvfp4", 4.5)])
def test_inspect_tells_format_and_bits(source: Path, quantization: Scheme, bits: float) -> None:
    folder = converted(source, "quantized", quantize=quantization)
    inspection = inspect_checkpoint(folder)
    assert inspection.problems == ()
    assert f"quantized: {quantization}" in inspection.kind
    assert FORMATS[quantization] in inspection.kind
    assert inspection.bits_per_weight == pytest.approx(bits, abs=0.02)
    plain = inspect_checkpoint(converted(source, "hf"))
    assert (inspection.parameters, inspection.geometry) == (plain.parameters, plain.geometry)
    assert plain.bits_per_weight is None
    assert len(inspection.loads_with) == 2


@pytest.mark.slow
@every_quantization
def test_the_demo_passes_all_checks_and_retag_changes_its_model_type_alone(
    quantization: Scheme, tmp_path: Path
) -> None:
    source = assemble_demo_checkpoint(tmp_path / "source")
    stock = contents(converted(source, "mistral", quantize=quantization, model_type="mistral"))
    folder = converted(source, "own", quantize=quantization)
    own = contents(folder)
    assert all(check.is_ok for check in verify_checkpoint(folder, source))
    assert inspect_checkpoint(folder).problems == ()
    retag_checkpoint(folder, "mistral")
    assert contents(folder) == stock
    retag_checkpoint(folder, "mistral_large")
    assert contents(folder) == own
    assert json.loads(stock["config.json"])["model_type"] == "mistral"


@int4_quickly
def test_there_is_no_way_back(source: Path, quantization: Scheme) -> None:
    folder = converted(source, "quantized", quantize=quantization)
    model = MistralLargeForCausalLM.from_pretrained(folder)
    back = source.with_name("back")
    acts: list[tuple[Callable[[], object], object]] = [
        (lambda: convert_checkpoint(folder, back, to="consolidated"), folder),
        (lambda: convert_checkpoint(folder, back, quantize="fp8"), folder),
        (lambda: export_checkpoint(model, back), "the model"),
    ]
    for act, named in acts:
        with raises_exactly(
            CheckpointError,
            f"{named}: its weights are quantized, and nothing brings back what rounding took away; take the checkpoint "
            "it was made of",
        ):
            act()
    assert not source.with_name("back").exists()


@pytest.mark.parametrize(
    ("quantization", "dtype", "sentences"),
    [
        ("fp8", torch.bfloat16, ["to FP8 (E4M3)", "without any calibration", "No other value was changed"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("int4", torch.bfloat16, ["to 4 bits", "group of 32 weights", "without any calibration"]),
                ("nvfp4", torch.bfloat16, ["to FP4 (E2M1)", "group of 16 weights", "without any calibration"]),
            )
        ),
        ("int4", torch.float32, ["All other values were rounded from F32 to BF16"]),
    ],
)
def test_the_model_card_states_the_modification(
    config: MistralLargeConfig,
    quantization: Scheme,
    dtype: torch.dtype,
    sentences: list[str],
    tmp_path: Path,
    known_tokenizer: None,
) -> None:
    write_consolidated(tmp_path / "source", config, dtype)
    folder = converted(tmp_path / "source", "quantized", quantize=quantization)
    card = " ".join((folder / "README.md").read_text().split())
    assert "This checkpoint was modified." in card
    assert all(sentence in card for sentence in sentences)
    assert (folder / "LICENSE").read_bytes().startswith(b"# Mistral AI Research License")
    assert (folder / "Notice").exists()


def test_the_command_plans_converts_and_compares(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source.with_name("quantized")

    def report_of(*options: str) -> dict[str, Any]:
        assert run("convert", source, folder, "--json", *options) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    planned = report_of("--quantize", "int4", "--dry-run")
    assert not folder.exists()
    assert (planned["quantization"], planned["dtype"], planned["tensors"]) == ("int4", "BF16", 30)
    done = report_of("--quantize", "int4")
    assert done["result"] == "converted"
    assert done["needed_bytes"] == planned["needed_bytes"]
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) == sum(planned["files"].values())
    assert report_of("--quantize", "int4")["result"] == "complete"
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.tensors.keys() == weights_of(folder).keys()
    assert run("convert", source, folder, "--quantize", "fp8") == 2
    assert "holds another finished conversion" in capsys.readouterr().err
    assert (folder / MANIFEST_NAME).exists()

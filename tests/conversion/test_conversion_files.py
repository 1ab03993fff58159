"""Whole conversions: every byte of them, what interrupts them, and the way back."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, MistralForCausalLM
from xxhash import xxh3_128_hexdigest

from mistral_large_conversion import (
    ConversionPlan,
    ManifestTensor,
    convert_checkpoint,
    export_checkpoint,
    planned_tensor,
    read_manifest,
)
from mistral_large_conversion.checkpoint.geometry import PUBLISHED
from mistral_large_conversion.checkpoint.names import TO_HF
from mistral_large_conversion.checkpoint.safetensors_header import MemoryTensor, TensorEntry
from mistral_large_conversion.destination import OUTPUT_PATTERNS, UNFINISHED_NAME, unfinished
from mistral_large_conversion.errors import CheckpointError, DestinationError, TokenizerFileError
from mistral_large_conversion.plan import OutputDtype, PlannedFile
from mistral_large_conversion.planned_tensor import PlannedTensor
from mistral_large_conversion.sentencepiece_bpe import TextEncoder
from mistral_large_conversion.stream import write_weights
from mistral_large_conversion.transforms import Rows
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from tests.conftest import TINY
from tests.conversion.test_conversion_tables import split_row_by_row
from tests.support.checkpoints import contents, tokenizer_model_file, write_consolidated
from tests.support.edits import edit_json, set_json
from tests.support.errors import raises_exactly, whole
from tests.support.models import stock_config
from tests.support.reference_model import reference_logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def config(tiny_config: MistralLargeConfig) -> MistralLargeConfig:
    """The tiny geometry, with one row for each piece of the real tokenizer."""
    tiny_config.vocab_size = 32768
    return tiny_config


@pytest.fixture
def source(config: MistralLargeConfig, tmp_path: Path) -> Path:
    write_consolidated(tmp_path / "source", config, torch.bfloat16)
    return tmp_path / "source"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the tiny geometry as transformers saves it; a test edits a copy."""
    folder = tmp_path_factory.mktemp("saved")
    MistralLargeForCausalLM(MistralLargeConfig(**TINY)).save_pretrained(folder)
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert name not in weights
            weights[name] = tensor
    return weights


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.slow
def test_logits_of_stock_mistral_from_converted_weights_are_the_references(
    config: MistralLargeConfig, tmp_path: Path
) -> None:
    params, weights = write_consolidated(tmp_path / "source", config)
    convert_checkpoint(tmp_path / "source", tmp_path / "hf", max_shard_size="2MB")
    stock = MistralForCausalLM.from_pretrained(tmp_path / "hf", config=stock_config(config), dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (41,))
    with torch.no_grad():
        logits = stock(ids[None]).logits[0]
    expected = reference_logits(weights, params, ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_the_converted_folder_loads_through_the_auto_classes(config: MistralLargeConfig, source: Path) -> None:
    folder = source.parent / "hf"
    convert_checkpoint(source, folder)
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is MistralLargeConfig
    assert loaded.architectures == ["MistralLargeForCausalLM"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.max_position_embeddings == 131072
    for name in ("hidden_size", "head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps"):
        assert getattr(loaded, name) == getattr(config, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is MistralLargeTokenizer
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    assert {name: getattr(loaded, name) for name in ids} == ids
    generation_config = GenerationConfig.from_pretrained(folder)
    assert {name: getattr(generation_config, name) for name in ids} == ids
    assert tokenizer.pad_token_id not in (None, 0, 1, 2)
    assert (folder / "chat_template.jinja").is_file()
    assert (folder / "tokenizer.model.v3").read_bytes() == tokenizer_model_file().read_bytes()
    model = MistralLargeForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize(
    ("buffer_bytes", "dtype"),
    [
        pytest.param(size, dtype, id=f"{blocks}-{dtype}", marks=[] if dtype == quick_dtype else pytest.mark.slow)
        for size, blocks, quick_dtype in (
            (1, "one head", None),
            (5000, "a few rows", torch.bfloat16),
            (2**20, "whole tensors", None),
        )
        for dtype in DTYPES
    ],
)
def test_every_bit_arrives_where_it_belongs_and_goes_back(
    tiny_config: MistralLargeConfig,
    tmp_path: Path,
    dtype: torch.dtype,
    buffer_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, weights = write_consolidated(tmp_path / "source", tiny_config, dtype, shards=3)
    # A buffer of one byte would take minutes for the rest; for rotary pairs it means one head at a time.
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", buffer_bytes if buffer_bytes > 1 else 1000)
    convert_checkpoint(tmp_path / "source", tmp_path / "hf", max_shard_size="100KB")
    converted = read_weights(tmp_path / "hf")
    assert len(converted) == len(weights)
    for name, weight in weights.items():
        layer = name.split(".")[1]
        hf_name = TO_HF[name.replace(f"layers.{layer}.", "layers.{layer}.")].format(layer=layer)
        heads = {"wq": 6, "wk": 2}.get(name.split(".")[-2])
        expected = split_row_by_row(weight.view(torch.uint8), heads) if heads else bits(weight)
        assert converted[hf_name].dtype == dtype
        assert torch.equal(bits(converted[hf_name]), expected), name

    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="consolidated", max_shard_size="150KB")
    back = read_weights(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert all(torch.equal(bits(back[name]), bits(weights[name])) for name in weights)
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == {**params, "max_position_embeddings": 131072}
    assert (tmp_path / "back" / "tokenizer.model.v3").read_bytes() == tokenizer_model_file().read_bytes()
    convert_checkpoint(tmp_path / "back", tmp_path / "again", max_shard_size="100KB")
    assert contents(tmp_path / "again") == contents(tmp_path / "hf")


def test_weights_in_memory_are_exported_like_their_folder(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None
) -> None:
    model = MistralLargeForCausalLM._from_config(tiny_config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    (tmp_path / "hf" / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    # A view that is not contiguous, as a merged adapter may leave it.
    state_dict = {
        name: tensor.mT.clone().mT if tensor.ndim > 1 else tensor for name, tensor in model.state_dict().items()
    }
    convert_checkpoint(tmp_path / "hf", tmp_path / "of_folder", to="consolidated", max_shard_size="90KB")
    export_checkpoint(model, tmp_path / "of_model", origin=tmp_path / "hf", max_shard_size="90KB")
    export_checkpoint(state_dict, tmp_path / "of_state_dict", config=tiny_config, max_shard_size="90KB")
    of_folder, of_state_dict = contents(tmp_path / "of_folder"), contents(tmp_path / "of_state_dict")
    assert contents(tmp_path / "of_model") == of_folder
    assert of_folder["tokenizer.model.v3"] == tokenizer_model_file().read_bytes()
    assert of_folder.keys() - of_state_dict.keys() == {"tokenizer.model.v3", "LICENSE", "Notice", "README.md"}
    # The manifest has all files.
    manifests = [json.loads(files.pop("conversion.manifest.json")) for files in (of_folder, of_state_dict)]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert all(of_folder[name] == content for name, content in of_state_dict.items())
    assert len(of_state_dict) > 3
    # Run again, it is compared with what is in memory now.
    export_checkpoint(state_dict, tmp_path / "of_state_dict", config=tiny_config, max_shard_size="90KB")
    state_dict["model.norm.weight"] = state_dict["model.norm.weight"] + 1
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/of_state_dict: holds another finished conversion: the source gives another tensor "
        "'norm.weight'; choose a new or empty folder",
    ):
        export_checkpoint(state_dict, tmp_path / "of_state_dict", config=tiny_config, max_shard_size="90KB")


@pytest.mark.slow
def test_a_model_with_a_merged_adapter_goes_back(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None
) -> None:
    base = MistralLargeForCausalLM(tiny_config)
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, lora)
    with raises_exactly(CheckpointError, "the model has adapters that are not merged; export model.merge_and_unload()"):
        export_checkpoint(adapted, tmp_path / "refused")
    merged: Any = adapted.merge_and_unload()
    ids = torch.randint(0, tiny_config.vocab_size, (17,))
    with torch.no_grad():
        logits = merged(ids[None]).logits[0]
    for name, shard_size in (("single", "5GB"), ("sharded", "100KB")):
        merged.save_pretrained(tmp_path / name, max_shard_size=shard_size)
        (tmp_path / name / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}-back", to="consolidated")
    assert contents(tmp_path / "single-back") == contents(tmp_path / "sharded-back")
    export_checkpoint(merged, tmp_path / "of_model", origin=tmp_path / "single")
    assert contents(tmp_path / "of_model") == contents(tmp_path / "single-back")
    params = json.loads((tmp_path / "single-back" / "params.json").read_text())
    expected = reference_logits(read_weights(tmp_path / "single-back"), params, ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_special_ids_of_a_model_are_not_lost(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    model = MistralLargeForCausalLM(tiny_config)
    model.generation_config.eos_token_id = [2, 14]
    with raises_exactly(
        CheckpointError,
        "the model: eos_token_id is [2, 14], and the consolidated layout has no place for it: every reader takes 2; "
        "set it to 2 in config.json and generation_config.json if that is right",
    ):
        export_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_in_memory_are_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = MistralLargeForCausalLM(tiny_config)
    problem = "is on device meta, without data; load the model without offload"
    lines = [f"  tensor {name!r} {problem}" for name in model.state_dict()]
    with raises_exactly(
        CheckpointError,
        "\n".join(["the state dict does not fit its config; nothing was done, correct one of the two:", *lines]),
    ):
        export_checkpoint(model, tmp_path / "consolidated")
    assert not (tmp_path / "consolidated").exists()


@pytest.mark.slow
def test_a_folder_for_stock_transformers_holds_the_same_weights_and_goes_back(
    small_source: Path, tmp_path: Path
) -> None:
    convert_checkpoint(small_source, tmp_path / "ours")
    convert_checkpoint(small_source, tmp_path / "stock", model_type="mistral")
    ours, stock = contents(tmp_path / "ours"), contents(tmp_path / "stock")
    assert stock["model.safetensors"] == ours["model.safetensors"]
    assert json.loads(stock["config.json"])["model_type"] == "mistral"
    for name in ("ours", "stock"):
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}-back", to="consolidated")
    assert contents(tmp_path / "stock-back") == contents(tmp_path / "ours-back")
    with raises_exactly(CheckpointError, "model type 'mistral': the consolidated layout has none; leave it out"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "refused", to="consolidated", model_type="mistral")


@pytest.mark.slow
@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_another_dtype_is_that_of_torch(
    tiny_config: MistralLargeConfig, tmp_path: Path, dtype: torch.dtype, name: OutputDtype, wanted: torch.dtype
) -> None:
    write_consolidated(tmp_path / "source", tiny_config, dtype)
    convert_checkpoint(tmp_path / "source", tmp_path / "hf", max_shard_size="100KB")
    convert_checkpoint(tmp_path / "source", tmp_path / "cast", dtype=name, max_shard_size="100KB")
    converted, cast = read_weights(tmp_path / "hf"), read_weights(tmp_path / "cast")
    assert converted.keys() == cast.keys()
    for tensor in cast:
        assert cast[tensor].dtype == wanted
        assert torch.equal(bits(cast[tensor]), bits(converted[tensor].to(wanted))), tensor
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


def test_a_number_too_large_for_another_dtype_is_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    state_dict = MistralLargeForCausalLM(tiny_config).state_dict()
    state_dict["model.norm.weight"][7] = float("inf")
    export_checkpoint(state_dict, tmp_path / "infinite", config=tiny_config, dtype="fp16")
    state_dict["model.norm.weight"][7] = -65520
    with raises_exactly(
        CheckpointError,
        "tensor 'model.norm.weight' holds -65520, too large for F16; choose another dtype",
    ):
        export_checkpoint(state_dict, tmp_path / "refused", config=tiny_config, dtype="fp16")


def test_tensors_of_several_dtypes_need_one_to_become(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    state_dict = MistralLargeForCausalLM._from_config(tiny_config, dtype=torch.bfloat16).state_dict()
    state_dict["model.norm.weight"] = torch.rand(80)
    with raises_exactly(
        CheckpointError,
        "the state dict does not fit its config; nothing was done, correct one of the two:\n"
        "  tensors of dtypes BF16, F32: a checkpoint has one; ask for a dtype to have them converted",
    ):
        export_checkpoint(state_dict, tmp_path / "refused", config=tiny_config)
    export_checkpoint(state_dict, tmp_path / "consolidated", config=tiny_config, dtype="bf16")
    written = read_weights(tmp_path / "consolidated")
    assert torch.equal(written["norm.weight"], state_dict["model.norm.weight"].bfloat16())
    assert torch.equal(bits(written["output.weight"]), bits(state_dict["lm_head.weight"]))


class Halves(PlannedTensor):
    """A tensor that becomes two: the first and the second half of each row."""

    def transform(self, rows: Rows) -> tuple[Rows, ...]:
        half = rows.shape[1] // 2
        return rows[:, :half].copy(), rows[:, half:].copy()


def test_one_tensor_can_become_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", 100)
    weight = torch.rand(40, 6)
    outputs = tuple(TensorEntry(name, "F32", (40, 3), 480) for name in ("left", "right"))
    file = PlannedFile("halves.safetensors", (Halves(MemoryTensor.of("whole", weight), (), outputs),))
    plan = ConversionPlan("hf", PUBLISHED, "F32", ("F32",), (file,))
    with unfinished(tmp_path / "hf") as journal:
        checksums = write_weights(plan, tmp_path / "hf", journal, jobs=2, progress=lambda _: None)
    written = load_file(tmp_path / "hf" / "halves.safetensors")
    assert torch.equal(written["left"], weight[:, :3])
    assert torch.equal(written["right"], weight[:, 3:])
    assert checksums == {name: xxh3_128_hexdigest(tensor.numpy().tobytes()) for name, tensor in written.items()}


def test_the_manifest_has_each_tensor_as_it_is_in_its_file(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="100KB")
    manifest = read_manifest(tmp_path / "hf")
    assert manifest is not None
    found = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            data = bits(tensor).numpy().tobytes()
            found[name] = ManifestTensor(path.name, "BF16", tuple(tensor.shape), xxh3_128_hexdigest(data))
    assert manifest.tensors == found
    assert read_manifest(small_source) is None


@pytest.mark.slow
def test_stock_mistral_is_exported_too(tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None) -> None:
    stock = MistralForCausalLM(stock_config(tiny_config))
    stock.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    convert_checkpoint(tmp_path / "hf", tmp_path / "consolidated", to="consolidated")
    ids = torch.randint(0, tiny_config.vocab_size, (17,))
    with torch.no_grad():
        logits = stock(ids[None]).logits[0]
    params = json.loads((tmp_path / "consolidated" / "params.json").read_text())
    assert params["max_position_embeddings"] == 512
    expected = reference_logits(read_weights(tmp_path / "consolidated"), params, ids)
    assert (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096: only None is this architecture"),
        (
            {"tie_word_embeddings": True},
            "tie_word_embeddings is True: only False is this architecture; load it with transformers, give lm_head a "
            "copy of the embeddings, set config.tie_word_embeddings to False, and save it",
        ),
        ({"model_type": "llama"}, "model_type is 'llama': only 'mistral' is this architecture"),
        ({"quantization_config": {}}, "quantization_config is {}: only None is this architecture"),
        ({"head_dim": 0}, "head_dim is 0: must be a whole number from 1 to 2147483647"),
        ({"head_dim": None}, "head_dim is missing"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            "rope_type is 'yarn': only 'default' is this architecture",
        ),
        (
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear"}},
            "rope_type is 'linear': only 'default' is this architecture",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
            "rope_theta is 0.0: must be a finite number greater than 0",
        ),
    ],
)
def test_a_config_that_params_cannot_say_is_refused(
    saved_model: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    shutil.copytree(saved_model, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    set_json(tmp_path / "hf" / "config.json", **change)
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/hf is not a complete hf checkpoint; nothing was done, fix or download it again:\n"
        f"  config.json: {problem}",
    ):
        convert_checkpoint(tmp_path / "hf", tmp_path / "consolidated", to="consolidated")
    assert not (tmp_path / "consolidated").exists()


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("head_dim", "head_dim"),
        ("rope_parameters", "rope_theta"),
        ("num_key_value_heads", "num_key_value_heads"),
        ("rms_norm_eps", "rms_norm_eps"),
    ],
)
def test_a_config_without_a_size_is_refused(saved_model: Path, tmp_path: Path, key: str, named: str) -> None:
    shutil.copytree(saved_model, tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", lambda config: config.pop(key))
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/hf is not a complete hf checkpoint; nothing was done, fix or download it again:\n"
        f"  config.json: {named} is missing",
    ):
        convert_checkpoint(tmp_path / "hf", tmp_path / "consolidated", to="consolidated")


def test_a_state_dict_that_does_not_fit_is_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    state_dict = MistralLargeForCausalLM(tiny_config).state_dict()
    state_dict["extra"] = state_dict.pop("lm_head.weight")
    state_dict["model.norm.weight"] = torch.zeros(80, dtype=torch.int64)
    with raises_exactly(
        CheckpointError,
        "the state dict does not fit its config; nothing was done, correct one of the two:\n"
        "  tensor 'model.norm.weight' has dtype I64, must be one of F32, F16, BF16, F8_E4M3, F8_E5M2\n"
        "  tensor 'extra' is extra: this geometry has none of that name\n"
        "  tensor 'lm_head.weight' is missing\n"
        "  tensors of dtypes F32, I64: a checkpoint has one; ask for a dtype to have them converted",
    ):
        export_checkpoint(state_dict, tmp_path / "consolidated", config=tiny_config)
    with raises_exactly(TypeError, "export_checkpoint() of a state dict needs its config"):
        export_checkpoint(state_dict, tmp_path / "consolidated")
    assert not (tmp_path / "consolidated").exists()


def test_files_are_readable_by_the_library_and_say_their_framework(small_source: Path, tmp_path: Path) -> None:
    plan = convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="100KB")
    for file in plan.files:
        path = tmp_path / "hf" / file.name
        assert path.stat().st_size == file.size
        # Data on a multiple of 8 bytes can be mapped into memory as numbers.
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {output.name for output in file.outputs}
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.tensor_bytes
    assert index["weight_map"] == {output.name: file.name for file in plan.files for output in file.outputs}


def test_a_single_file_needs_no_index(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors*")) == ["model.safetensors"]


def test_nothing_but_known_files_is_written_and_the_source_stays_as_it_is(small_source: Path, tmp_path: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in small_source.iterdir()}
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="100KB")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in small_source.iterdir()} == before
    for path in (tmp_path / "hf").iterdir():
        assert any(fnmatchcase(path.name, pattern) for pattern in OUTPUT_PATTERNS), path.name
        assert not path.name.endswith(".partial")


def test_the_bytes_are_the_same_on_every_run_and_for_every_way_to_split_the_source(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None
) -> None:
    torch.manual_seed(1)
    write_consolidated(tmp_path / "one", tiny_config, shards=1)
    torch.manual_seed(1)
    write_consolidated(tmp_path / "five", tiny_config, shards=5)
    for source in ("one", "five"):
        convert_checkpoint(tmp_path / source, tmp_path / f"{source}.hf", max_shard_size="200KB")
    assert contents(tmp_path / "one.hf") == contents(tmp_path / "five.hf")


def test_progress_counts_every_byte_of_the_tensors_once(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", 10_000)
    counts: list[int] = []
    plan = convert_checkpoint(small_source, tmp_path / "hf", progress=counts.append)
    assert sum(counts) == plan.tensor_bytes
    assert max(counts) <= 10_240


def test_memory_does_not_grow_with_the_tensors(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config.num_attention_heads = 200
    tiny_config.num_hidden_layers = 1
    write_consolidated(tmp_path / "source", tiny_config, torch.bfloat16)
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", 2**14)
    tracemalloc.start()
    plan = convert_checkpoint(tmp_path / "source", tmp_path / "hf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(tensor.source.size for file in plan.files for tensor in file.tensors)
    assert largest >= 1_000_000
    assert peak < largest / 2


@pytest.mark.slow
def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def recorded_sync(descriptor: int) -> None:
        sync(descriptor)
        events.append(("sync", os.fstat(descriptor).st_ino))

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(("rename", source.stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="100KB", jobs=1)
    renames = [position for position, (event, _) in enumerate(events) if event == "rename"]
    assert len(renames) == len(list((tmp_path / "hf").iterdir()))
    for position in renames:
        assert events[position - 1] == ("sync", events[position][1])
        assert events[position + 1] == ("sync", (tmp_path / "hf").stat().st_ino)


def into_source(source: Path) -> Iterator[Path]:
    yield source
    yield source / "hf"
    yield source.parent
    (source.parent / "link").symlink_to(source)
    yield source.parent / "link"
    yield source.parent / "link" / "hf"
    yield source / ".." / source.name


def test_the_source_and_folders_in_and_around_it_are_refused(small_source: Path) -> None:
    before = contents(small_source)
    for destination in into_source(small_source):
        problem = f"is, holds or is in the source {small_source}; choose a folder elsewhere"
        with raises_exactly(DestinationError, f"{destination}: {problem}"):
            convert_checkpoint(small_source, destination)
    link = small_source.parent / "link"
    problem = f"is, holds or is in the source {link}; choose a folder elsewhere"
    with raises_exactly(DestinationError, f"{small_source / 'hf'}: {problem}"):
        convert_checkpoint(link, small_source / "hf")
    assert contents(small_source) == before


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", ".hidden", "config.json"])
def test_a_folder_with_anything_in_it_is_refused(small_source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / name).write_text("mine")
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/hf: holds '{name}', not of an unfinished conversion; choose a new or empty folder",
    ):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert contents(tmp_path / "hf") == {name: b"mine"}


def test_a_link_in_place_of_the_marker_is_not_written_through(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / UNFINISHED_NAME).symlink_to(tmp_path / "precious")
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/hf: holds 'conversion.unfinished', not of an unfinished conversion; choose a new or empty folder",
    ):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_empty_folder_is_taken_and_a_file_is_refused(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    convert_checkpoint(small_source, tmp_path / "hf")
    with raises_exactly(DestinationError, f"{tmp_path}/hf/config.json: is a file; choose a new or an empty folder"):
        convert_checkpoint(small_source, tmp_path / "hf" / "config.json")
    convert_checkpoint(small_source, tmp_path / "new" / "deep" / "hf")


def test_a_disk_without_room_is_refused_first(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    problem = f"{tmp_path / 'hf'}: needs <*> bytes, the disk has 500,000 free; make room or choose another disk"
    with pytest.raises(DestinationError, match=whole(problem)):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_weights_for_another_vocabulary_are_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    write_consolidated(tmp_path / "source", tiny_config)
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/source/tokenizer.model.v3: has 32768 pieces, the weights have 768 rows; take both from one "
        "checkpoint",
    ):
        convert_checkpoint(tmp_path / "source", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_foreign_tokenizer_file_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model.v3").write_bytes(b"not SentencePiece")
    with pytest.raises(TokenizerFileError):
        convert_checkpoint(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_tokenizer_that_is_not_exact_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = TextEncoder.__call__
    monkeypatch.setattr(
        TextEncoder, "__call__", lambda self, text: exact(self, text)[: -1 if "REFERENCE_DOC" in text else None]
    )
    with raises_exactly(
        CheckpointError,
        f"{source}/tokenizer.model.v3: converted ids of '[REFERENCE_DOC_0] user-defined pieces [R' are not "
        "SentencePiece's",
    ):
        convert_checkpoint(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_only_the_tokenizer_model_is_read_of_the_tokenizers_in_the_source(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "expected")
    # Such files are in the vendor's folder too.
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("another template")
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": "another template", "pad_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
    convert_checkpoint(source, tmp_path / "hf")
    assert contents(tmp_path / "hf") == contents(tmp_path / "expected")


def test_weights_without_a_licence_get_the_vendors(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    agreement = (tmp_path / "hf" / "LICENSE").read_text()
    assert agreement.startswith("# Mistral AI Research License\n")
    assert '"You": means the individual or entity entering into this Agreement with\nMistral AI.\n' in agreement
    notice = (tmp_path / "hf" / "Notice").read_text()
    assert notice == "Licensed by Mistral AI under the Mistral AI Research License\n"
    card = (tmp_path / "hf" / "README.md").read_text()
    front_matter = card.split("---\n")[1].splitlines()
    for line in ("license: other", "license_name: mrl", "base_model: mistralai/Mistral-Large-Instruct-2407"):
        assert line in front_matter
    assert "**This checkpoint was modified.**" in card
    assert "import modeling_mistral_large" in card


def test_a_licence_of_the_source_goes_along_and_is_not_called_the_vendors(small_source: Path, tmp_path: Path) -> None:
    (small_source / "LICENSE").write_text("Apache License, Version 2.0")
    convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "hf" / "LICENSE").read_text() == "Apache License, Version 2.0"
    assert not (tmp_path / "hf" / "Notice").exists()
    card = (tmp_path / "hf" / "README.md").read_text()
    for claim in ("mrl", "base_model", "Research License", "Instruct-2407"):
        assert claim not in card
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="consolidated")
    assert (tmp_path / "back" / "LICENSE").read_text() == "Apache License, Version 2.0"


@pytest.mark.slow
def test_the_vendors_licence_stays_the_vendors_on_every_way(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="consolidated")
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "hf")


def test_a_licence_that_is_a_link_out_is_refused(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("secret")
    (small_source / "LICENSE").symlink_to(tmp_path / "elsewhere")
    with raises_exactly(
        CheckpointError,
        f"{small_source}: LICENSE is a link out of the folder, to '{tmp_path}/elsewhere'; the licence must go with "
        "the weights",
    ):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_no_file_says_where_it_was_made(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "hf")
    for name, content in contents(tmp_path / "hf").items():
        assert str(tmp_path).encode() not in content, name
        assert b"/tmp/" not in content, name

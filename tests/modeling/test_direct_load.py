"""Consolidated checkpoints loaded as they are, against load after conversion and against stock transformers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralForCausalLM,
    QuantoConfig,
    pipeline,
)
from transformers.distributed.configuration_utils import DistributedConfig

from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
from mistral_large_conversion import convert_checkpoint, hf_files
from mistral_large_conversion.checkpoint.hub import find_consolidated
from mistral_large_conversion.checkpoint.read import read_checkpoint
from mistral_large_conversion.errors import CheckpointError
from modeling_mistral_large import (
    MistralLargeConfig,
    MistralLargeForCausalLM,
    MistralLargeForSequenceClassification,
    MistralLargeModel,
    MistralLargeTokenizer,
)
from modeling_mistral_large.consolidated_loading import SplitRopePairs, index_of
from tests.conversion.test_hub import hub  # noqa: F401  # a fixture
from tests.support.checkpoints import write_consolidated
from tests.support.errors import raises_exactly, whole
from tests.support.loopback_hub import REPOSITORY, LoopbackHub
from tests.support.models import ATTENTION, GREEDY, random_ids, stock_config
from tests.support.reference_model import reference_logits
from tests.support.tensor_parallel import PROMPT
from tests.support.warm_python import WarmPython

# Fewer rows than the tokenizer has pieces, as nothing here is generated of them.
CONFIG = MistralLargeConfig(
    vocab_size=768,
    hidden_size=80,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)
DTYPES = [torch.float32, torch.bfloat16]
SHARD_SIZE = "300KB"
LAYOUTS = ["one file", "two files", "two files with an index"]
# Layout, dtype that is asked for, dtype that is stored.
QUICK = [("one file", "auto", torch.float32), ("two files with an index", torch.float32, torch.bfloat16)]
MODULES = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
LAYERS = [f"model.layers.{layer}" for layer in range(3)]


@dataclass(frozen=True)
class Checkpoint:
    """The same weights in both layouts."""

    consolidated: Path
    hf: Path
    params: dict[str, Any]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, converted_tokenizer: dict[str, bytes]
) -> dict[torch.dtype, Checkpoint]:
    torch.manual_seed(20240724)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_files, "tokenizer_files", lambda *_, **__: converted_tokenizer)
        for dtype in DTYPES:
            folder = tmp_path_factory.mktemp("checkpoint")
            params, weights = write_consolidated(folder / "consolidated", CONFIG, dtype)
            convert_checkpoint(folder / "consolidated", folder / "hf", max_shard_size=SHARD_SIZE)
            found[dtype] = Checkpoint(folder / "consolidated", folder / "hf", params, weights)
            assert len([*(folder / "hf").glob("*.safetensors")]) > 1
    return found


@pytest.fixture(scope="module")
def converted_and_stock(
    checkpoints: dict[torch.dtype, Checkpoint],
) -> Callable[[torch.dtype, torch.dtype | str, str], tuple[Any, Any]]:
    """Ours and stock Mistral loaded from the converted checkpoint, once for all tests, which change neither."""

    @cache
    def models(stored: torch.dtype, dtype: torch.dtype | str, attention: str) -> tuple[Any, Any]:
        folder = checkpoints[stored].hf
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        return load(folder, **options), MistralForCausalLM.from_pretrained(
            folder, config=stock_config(CONFIG), **options
        )

    return models


@pytest.fixture
def checkpoint(checkpoints: dict[torch.dtype, Checkpoint]) -> Checkpoint:
    return checkpoints[torch.float32]


@pytest.fixture
def damaged(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(checkpoint.consolidated, tmp_path / "damaged")


def published(checkpoint: Checkpoint, folder: Path) -> Path:
    """The consolidated files, and what the vendor's folder holds besides: useless here, wherever it is read."""
    shutil.copytree(checkpoint.consolidated, folder)
    config = {**stock_config(CONFIG).to_dict(), "num_hidden_layers": 2, "rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    for name, tensors in load_tensors(checkpoint.hf).items():
        save_file({tensor: torch.zeros_like(value) for tensor, value in tensors.items()}, folder / name)
    shutil.copy(checkpoint.hf / "model.safetensors.index.json", folder)
    shutil.copy(checkpoint.hf / "tokenizer.json", folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": "another template", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def load(folder: Path, **options: Any) -> Any:
    return MistralLargeForCausalLM.from_pretrained(folder, **options)


def assert_same_tensors(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    tensors = expected.state_dict()
    assert list(found.state_dict()) == list(tensors)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype is tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name


def assert_same_logits(found: Any, expected: Any) -> None:
    ids = random_ids(CONFIG, 2, 23)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("layout", "dtype", "stored"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
        for each in product(LAYOUTS, ["auto", *DTYPES], DTYPES)
    ],
    ids=str,
)
def test_tensors_and_logits_are_those_after_conversion(
    checkpoints: dict[torch.dtype, Checkpoint],
    converted_and_stock: Callable[[torch.dtype, torch.dtype | str, str], tuple[Any, Any]],
    stored: torch.dtype,
    dtype: Any,
    layout: str,
    tmp_path: Path,
) -> None:
    folder = checkpoints[stored].consolidated
    if layout == "one file":
        weights = {name: tensor for tensors in load_tensors(folder).values() for name, tensor in tensors.items()}
        save_file(weights, tmp_path / "consolidated.safetensors")
        shutil.copy(folder / "params.json", tmp_path)
        folder = tmp_path
    elif layout == "two files with an index":
        weight_map = {name: file for file, tensors in load_tensors(folder).items() for name in tensors}
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        folder = tmp_path
    for attention in ATTENTION:
        options = {"dtype": dtype, "attn_implementation": attention}
        found, info = load(folder, output_loading_info=True, **options)
        converted, stock = converted_and_stock(stored, dtype, attention)
        assert not any(info.values())
        assert found.dtype is converted.dtype is (stored if dtype == "auto" else dtype)
        assert_same_tensors(found, converted)
        assert_same_tensors(found, stock)
        assert_same_logits(found, stock)
        assert found.generation_config.to_dict() == converted.generation_config.to_dict()
        named = {"_name_or_path": str(folder), "architectures": ["MistralLargeForCausalLM"]}
        assert {**found.config.to_dict(), **named} == {**converted.config.to_dict(), **named}
        assert found.name_or_path == found.config.name_or_path == str(folder)


def test_logits_are_the_plain_references(checkpoint: Checkpoint) -> None:
    model = load(checkpoint.consolidated)
    ids = random_ids(CONFIG, 1, 41)
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert (logits - reference_logits(checkpoint.weights, checkpoint.params, ids[0])).abs().max() <= 1e-5


@pytest.mark.parametrize("stored", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("cpu", {"": "cpu"}, dict.fromkeys([*MODULES, *LAYERS], "cpu"))
        ),
    ],
    ids=lambda _: "",
)
def test_device_maps_of_the_cpu_change_nothing(
    checkpoints: dict[torch.dtype, Checkpoint], stored: torch.dtype, device_map: Any
) -> None:
    found = load(checkpoints[stored].consolidated, device_map=device_map)
    expected = load(checkpoints[stored].hf)
    assert_same_tensors(found, expected)
    assert_same_logits(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device beside the CPU")
def test_two_devices_and_the_disk_share_the_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    device_map = dict.fromkeys(MODULES, 0) | {LAYERS[0]: 0, LAYERS[1]: "cpu", LAYERS[2]: "disk"}
    models = [
        load(folder, device_map=device_map, offload_folder=tmp_path / folder.name)
        for folder in (checkpoint.consolidated, checkpoint.hf)
    ]
    assert_same_logits(*models)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_layers_on_the_disk_only_queries_and_keys_are_written_anew(
    checkpoint: Checkpoint, dtype: torch.dtype, tmp_path: Path
) -> None:
    device_map = dict.fromkeys([*MODULES, LAYERS[0]], "cpu") | dict.fromkeys(LAYERS[1:], "disk")
    found = load(checkpoint.consolidated, dtype=dtype, device_map=device_map, offload_folder=tmp_path / "offload")
    assert found.model.layers[2].mlp.up_proj.weight.is_meta
    assert_same_logits(found, load(checkpoint.hf, dtype=dtype))
    assert sorted(path.name for path in (tmp_path / "offload").iterdir()) == sorted(
        f"{layer}.self_attn.{name}_proj.weight.safetensors" for layer in LAYERS[1:] for name in "qk"
    )
    found.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load(tmp_path / "saved"), load(checkpoint.hf, dtype=dtype))


def test_the_folder_given_to_transformers_holds_an_index_and_nothing_else(checkpoint: Checkpoint) -> None:
    tensors = read_checkpoint(checkpoint.consolidated, "consolidated").tensors
    with index_of(list(tensors.values())) as folder:
        (index,) = folder.iterdir()
        weight_map = json.loads(index.read_text())["weight_map"]
        assert {Path(file).parent for file in weight_map.values()} == {checkpoint.consolidated}
        assert set(weight_map) == set(checkpoint.weights)
    assert not folder.exists()


@pytest.mark.slow
def test_where_a_folder_has_both_layouts_only_the_consolidated_one_is_read(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = published(checkpoint, tmp_path / "published")
    expected = load(checkpoint.hf)
    config = MistralLargeConfig.from_pretrained(folder)
    for found in (
        load(folder),
        load(folder, config=config),
        AutoModelForCausalLM.from_pretrained(folder, config=config),
    ):
        assert_same_tensors(found, expected)
        assert_same_logits(found, expected)
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    converted = MistralLargeTokenizer.from_pretrained(checkpoint.hf)
    assert tokenizer.chat_template == converted.chat_template
    assert tokenizer.pad_token == converted.pad_token
    assert tokenizer.name_or_path == str(folder)
    assert tokenizer.encode("a  b [INST]") == converted.encode("a  b [INST]")


def test_a_missing_shard_without_an_index_never_becomes_random_weights(damaged: Path) -> None:
    (damaged / "consolidated-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        load(damaged)
    assert str(error.value).splitlines() == [
        f"{damaged} is not a complete consolidated checkpoint; nothing was done, fix or download it again:",
        "  consolidated-00002-of-00002.safetensors is missing",
    ]


def test_everything_wrong_with_the_tensors_is_one_error(damaged: Path) -> None:
    first, second = sorted(damaged.glob("*.safetensors"))
    of_first, of_second = load_file(first), load_file(second)
    missing = "layers.1.feed_forward.w2.weight"
    (of_first if missing in of_first else of_second).pop(missing)
    twice = "layers.2.attention.wk.weight"
    of_first[twice] = of_second[twice] = torch.zeros(64, 80)
    of_first["layers.0.attention.wq.weight"] = torch.zeros(64, 80)
    of_first["layers.0.attention.rope.freqs"] = torch.zeros(16)
    of_second.pop("layers.0.attention.wq.weight", None)
    save_file(of_first, first)
    save_file(of_second, second)
    with pytest.raises(CheckpointError) as error:
        load(damaged)
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  tensor 'layers.0.attention.rope.freqs' is extra: this geometry has none of that name",
        "  tensor 'layers.0.attention.wq.weight' has shape [64, 80], this geometry needs [192, 80]",
        "  tensor 'layers.1.feed_forward.w2.weight' is missing",
        "  tensor 'layers.2.attention.wk.weight' is there twice",
    ]


INCOMPLETE = "{} is not a complete consolidated checkpoint; nothing was done, fix or download it again:\n  {}"
MISSING_KEYS = ("n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "rope_theta")
NO_GEOMETRY = (
    f"not a Mistral Large geometry: {'; '.join(f'{key} is missing' for key in MISSING_KEYS)}; no other architecture "
    "runs here; take the file that was published with the weights"
)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (None, "params.json is missing"),
        ("{", "params.json: Expecting <*>"),
        ('{"dim": 80}', "\n  ".join(f"params.json: {key} is missing" for key in MISSING_KEYS)),
    ],
)
def test_a_config_without_its_params_is_one_error(damaged: Path, params: str | None, problem: str) -> None:
    (damaged / "params.json").unlink()
    if params is not None:
        (damaged / "params.json").write_text(params)
    config_problem = {
        "{": f"{damaged}/params.json: Expecting <*>; download it again",
        '{"dim": 80}': f"{damaged}/params.json: {NO_GEOMETRY}",
    }.get(params or "", f"{damaged}: params.json is missing; it holds the geometry of the weights, download it again")
    with pytest.raises(CheckpointError, match=whole(config_problem)):
        MistralLargeConfig.from_pretrained(damaged)
    with pytest.raises(CheckpointError, match=whole(INCOMPLETE.format(damaged, problem))):
        load(damaged)


def test_params_without_weights_are_a_consolidated_folder_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copy(checkpoint.consolidated / "params.json", tmp_path)
    assert MistralLargeConfig.from_pretrained(tmp_path).hidden_size == 80
    problem = "no consolidated.safetensors and no consolidated-00001-of-….safetensors"
    with raises_exactly(CheckpointError, INCOMPLETE.format(tmp_path, problem)):
        load(tmp_path)


def test_the_config_takes_options_as_one_from_config_json(checkpoint: Checkpoint) -> None:
    folder = checkpoint.consolidated
    of_the_files = ("_name_or_path", "architectures", "dtype")
    configs = [MistralLargeConfig.from_pretrained(path).to_dict() for path in (folder, checkpoint.hf)]
    assert {**configs[0], **dict.fromkeys(of_the_files)} == {**configs[1], **dict.fromkeys(of_the_files)}
    config, unused = MistralLargeConfig.from_pretrained(
        folder, attention_dropout=0.5, other=1, return_unused_kwargs=True, token=False, trust_remote_code=False
    )
    assert config.attention_dropout == 0.5
    assert unused == {"other": 1}
    assert load(folder, attention_dropout=0.25).config.attention_dropout == 0.25


@pytest.mark.slow
def test_a_subfolder_is_looked_into(checkpoint: Checkpoint) -> None:
    name = checkpoint.consolidated.name
    model = load(checkpoint.consolidated.parent, subfolder=name)
    assert_same_tensors(model, load(checkpoint.hf))
    tokenizer = MistralLargeTokenizer.from_pretrained(checkpoint.consolidated.parent, subfolder=name)
    assert tokenizer.encode("Hello") == [1, 23325]


def test_what_asks_for_other_files_is_left_to_transformers(checkpoint: Checkpoint) -> None:
    for options in ({"variant": "fp16"}, {"use_safetensors": False}, {"gguf_file": "model.gguf"}):
        assert find_consolidated(checkpoint.consolidated, options) is None
    assert find_consolidated(None, {}) is None
    assert find_consolidated(checkpoint.hf, {}) is None
    with pytest.raises(OSError, match=str(checkpoint.consolidated)):
        load(checkpoint.consolidated, config=CONFIG, variant="fp16")


@pytest.mark.slow
@pytest.mark.parametrize("with_config", [False, True])
def test_the_auto_classes_load_a_consolidated_folder(checkpoint: Checkpoint, with_config: bool) -> None:
    folder = checkpoint.consolidated
    config = MistralLargeConfig.from_pretrained(folder)
    options: dict[str, Any] = {"config": config} if with_config else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is MistralLargeForCausalLM
    assert_same_tensors(model, load(checkpoint.hf))
    assert type(AutoTokenizer.from_pretrained(folder, **options)) is MistralLargeTokenizer
    assert AutoConfig.from_pretrained(folder).to_dict() == {**config.to_dict(), "_name_or_path": str(folder)}
    assert config.architectures == ["MistralLargeForCausalLM"]
    chat: Any = pipeline("text-generation", model=str(folder), **options)
    assert type(chat.model) is MistralLargeForCausalLM
    assert type(chat.tokenizer) is MistralLargeTokenizer


def test_the_auto_classes_say_of_other_folders_what_they_said(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type"):
        AutoConfig.from_pretrained(tmp_path)
    (damaged / "params.json").write_text('{"dim": 80}')
    with raises_exactly(CheckpointError, f"{damaged}/params.json: {NO_GEOMETRY}"):
        AutoConfig.from_pretrained(damaged)


@pytest.mark.slow
def test_the_pipeline_and_generate_give_the_golden_answers(tmp_path: Path) -> None:
    folder = assemble_demo_checkpoint(tmp_path / "demo")
    model = load(folder, dtype=torch.float32)
    tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for number, golden in enumerate(golden_conversations().values()):
        message = chat(golden.messages, tools=golden.tools, max_new_tokens=128)[0]["generated_text"][-1]
        assert message["content"] == tokenizer.parse_response(golden.answer)["content"]
        assert ("tool_calls" in message) == golden.answer.startswith("[TOOL_CALLS]")
        # The pipeline has written the others by `generate`.
        if number % 4 == 0:
            prompt = tokenizer.apply_chat_template(golden.messages, tools=golden.tools, return_tensors="pt")
            answer = model.generate(**prompt, max_new_tokens=128)[0, prompt["input_ids"].shape[1] :]
            text = str(tokenizer.decode(answer))
            assert text.removesuffix("</s>").strip() == golden.answer.removesuffix("</s>").strip()


def test_a_directly_loaded_model_is_saved_in_the_hf_layout(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = load(checkpoint.consolidated)
    model.save_pretrained(tmp_path / "saved", max_shard_size=SHARD_SIZE)
    names = {name for tensors in load_tensors(tmp_path / "saved").values() for name in tensors}
    assert names == set(model.state_dict())
    assert "transformers_weights" not in (tmp_path / "saved" / "config.json").read_text()
    assert_same_tensors(load(tmp_path / "saved"), load(checkpoint.hf))
    stock = MistralForCausalLM.from_pretrained(tmp_path / "saved", config=stock_config(CONFIG))
    assert_same_tensors(stock, model)
    with raises_exactly(
        ValueError,
        "save_original_format=True: the consolidated layout has files of its own, which transformers does not write; "
        "call mistral_large_conversion.export_checkpoint(model, folder)",
    ):
        model.save_pretrained(tmp_path / "original", save_original_format=True)
    assert not (tmp_path / "original").exists()


@pytest.mark.slow
def test_the_table_leaves_saved_base_models_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    # Without a head, HF names begin as consolidated ones do: `layers.0.`, `norm.weight`.
    base = MistralLargeModel.from_pretrained(checkpoint.consolidated)
    assert_same_tensors(base, load(checkpoint.hf).model)
    base.save_pretrained(tmp_path / "base")
    assert_same_tensors(MistralLargeModel.from_pretrained(tmp_path / "base"), base)
    assert_same_tensors(MistralLargeModel.from_pretrained(checkpoint.hf), base)
    assert_same_tensors(load(tmp_path / "base").model, base)


def test_other_heads_get_the_decoder_and_a_new_head(checkpoint: Checkpoint) -> None:
    model, info = MistralLargeForSequenceClassification.from_pretrained(
        checkpoint.consolidated, num_labels=3, output_loading_info=True
    )
    assert_same_tensors(model.model, load(checkpoint.hf).model)
    assert info["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] == {"lm_head.weight"}


@pytest.mark.slow
@pytest.mark.usefixtures("quanto_kernels")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantizers_get_the_converted_weights(checkpoint: Checkpoint, weights: str) -> None:
    found, expected = (
        load(folder, quantization_config=QuantoConfig(weights=weights))
        for folder in (checkpoint.consolidated, checkpoint.hf)
    )
    assert type(found.model.layers[0].self_attn.q_proj).__name__ == "QLinear"
    assert_same_logits(found, expected)
    ids = random_ids(CONFIG, 1, 7)
    assert not torch.equal(*(model(ids).logits for model in (found, load(checkpoint.hf))))


@pytest.mark.slow
def test_adapters_fit_both_ways_of_loading(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    trained = get_peft_model(load(checkpoint.consolidated), settings)
    trained.save_pretrained(str(tmp_path))
    ids = random_ids(CONFIG, 1, 11)
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        assert not torch.equal(expected, load(checkpoint.hf)(ids).logits)
        for folder in (checkpoint.consolidated, checkpoint.hf):
            assert torch.equal(PeftModel.from_pretrained(load(folder), tmp_path)(input_ids=ids).logits, expected)
            model = load(folder)
            model.load_adapter(str(tmp_path))
            assert torch.equal(model(ids).logits, expected)


def test_a_ranks_share_of_the_rows_is_split_by_its_own_heads() -> None:
    rows = torch.randn(6 * 32, 5)

    def split(rows: Tensor) -> Tensor:
        ((converted,),) = SplitRopePairs().convert({"q": [rows]}, ["q"], ["q"], config=CONFIG).values()
        return converted

    assert torch.equal(torch.cat([split(rows[:64]), split(rows[64:])]), split(rows))
    assert not torch.equal(split(rows), rows)


def test_key_heads_are_not_cut(checkpoint: Checkpoint) -> None:
    model = load(checkpoint.hf)
    with raises_exactly(
        ValueError,
        "tensor parallelism of 4: must divide the 2 key-value heads, which are not sharded; use fewer ranks, or "
        "device_map instead",
    ):
        MistralLargeForCausalLM.maybe_distribute_model(model, DistributedConfig(tp_size=4), None)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="the ranks talk through gloo")
def test_two_ranks_say_the_same_as_one(tmp_path: Path, demo_folder: Path, warm_python: WarmPython) -> None:
    folder = assemble_demo_checkpoint(tmp_path / "demo")
    model = load(demo_folder, dtype=torch.float32)
    prompt = torch.tensor(PROMPT)
    threads = torch.get_num_threads()
    # As many as there are ranks: sums are then cut alike.
    torch.set_num_threads(2)
    with torch.no_grad():
        logits = model(prompt).logits
    torch.set_num_threads(threads)
    tokens = model.generate(prompt, **GREEDY)
    for source in (folder, demo_folder):
        warm_python.run_two_ranks("tests.support.tensor_parallel", source, tmp_path / "result")
        found = torch.load(tmp_path / "result", weights_only=True)
        # Half of the two key heads.
        assert found["key_rows"] == model.config.head_dim
        assert torch.equal(found["tokens"], tokens)
        assert (found["logits"] - logits).abs().max() <= 1e-5


@pytest.mark.slow
def test_a_repository_is_loaded_from_what_is_needed_of_it(hub: LoopbackHub, demo_folder: Path) -> None:  # noqa: F811
    config = MistralLargeConfig.from_pretrained(REPOSITORY)
    assert config.hidden_size == 64
    assert hub.downloaded == {"params.json"}
    tokenizer = MistralLargeTokenizer.from_pretrained(REPOSITORY)
    assert tokenizer.encode("Hello") == [1, 23325]
    assert hub.downloaded == {"params.json", "tokenizer.model.v3"}
    model = load(Path(REPOSITORY))
    assert_same_tensors(model, load(demo_folder))
    assert not any(name.startswith("model-") or name.endswith("config.json") for name in hub.downloaded)
    assert model.name_or_path == REPOSITORY


@pytest.mark.slow
def test_a_repository_without_params_is_left_to_transformers(hub: LoopbackHub, demo_folder: Path) -> None:  # noqa: F811
    hub.folder = demo_folder
    assert_same_tensors(load(Path(REPOSITORY)), load(demo_folder))
    assert "params.json" not in hub.downloaded

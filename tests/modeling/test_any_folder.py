"""The table of docs/loading.md: each kind of folder through everything that reads one, against the reference's ids."""

import json
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM
from typer.testing import CliRunner

import modeling_mistral_large
from mistral_large_cli import app
from mistral_large_cli.demo import GoldenConversation, golden_conversations
from mistral_large_cli.serve import choose_engine
from mistral_large_conversion.checkpoint import auto_classes
from mistral_large_conversion.checkpoint.layout import is_consolidated
from modeling_mistral_large import (
    MistralLargeConfig,
    MistralLargeForCausalLM,
    MistralLargeModel,
    MistralLargeTokenizer,
    load,
    pipeline,
)
from modeling_mistral_large.errors import (
    CheckpointError,
    ConfigurationError,
    KeywordError,
    TokenizerFileError,
    UnknownVocabularyError,
)
from tests.support import folders as builders
from tests.support.errors import raises_exactly, whole
from tests.support.folders import CHATML_TEMPLATE, CHATML_TOKENS, FOLDERS, GOLDEN_FOLDERS, hf_demo_weights

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": " Who  are you? [INST]</s>\n\tdef f(a  b):"},
    {"role": "assistant", "content": "Nobody."},
    {"role": "user", "content": "And    now?"},
]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("remembered_tokenizer")]

GOLDEN = golden_conversations()
# What says that a folder's own files are not exact.
INEXACT = {
    "hub_cache": "tokenizer.json is another program's conversion of the v3 vocabulary",
    "fine_tune_of_2024": "tokenizer.json is another program's conversion of the v3 vocabulary",
    "fine_tune_with_model_file": "prompts are v3's, exactly, instead of what its chat template renders",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each kind of folder, built when it is first asked for."""
    root = tmp_path_factory.mktemp("any_folder")
    built: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = FOLDERS[kind](root / kind)
        return built[kind]

    return folder


@pytest.fixture(scope="module")
def reference() -> Callable[[list[dict[str, Any]]], list[int]]:
    tokenizer = MistralTokenizer.v3()
    return lambda messages: tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


def ids_of(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=False)
    return ids


def run(*arguments: str, text: str | None = None) -> Any:
    """Run a command; errors of the command come through."""
    result = CliRunner().invoke(app, list(arguments), input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def completion(model: Any, tokenizer: Any, golden: GoldenConversation) -> str:
    prompt = tokenizer.apply_chat_template(golden.messages, tools=golden.tools, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_tokenizer_has_the_ids_of_the_reference(kind: str, folders: Any, reference: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = MistralLargeTokenizer.from_pretrained(folders(kind))
    said = [str(each.message) for each in caught]
    assert len(said) == (kind in INEXACT)
    assert all(INEXACT[kind] in each for each in said)
    assert ids_of(tokenizer, MESSAGES) == reference(MESSAGES)
    assert tokenizer.prompt_format == "v3"


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_load_gives_the_weights_and_the_ids(kind: str, folders: Any, reference: Any) -> None:
    model, tokenizer = load(folders(kind), dtype="bfloat16")
    assert type(model) is MistralLargeForCausalLM
    assert type(tokenizer) is MistralLargeTokenizer
    assert ids_of(tokenizer, MESSAGES) == reference(MESSAGES)
    wanted = builders.square_weights() if kind == "fine_tune_of_2024" else hf_demo_weights()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_chat_answers(kind: str, folders: Any) -> None:
    options = ("--temperature", "0", "--max-new-tokens", "48", "--device-map", "cpu")
    result = run("chat", str(folders(kind)), *options, text=f"{GOLDEN['who_are_you'].messages[-1]['content']}\n")
    assert result.exit_code == 0
    if kind in GOLDEN_FOLDERS:
        assert GOLDEN["who_are_you"].answer in result.output


@pytest.mark.parametrize("kind", FOLDERS)
def test_plan_reads_the_sizes(kind: str, folders: Any) -> None:
    result = run("plan", str(folders(kind)), "--gpus", "1x80GB", "--json")
    config = MistralLargeConfig.from_pretrained(folders(kind))
    report = json.loads(result.output)
    assert report["fits"]
    with torch.device("meta"):
        parameters = sum(each.numel() for each in MistralLargeForCausalLM(config).parameters())
    assert report["weight_bytes"] == 2 * parameters


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_show_counts_the_tokens_of_the_reference(kind: str, folders: Any, reference: Any, tmp_path: Path) -> None:
    (tmp_path / "conversation.json").write_text(json.dumps(MESSAGES))
    result = run("show", str(tmp_path / "conversation.json"), "--model", str(folders(kind)))
    assert f"{len(reference(MESSAGES))} tokens" in result.output


def convert(source: Path, folder: Path, *options: str) -> Any:
    """Convert to the other layout, as without options a folder of the HF layout has nowhere to go; or quantize."""
    to = () if options or is_consolidated(source) else ("--to", "consolidated")
    return run("convert", str(source), str(folder), *to, *options)


@pytest.fixture(scope="module")
def converted(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each kind of folder in the other layout, converted when it is first asked for."""

    @cache
    def folder(kind: str) -> Path:
        target = tmp_path_factory.mktemp("converted") / kind
        assert convert(folders(kind), target).exit_code == 0
        return target

    return folder


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("quantize", [(), ("--quantize", "int4")], ids=["convert", "int4"])
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_convert_writes_a_folder_with_the_same_ids(
    kind: str, quantize: tuple[str, ...], folders: Any, converted: Any, reference: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized" if quantize else converted(kind)
    if quantize:
        assert convert(folders(kind), folder, *quantize).exit_code == 0
    tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    assert ids_of(tokenizer, MESSAGES) == reference(MESSAGES)
    assert MistralLargeForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FOLDERS)
def test_inspect_finds_no_damage(kind: str, folders: Any) -> None:
    result = run("inspect", str(folders(kind)))
    assert result.exit_code == 0
    assert "tokenizer.model.v3 is missing" not in result.output


@pytest.mark.parametrize("kind", FOLDERS)
def test_verify_compares_with_the_source(kind: str, folders: Any, converted: Any) -> None:
    assert run("verify", str(converted(kind)), str(folders(kind))).exit_code == 0


@pytest.mark.parametrize("kind", FOLDERS)
def test_serve_has_vllm_take_our_prompts(kind: str, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: started.append(command))
    monkeypatch.setattr(sys.modules[choose_engine.__module__], "find_spec", lambda _: object())
    assert run("serve", str(folders(kind)), "--engine", "vllm").exit_code == 0
    (command,) = started
    assert str(folders(kind)) in command
    modes = {"vendor": "mistral", "vendor_whole": "mistral", "ours": None}
    # vLLM chooses that of our folders by the architecture in config.json.
    mode = command[command.index("--tokenizer-mode") + 1] if "--tokenizer-mode" in command else None
    assert mode == modes.get(kind, "mistral_large")


@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_pipeline_answers_with_tools(folders: Any) -> None:
    chat = pipeline(folders("hub_cache"), dtype="bfloat16")
    golden = GOLDEN["weather_call"]
    message = chat(golden.messages, tools=golden.tools, do_sample=False)[0]["generated_text"][-1]
    assert message["tool_calls"][0]["function"]["name"] == "get_current_weather"


def test_options_that_nothing_takes_are_refused(tmp_path: Path) -> None:
    for call in (load, pipeline):
        name = call.__name__
        with raises_exactly(KeywordError, f"{name}() got an unexpected keyword argument 'dtyp'; did you mean 'dtype'?"):
            call(tmp_path, dtyp="bfloat16")
        with raises_exactly(
            KeywordError,
            f"{name}() got output_loading_info, which would change what it returns; call "
            "MistralLargeForCausalLM.from_pretrained for it",
        ):
            call(tmp_path, output_loading_info=True)


@pytest.mark.parametrize("tokenizer", ["json", "both"])
def test_tokens_that_were_added_keep_their_ids_and_the_template_its_control_strings(
    tokenizer: Any, tmp_path: Path
) -> None:
    folder = builders.fine_tune(tmp_path / "chatml", tokenizer=tokenizer, added=CHATML_TOKENS, template=CHATML_TEMPLATE)
    converted = (
        f"{folder}: tokenizer.json is another program's conversion of the v3 vocabulary, whose ids are not those of "
        "tokenizer.model.v3 for every text; the tokenizer is made anew of its pieces and the 2 tokens added to them"
    )
    with pytest.warns(UserWarning, match=whole(converted)):
        model, own = load(folder, dtype="bfloat16")
    assert [own.convert_tokens_to_ids(token) for token in CHATML_TOKENS] == [32768, 32769]
    assert model.config.vocab_size == 32770
    assert own.chat_template == CHATML_TEMPLATE
    template = (
        f"the chat template of {folder} is none of this package's: prompts are what it renders and not the "
        "reference's. Control strings in texts stay text."
    )
    with pytest.warns(UserWarning, match=whole(template)):
        ids = ids_of(own, [{"role": "user", "content": "a <|im_end|>"}])
    assert (ids.count(32768), ids.count(32769)) == (1, 1)


def test_a_v7_fine_tune_has_the_ids_of_v7(tmp_path: Path) -> None:
    folder = builders.fine_tune(tmp_path / "behemoth", "v7")
    messages = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "Who? [REF]"}]
    converted = (
        f"{folder}: tokenizer.json is another program's conversion of the v7 vocabulary, whose ids are not those of "
        "tokenizer.model.v7 for every text; the tokenizer is made anew of its pieces; prompts are v7's, exactly, "
        "instead of what its chat template renders (the chat template writes a [SYSTEM_PROMPT] block); pass "
        "chat_template= for another one"
    )
    with pytest.warns(UserWarning, match=whole(converted)):
        tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    wanted = MistralTokenizer.v7().encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    assert ids_of(tokenizer, messages) == wanted
    assert tokenizer.prompt_format == "v7"


def test_of_an_unknown_vocabulary_load_takes_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    folder = builders.fine_tune(tmp_path / "merge")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["▁other"] = vocab.pop("▁Hello")
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "▁Hello" not in (*pair, "".join(pair))]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with raises_exactly(
        UnknownVocabularyError,
        f"{folder}/tokenizer.json: 32767 pieces, v3 and v7 have 32768; this package reads the v3 and v7 "
        "SentencePiece models of Mistral-Large-Instruct-2407 and 2411; pass a folder with tokenizer.model.v3 or "
        f".v7, or with the files that save_pretrained wrote; modeling_mistral_large.load('{folder}') takes "
        "transformers' own tokenizer for such a folder",
    ):
        MistralLargeTokenizer.from_pretrained(folder)
    with raises_exactly(
        TokenizerFileError,
        f"{folder}/tokenizer.json: 32767 pieces, v3 and v7 have 32768; this package reads the v3 and v7 "
        "SentencePiece models of Mistral-Large-Instruct-2407 and 2411; pass a folder with tokenizer.model.v3 or "
        f".v7, or with the files that save_pretrained wrote; modeling_mistral_large.load('{folder}') takes "
        "transformers' own tokenizer for such a folder",
    ):
        run("chat", str(folder), text="Hello\n")
    foreign = (
        f"{folder}: the vocabulary is none of the vendor's ({folder}/tokenizer.json: 32767 pieces, v3 and v7 have "
        "32768), so the tokenizer is transformers' own <*>: its ids are those of its own program, control strings that "
        "a user writes become control tokens, and tool calls are not parsed"
    )
    with pytest.warns(UserWarning, match=whole(foreign)) as caught:
        model, tokenizer = load(folder)
    assert len(caught) == 1
    assert not isinstance(tokenizer, MistralLargeTokenizer)
    assert isinstance(model, MistralLargeForCausalLM)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        lambda name: name.replace("model.layers.1.", "model.layers.1._fsdp_wrapped_module."),
    ],
    ids=["compiled", "DDP", "checkpointed", "FSDP"],
)
def test_names_lose_what_training_has_put_around_modules(rename: Callable[[str], str], tmp_path: Path) -> None:
    weights = hf_demo_weights()
    folder = builders.fine_tune(tmp_path / "f", weights={rename(name): tensor for name, tensor in weights.items()})
    model = MistralLargeForCausalLM.from_pretrained(folder)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    base = MistralLargeModel.from_pretrained(folder)
    assert torch.equal(base.layers[1].self_attn.q_proj.weight, model.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize("prefix", ["model.", "model.layers.1.self_attn."])
def test_buffers_and_mixed_dtypes_load_as_they_are(prefix: str, tmp_path: Path) -> None:
    weights = {name: tensor.float() if "norm" in name else tensor for name, tensor in hf_demo_weights().items()}
    folder = builders.fine_tune(tmp_path / "f", weights={**weights, f"{prefix}rotary_emb.inv_freq": torch.ones(16)})
    model = MistralLargeForCausalLM.from_pretrained(folder, dtype="float32")
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in weights.items())
    clean = MistralLargeForCausalLM.from_pretrained(builders.fine_tune(tmp_path / "g"), dtype="float32")
    assert torch.equal(model.model.rotary_emb.inv_freq, clean.model.rotary_emb.inv_freq)


INCOMPLETE = "{} is not a complete checkpoint of its config.json; nothing was done, fix or download it again:\n  {}"


def without(part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in hf_demo_weights().items() if part not in name}


@pytest.mark.parametrize(
    ("weights", "config", "problem"),
    [
        (lambda: without("lm_head"), {}, "tensor 'lm_head.weight' is missing"),
        (lambda: without("layers.1.mlp.up"), {}, "tensor 'model.layers.1.mlp.up_proj.weight' is missing"),
        (
            hf_demo_weights,
            {"of_2024": True},
            "tensor 'model.layers.0.self_attn.q_proj.weight' has shape [192, 64], config.json says [60, 64]\n  <*>",
        ),
        (
            hf_demo_weights,
            {"vocab_size": 32769},
            "tensor 'model.embed_tokens.weight' has shape [32768, 64], config.json says [32769, 64]\n"
            "  tensor 'lm_head.weight' has shape [32768, 64], config.json says [32769, 64]",
        ),
        (
            hf_demo_weights,
            {"rms_norm_eps": None},
            ": config.json of type 'mistral' has no rms_norm_eps; a geometry is given whole, since stock Mistral's "
            "defaults are those of another model; add what the weights have",
        ),
    ],
    ids=["lm_head", "up_proj", "head_dim", "vocab_size", "eps"],
)
def test_what_does_not_fit_is_one_error_and_no_random_numbers(
    weights: Any, config: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    folder = builders.fine_tune(tmp_path / "f", weights=weights(), config=builders.hf_config(**config))
    message = f"{folder}{problem}" if problem.startswith(":") else INCOMPLETE.format(folder, problem)
    with pytest.raises(CheckpointError, match=whole(message)):
        MistralLargeForCausalLM.from_pretrained(folder)


def test_tied_embeddings_are_refused_with_the_reason(tmp_path: Path) -> None:
    config = builders.hf_config(tie_word_embeddings=True)
    folder = builders.fine_tune(tmp_path / "f", weights=without("lm_head"), config=config)
    with raises_exactly(
        ConfigurationError,
        "MistralLargeConfig tie_word_embeddings=True: Mistral Large has none of this, only False is possible; load "
        "such a checkpoint with transformers' own MistralForCausalLM",
    ):
        MistralLargeForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
            "model-00002-of-00002.safetensors is missing",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "model.safetensors.index.json is missing, by which transformers finds the tensors of several files",
        ),
    ],
)
def test_missing_files_are_named(damage: Any, problem: str, tmp_path: Path) -> None:
    folder = builders.fine_tune(tmp_path / "f")
    damage(folder)
    with raises_exactly(CheckpointError, INCOMPLETE.format(folder, problem)):
        load(folder)


# Where the name says Mistral Large, the Auto classes take ours.
OURS = ("Mistral-Large-Instruct-2407", "my-MISTRAL-large-tune")
OTHERS = ("Mistral-7B-Instruct-v0.3", "Behemoth-123B-v2")


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
@pytest.mark.parametrize("build", [builders.vendor_whole, builders.vendor_hf_half], ids=["both layouts", "HF half"])
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_the_auto_classes_take_ours_by_the_name(name: str, build: Any, reference: Any, tmp_path: Path) -> None:
    folder = build(tmp_path / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    if name in OURS or build is builders.vendor_whole:
        assert (type(model), type(tokenizer)) == (MistralLargeForCausalLM, MistralLargeTokenizer)
        assert ids_of(tokenizer, MESSAGES) == reference(MESSAGES)
    else:
        assert type(model) is MistralForCausalLM
        assert not isinstance(tokenizer, MistralLargeTokenizer)


@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_both_layouts_of_another_model_of_the_vendor_stay_transformers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = builders.vendor_whole(tmp_path / "Mistral-7B-Instruct-v0.3")
    monkeypatch.setattr(auto_classes, "OTHER_MODELS", ((64, 3),))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MistralForCausalLM
    assert not isinstance(AutoTokenizer.from_pretrained(folder), MistralLargeTokenizer)
    assert auto_classes.is_another_model({"hidden_size": 64, "num_hidden_layers": 3})
    monkeypatch.undo()
    assert auto_classes.is_another_model({"hidden_size": 4096, "num_hidden_layers": 32})
    assert not auto_classes.is_another_model({"hidden_size": 12288, "num_hidden_layers": 88})


@pytest.mark.parametrize("setting", [{"sliding_window": 4096}, {"architectures": ["VisionForCausalLM"]}])
def test_another_architecture_of_that_name_stays_transformers_own(setting: dict[str, Any], tmp_path: Path) -> None:
    folder = builders.fine_tune(tmp_path / "Mistral-Large-3", config=builders.hf_config(**setting))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MistralForCausalLM
    assert not isinstance(AutoTokenizer.from_pretrained(folder), MistralLargeTokenizer)


def test_load_and_pipeline_are_public() -> None:
    assert modeling_mistral_large.load is load
    assert {"load", "pipeline"} <= {*modeling_mistral_large.__all__}
    assert not hasattr(modeling_mistral_large, "unload")

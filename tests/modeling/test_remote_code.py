"""Folders of ours and programs that do not import the package: refused, or our classes by trust_remote_code."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_mistral_large
from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.checkpoint.remote_code import IN_CONFIG, MODEL_CLASSES, REMOTE_CODE, REMOTE_CODE_NAME
from modeling_mistral_large import MODELS, MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.models import GREEDY
from tests.support.warm_python import WarmPython

# Another interpreter, which imports transformers and nothing of ours.
LOAD = """
import json, sys
import transformers

def load(name, folder, **options):
    if name == "pipeline":
        return transformers.pipeline("text-generation", folder, **options)
    return getattr(transformers, name).from_pretrained(folder, **options)

folder, save, names, options = *sys.argv[1:3], *map(json.loads, sys.argv[3:])
assert "modeling_mistral_large" not in sys.modules
for name in names:
    try:
        loaded = load(name, folder, **options)
    except Exception as error:
        # What transformers asks, it asks on the same stream.
        print("\\n" + json.dumps([name, type(error).__name__, str(error)]))
    else:
        kind = type(loaded.model if name == "pipeline" else loaded)
        messages = [{"role": "user", "content": "[INST] a  b </s>"}]
        ids = loaded.apply_chat_template(messages, return_dict=False) if name == "AutoTokenizer" else None
        loaded.save_pretrained(save)
        print(json.dumps([name, f"{kind.__module__}.{kind.__name__}", ids]))
"""
AUTO_CLASSES = ["AutoTokenizer", "AutoConfig", *MODEL_CLASSES, "pipeline"]


def load_elsewhere(
    python: WarmPython, folder: Path, tmp_path: Path, names: list[str], **options: Any
) -> list[list[Any]]:
    done = subprocess.run(
        [python.python, "-c", LOAD, str(folder), str(tmp_path / "saved"), json.dumps(names), json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=python.environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]


@pytest.fixture(scope="module")
def saved_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a trainer saves it."""
    folder = tmp_path_factory.mktemp("saved")
    MistralLargeForCausalLM.from_pretrained(demo_folder).save_pretrained(folder)
    MistralLargeTokenizer.from_pretrained(demo_folder).save_pretrained(folder)
    return folder


@pytest.fixture(params=["converted", "saved"])
def folder(request: pytest.FixtureRequest, demo_folder: Path, saved_folder: Path) -> Path:
    return {"converted": demo_folder, "saved": saved_folder}[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}], ids=str)
def test_without_the_package_no_auto_class_loads_a_folder_of_ours(
    folder: Path, tmp_path: Path, options: dict[str, Any], warm_python: WarmPython
) -> None:
    found = load_elsewhere(warm_python, folder, tmp_path, AUTO_CLASSES, **options)
    assert [name for name, *_ in found] == AUTO_CLASSES
    for name, kind, message in found:
        assert kind == "ValueError", (name, kind, message)
        assert "custom code which must be executed" in message


@pytest.mark.slow
def test_a_tokenizer_that_is_saved_alone_is_refused_too(
    demo_folder: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    MistralLargeTokenizer.from_pretrained(demo_folder).save_pretrained(tmp_path / "tokenizer")
    where = (warm_python, tmp_path / "tokenizer", tmp_path, ["AutoTokenizer"])
    ((_, kind, message),) = load_elsewhere(*where)
    assert kind == "ValueError"
    assert "custom code which must be executed" in message
    ((_, kind, _),) = load_elsewhere(*where, trust_remote_code=True)
    assert kind == "modeling_mistral_large.tokenization_mistral_large.MistralLargeTokenizer"


@pytest.mark.slow
def test_trust_remote_code_gives_our_classes_and_the_exact_tokenizer(
    folder: Path, tmp_path: Path, reference_tokenizer: Any, warm_python: WarmPython
) -> None:
    found = load_elsewhere(warm_python, folder, tmp_path, AUTO_CLASSES, trust_remote_code=True)
    module = "modeling_mistral_large.modeling_mistral_large"
    expected = [
        "modeling_mistral_large.tokenization_mistral_large.MistralLargeTokenizer",
        "modeling_mistral_large.configuration_mistral_large.MistralLargeConfig",
        *(f"{module}.{name}" for name in MODEL_CLASSES.values()),
        f"{module}.MistralLargeForCausalLM",
    ]
    assert [kind for _, kind, _ in found] == expected
    request = ChatCompletionRequest(messages=[UserMessage(content="[INST] a  b </s>")])
    assert found[0][2] == reference_tokenizer.encode_chat_completion(request).tokens
    # What they save names the module, and nothing of the package's source is copied.
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {REMOTE_CODE_NAME}
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: settings[name] for name in IN_CONFIG} == IN_CONFIG


@pytest.mark.slow
def test_without_an_installation_the_error_says_what_to_install(
    demo_folder: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    hide = "import sys; sys.modules['modeling_mistral_large'] = None\n"
    code = hide + LOAD.replace('assert "modeling_mistral_large" not in sys.modules', "")
    done = subprocess.run(
        [
            warm_python.python,
            "-c",
            code,
            str(demo_folder),
            str(tmp_path / "saved"),
            '["AutoTokenizer"]',
            '{"trust_remote_code": true}',
        ],
        capture_output=True,
        text=True,
        check=False,
        env=warm_python.environment,
    )
    _, kind, message = json.loads(done.stdout.splitlines()[-1])
    assert kind in ("ImportError", "ModuleNotFoundError")
    assert "modeling_mistral_large" in message


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
def test_with_the_package_the_registered_classes_load_without_a_question(
    folder: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = AutoConfig.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    assert type(config) is MistralLargeConfig
    assert type(tokenizer) is MistralLargeTokenizer
    assert "auto_map" not in config.to_diff_dict()
    for auto_class, model_class in MODELS.items():
        assert type(auto_class.from_pretrained(folder, **options)) is model_class
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    # Saved again, they name the same module, and nothing of the package's source is copied.
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert names == {REMOTE_CODE_NAME}
    assert (tmp_path / "again" / REMOTE_CODE_NAME).read_bytes() == REMOTE_CODE
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: settings[name] for name in IN_CONFIG} == IN_CONFIG
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["auto_map"] == {
        "AutoTokenizer": [None, "modeling_mistral_large_remote.MistralLargeTokenizer"]
    }
    loaded: Any = MistralLargeForCausalLM.from_pretrained(tmp_path / "again")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], return_tensors="pt")
    assert torch.equal(loaded.generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY))


def test_another_module_that_a_file_names_does_not_come_back(demo_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((demo_folder / name).read_bytes())
    for name, auto_map in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
    ):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**settings, "auto_map": auto_map}))
    MistralLargeConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    MistralLargeTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    for name in ("config.json", "tokenizer_config.json"):
        assert b"evil" not in (tmp_path / "again" / name).read_bytes()


def test_the_module_has_every_class_that_is_registered() -> None:
    assert {auto.__name__: model.__name__ for auto, model in MODELS.items()} == MODEL_CLASSES
    found: dict[str, Any] = {}
    exec(compile(REMOTE_CODE, REMOTE_CODE_NAME, "exec"), found)
    for reference in IN_CONFIG["auto_map"].values():
        name = reference.removeprefix("modeling_mistral_large_remote.")
        assert found[name] is getattr(modeling_mistral_large, name)
    assert found["MistralLargeTokenizer"] is MistralLargeTokenizer


@pytest.mark.slow
def test_a_folder_for_stock_transformers_names_no_code(demo_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(demo_folder, tmp_path / "back", to="consolidated")
    convert_checkpoint(tmp_path / "back", tmp_path / "stock", model_type="mistral")
    assert list((tmp_path / "stock").glob("*.py")) == []
    assert list((tmp_path / "back").glob("*.py")) == []
    for path in (tmp_path / "stock").glob("*.json"):
        assert b"auto_map" not in path.read_bytes()
        assert b"modeling_mistral_large" not in path.read_bytes()
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "library_name: transformers\n" in card
    assert "modeling" not in card


def test_the_model_card_names_the_package(demo_folder: Path) -> None:
    card = (demo_folder / "README.md").read_text()
    assert "library_name: modeling-mistral-large\n" in card
    assert "pip install modeling-mistral-large\n" in card
    assert "trust_remote_code=True" in card
    assert REMOTE_CODE_NAME in card

"""`mistral-large serve`: which engine it takes and what it tells it; the engines themselves are in tests/engines."""

import json
import os
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_cli.serve import choose_engine
from mistral_large_cli.serve_here import ServerSettings, check_options
from mistral_large_cli.speculation import Drafting
from mistral_large_conversion.errors import CheckpointError, MissingLibraryError, SettingError
from tests.support import folders
from tests.support.errors import raises_exactly

SERVE = sys.modules[choose_engine.__module__]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "mistral", "--exclude-tools-when-tool-choice-none"]
SERVER = ("fastapi", "uvicorn")
NATIVE = ["--load-format", "mistral", "--config-format", "mistral", "--tokenizer-mode", "mistral"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started: processes and servers do not come back."""
    calls: list[Any] = []
    monkeypatch.setattr("os.execv", lambda path, command: calls.append((path, command)))
    monkeypatch.setattr(SERVE, "serve_here", lambda model, **rest: calls.append((model, rest)))
    return calls


def install(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    """Have it look as if only these were installed."""
    monkeypatch.setattr(SERVE, "find_spec", lambda name: find_spec("json") if name in libraries else None)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.slow
def test_vllm_takes_each_layout_with_its_options(
    demo_folder: Path, tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm", *SERVER)
    # The hub is asked whether the last one is an adapter, and the engine asks it for the rest.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("mistral_large_cli.serve.reachable_options", lambda *_: {})
    folder = assemble_demo_checkpoint(tmp_path / "consolidated")
    run(str(demo_folder), "--port", "8123", "--tensor-parallel-size", "8")
    run(str(folder))
    run("mistralai/Mistral-Large-Instruct-2407", "--engine", "vllm", "--host", "0.0.0.0")
    begin = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    local = ["--host", "127.0.0.1", "--port"]
    assert started == [
        (sys.executable, [*begin, str(demo_folder), *local, "8123", *TOOLS, "--tensor-parallel-size", "8"]),
        (sys.executable, [*begin, str(folder), *local, "8000", *TOOLS, *NATIVE]),
        (
            sys.executable,
            [*begin, "mistralai/Mistral-Large-Instruct-2407", "--host", "0.0.0.0", "--port", "8000", *TOOLS],
        ),
    ]


def mistral_folder(folder: Path, vocabulary: dict[str, int] | None = None) -> Path:
    """A folder of type `mistral` without weights, which vLLM looks for; with another vocabulary if one is given."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(folders.hf_config()))
    if vocabulary is None:
        for name, content in folders.stock_tokenizer_files().items():
            (folder / name).write_bytes(content)
    else:
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    return folder


@pytest.mark.slow
def test_vllm_takes_our_prompts_unless_it_is_told_otherwise(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    folder = mistral_folder(tmp_path / "tune")
    for options in ([], ["--tokenizer-mode", "hf"], ["--tokenizer=other"], ["--tokenizer_mode=slow"]):
        run(str(folder), *options)
        (_, command) = started.pop()
        ours = ["--tokenizer-mode", "mistral_large"]
        assert command[command.index(TOOLS[-1]) + 1 :] == (options or ours)


def test_vllm_is_not_given_a_vocabulary_that_our_tokenizer_does_not_know(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    folder = mistral_folder(tmp_path / "tune", {"a": 0, "b": 1})
    with raises_exactly(
        CheckpointError,
        f"{folder}: tokenizer.json: neither the v3 nor the v7 vocabulary, so its files are carried along unchanged: "
        "ids are those of its own program, and control strings in a text may become control tokens; prompts of vLLM "
        "would be no better; add --tokenizer-mode hf to serve it so",
    ):
        run(str(folder))
    assert started == []


@pytest.mark.parametrize("files", [("config.json",), ("config.json", "params.json"), ()])
def test_vllm_takes_our_prompts_for_a_repository(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    install(monkeypatch, "vllm")
    monkeypatch.setattr("mistral_large_cli.serve.reachable_options", lambda *_: {"revision": "v1"})
    (tmp_path / "config.json").write_text(json.dumps(folders.hf_config()))
    asked: list[Any] = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        if name not in files:
            raise OSError("not there")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    # Which would ask the hub by transformers' client.
    monkeypatch.setattr(SERVE, "base_of_adapter", lambda *_: None)
    run("owner/tune")
    (_, command) = started.pop()
    is_told = files == ("config.json",)
    assert command[command.index(TOOLS[-1]) + 1 :] == (["--tokenizer-mode", "mistral_large"] if is_told else [])
    assert ("owner/tune", "config.json", {"revision": "v1"}) in asked


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_our_server_is_taken_without_vllm(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    install(monkeypatch, *SERVER)
    options = ["--device-map", "cpu", "--kv", "fp8", "--prefill-chunk", "7", "--max-batch", "3", "--dtype", "fp32"]
    access = ["--api-key", "secret", "--cors-origin", "http://a.example", "--cors-origin", "*", "--ui"]
    names = ["--served-model-name", "large", "--served-model-name", "other"]
    printed = run(str(demo_folder), "--engine", engine, *options, *access, *names)
    settings = ServerSettings("cpu", "fp8", 7, 3, ("http://a.example", "*"), ui=True)
    rest = {"host": "127.0.0.1", "port": 8000, "dtype": "float32", "hub": {}, "adapter": None, "drafting": None}
    rest |= {"names": ["large", "other"], "api_key": "secret", "settings": settings}
    assert started == [(str(demo_folder), rest)]
    (line,) = re.findall("^curl .+$", printed, re.MULTILINE)
    command = shlex.split(line)
    assert command[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(command[-1])["model"] == "large"
    assert "Authorization: Bearer $MISTRAL_LARGE_API_KEY" in command
    assert "secret" not in printed
    assert "http://127.0.0.1:8000/ is a chat page" in printed


def test_the_key_is_read_from_the_environment(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *SERVER)
    monkeypatch.setenv("MISTRAL_LARGE_API_KEY", "secret")
    run(str(demo_folder))
    assert [(rest["api_key"], rest["names"]) for _, rest in started] == [("secret", [str(demo_folder)])]


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [([], False), (["--host", "localhost"], False), (["--host", "0.0.0.0"], True), (["--host", "::"], True)],
)
def test_a_server_that_anybody_may_ask_is_warned_of(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, options: list[str], is_warned: bool
) -> None:
    install(monkeypatch, *SERVER)
    for key in ([], ["--api-key", "secret"]):
        result = CliRunner().invoke(app, ["serve", str(demo_folder), *options, *key], catch_exceptions=False)
        warning = "may use the model; MISTRAL_LARGE_API_KEY or --api-key asks for a key\n"
        assert (warning in result.stderr) is (is_warned and not key)


def test_vllm_gets_what_it_has_in_its_words(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    monkeypatch.setenv("VLLM_API_KEY", "")
    options = ["--served-model-name", "a", "--served-model-name", "b", "--dtype", "bf16", "--api-key", "secret"]
    run(str(demo_folder), *options)
    ((_, command),) = started
    assert command[-5:] == ["--dtype", "bfloat16", "--served-model-name", "a", "b"]
    assert "secret" not in command
    assert os.environ["VLLM_API_KEY"] == "secret"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--device-map", "cpu"], "it takes the GPUs of --tensor-parallel-size"),
        (["--kv", "fp8"], "it calls it --kv-cache-dtype"),
        (["--prefill-chunk", "9"], "it calls it --max-num-batched-tokens"),
        (["--max-batch", "9"], "it calls it --max-num-seqs"),
        (["--cors-origin", "*"], "it calls it --allowed-origins"),
        (["--ui"], "it has no page"),
    ],
)
def test_vllm_is_not_given_what_it_has_not(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, option: list[str], reason: str
) -> None:
    install(monkeypatch, "vllm")
    problem = f"{option[0]}: no option of vLLM: {reason}; leave it out, or take --engine transformers"
    with raises_exactly(SettingError, problem):
        run(str(demo_folder), *option)
    assert started == []


@pytest.mark.parametrize(
    ("engine", "installed", "problem"),
    [
        (
            "auto",
            ["fastapi"],
            "vLLM is not installed; run pip install vllm, or pip install 'modeling-mistral-large[serve]'",
        ),
        ("vllm", list(SERVER), "vLLM is not installed; run pip install vllm"),
        (
            "transformers",
            ["vllm"],
            "what our server needs is not installed; run pip install 'modeling-mistral-large[serve]'",
        ),
    ],
)
def test_an_engine_that_is_missing(
    demo_folder: Path,
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    installed: list[str],
    problem: str,
) -> None:
    install(monkeypatch, *installed)
    with raises_exactly(MissingLibraryError, f"serve: {problem}"):
        run(str(demo_folder), "--engine", engine)
    assert started == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--continuous-batching"], "--continuous-batching: requests run at once anyway"),
        (["--device", "cpu"], "--device: it is --device-map here"),
        (["--enable-cors"], "--enable-cors: it is --cors-origin '*' here"),
        (["--divice=cpu"], "--divice: no option of the server without vLLM"),
        (["-x"], "-x: no option of the server without vLLM"),
        (["--tensor-parallel-size", "8"], "--tensor-parallel-size: no option of the server without vLLM"),
    ],
)
def test_options_that_our_server_has_not(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, options: list[str], problem: str
) -> None:
    message = f"{problem}; leave it out; the options are in mistral-large serve --help"
    with raises_exactly(SettingError, message):
        check_options(options)
    install(monkeypatch, *SERVER)
    with raises_exactly(SettingError, message):
        run(str(demo_folder), *options)
    assert started == []


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "ftp://chat.example", "https://", "**"])
def test_origins_that_are_none(origin: str) -> None:
    problem = f"--cors-origin {origin}: must be * or a site as https://chat.example; correct it"
    with raises_exactly(SettingError, problem):
        ServerSettings(cors_origin=(origin,)).check(None)
    ServerSettings(cors_origin=("https://chat.example:8443", "*")).check(None)


@pytest.mark.parametrize("name", ["kv", "max_batch"])
def test_settings_of_batches_have_no_effect_with_drafts(name: str) -> None:
    settings = ServerSettings(kv="fp8") if name == "kv" else ServerSettings(max_batch=4)
    settings.check(None)
    with raises_exactly(
        SettingError,
        f"--{name.replace('_', '-')}: has no effect with --draft or --lookup, where requests are served one after "
        "another; leave one of the two out",
    ):
        settings.check(Drafting(None))

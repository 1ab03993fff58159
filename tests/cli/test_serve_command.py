"""`mistral-large serve`: which engine it takes and what it tells it; the engines themselves are in tests/engines."""

import json
import re
import shlex
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.chat_requests import RequestError, generation_options, read_chat_request
from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_cli.serve import choose_engine
from mistral_large_cli.serve_guard import check_options, is_own_origin
from mistral_large_conversion.errors import CheckpointError, MissingLibraryError, SettingError
from tests.support import folders
from tests.support.errors import raises_exactly

SERVE = sys.modules[choose_engine.__module__]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "mistral", "--exclude-tools-when-tool-choice-none"]
SERVER = ("fastapi", "uvicorn", "openai", "pydantic")
NATIVE = ["--load-format", "mistral", "--config-format", "mistral", "--tokenizer-mode", "mistral"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started: processes and servers do not come back."""
    calls: list[Any] = []
    monkeypatch.setattr("os.execv", lambda path, command: calls.append((path, command)))
    monkeypatch.setattr(SERVE, "serve_with_transformers", lambda model, **rest: calls.append((model, rest)))
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
    # The engine asks the hub for the last one.
    monkeypatch.setattr("mistral_large_conversion.checkpoint.hub.reachable_options", lambda *_: {})
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
    monkeypatch.setattr("mistral_large_conversion.checkpoint.hub.reachable_options", lambda *_: {"revision": "v1"})
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
def test_transformers_serves_without_vllm(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    install(monkeypatch, *SERVER)
    printed = run(str(demo_folder), "--engine", engine, "--device", "cpu")
    assert started == [
        (
            str(demo_folder),
            {"host": "127.0.0.1", "port": 8000, "revision": None, "options": ["--device", "cpu"], "adapter": None},
        )
    ]
    (line,) = re.findall("^curl .+$", printed, re.MULTILINE)
    command = shlex.split(line)
    assert command[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(command[-1])["model"] == str(demo_folder)


def test_transformers_serves_the_consolidated_layout(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *SERVER)
    folder = assemble_demo_checkpoint(tmp_path / "consolidated")
    run(str(folder))
    assert started == [
        (str(folder), {"host": "127.0.0.1", "port": 8000, "revision": None, "options": [], "adapter": None})
    ]


@pytest.mark.parametrize(
    ("engine", "installed", "problem"),
    [
        (
            "auto",
            ["fastapi", "uvicorn", "pydantic"],
            "vLLM is not installed; run pip install vllm, or pip install 'transformers[serving]'",
        ),
        ("vllm", list(SERVER), "vLLM is not installed; run pip install vllm"),
        (
            "transformers",
            ["vllm"],
            "what `transformers serve` needs is not installed; run pip install 'transformers[serving]'",
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


# What stands in front of the server of transformers


QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "Who are you?"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def calls(arguments: Any) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [*QUESTION["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "tool"}]}


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {"role": "user", "content": "hi"}}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [*QUESTION["messages"], {"role": "assistant", "content": "I am"}]}, "messages"),
        ({"messages": [*QUESTION["messages"], {"role": "assistant", "content": "I", "prefix": True}]}, "messages"),
        (calls("{bad"), "messages"),
        (calls("[" * 100_000), "messages"),
        ({"tools": 5}, "tools"),
        ({"tools": TOOL}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"functions": [TOOL["function"]]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"stop": "x"}, "stop"),
        ({"stop": 5}, "stop"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "chat_template_kwargs"),
        ({"generation_config": "{}"}, "generation_config"),
        ({"temprature": 0}, "temprature"),
        ({"top_k": 5}, "top_k"),
        ({"stream": 1}, "stream"),
        ({"stream": "false"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "x"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-300}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_what_a_request_cannot_have_is_refused_by_name(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_chat_request(QUESTION | options)
    assert caught.value.parameter == parameter
    assert str(caught.value).startswith(f"{parameter}")


def test_what_asks_for_nothing_is_taken() -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "stop": [],
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "tools": [],
        "parallel_tool_calls": True,
        "user": "somebody",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": False,
        "logit_bias": {},
        "modalities": ["text"],
        "chat_template_kwargs": {},
        "stream": False,
        "reasoning_effort": None,
        "seed": None,
    }
    assert read_chat_request(QUESTION | neutral) == read_chat_request(QUESTION)
    assert read_chat_request(QUESTION | dict.fromkeys(["tools", "stop", "functions", "audio"])) == read_chat_request(
        QUESTION
    )


def test_what_is_asked_for_is_read() -> None:
    asked = {"tools": [TOOL], "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 7}
    sampling = {"temperature": 1, "top_p": 0.5, "seed": -3, "max_tokens": 7}
    request = read_chat_request(QUESTION | asked | sampling)
    assert (request.tools, request.may_call_tools, request.is_streamed, request.max_tokens) == ([TOOL], True, True, 7)
    assert (request.temperature, request.top_p, request.seed) == (1.0, 0.5, -3)
    request = read_chat_request(QUESTION | asked | {"tool_choice": "none"})
    assert (request.tools, request.may_call_tools) == (None, False)


@pytest.mark.parametrize(
    ("asked", "of_folder", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7, "top_k": 0}),
        ({}, {"do_sample": True, "top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({}, {"do_sample": False, "temperature": 0.7}, {"do_sample": False}),
        ({}, {}, {}),
        ({"temperature": 0}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": True}, {"do_sample": False}),
        ({"temperature": 2}, {}, {"do_sample": True, "temperature": 2.0, "top_k": 0}),
        ({"top_p": 0.5}, {}, {"do_sample": True, "top_p": 0.5, "top_k": 0}),
        (
            {"temperature": 2, "top_p": 0.5},
            {"do_sample": False, "top_p": 0.9, "repetition_penalty": 1.1},
            {"do_sample": True, "temperature": 2.0, "top_p": 0.5, "top_k": 0, "repetition_penalty": 1.1},
        ),
        ({"seed": 0}, {}, {"request_seed": 0}),
        ({"tool_choice": "none"}, {"suppress_tokens": [7]}, {"suppress_tokens": [7, 5]}),
    ],
)
def test_a_request_and_the_folder_make_a_generation_config(
    asked: dict[str, Any], of_folder: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = deepcopy(of_folder)
    options = generation_options(read_chat_request(QUESTION | asked), of_folder, 9)
    assert options == {**expected, "max_new_tokens": 9}
    assert of_folder == before


@pytest.mark.parametrize(
    ("origin", "asked_host", "host", "is_own"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "127.0.0.1", True),
        ("http://localhost:8000", "localhost:8000", "127.0.0.1", True),
        ("http://[::1]:8000", "[::1]:8000", "::1", True),
        ("http://evil.example", "127.0.0.1:8000", "127.0.0.1", False),
        ("http://127.0.0.1:9000", "127.0.0.1:8000", "127.0.0.1", False),
        ("null", "127.0.0.1:8000", "127.0.0.1", False),
        ("", "127.0.0.1:8000", "127.0.0.1", False),
        # A name that its owner has made to lead here.
        ("http://evil.example:8000", "evil.example:8000", "127.0.0.1", False),
        ("http://model.example", "model.example", "0.0.0.0", True),
        ("http://evil.example", "model.example", "0.0.0.0", False),
    ],
)
def test_pages_of_other_sites_are_told_apart(origin: str, asked_host: str, host: str, is_own: bool) -> None:
    assert is_own_origin(origin, asked_host, host) is is_own


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--continuous-batching"], "--continuous-batching: its requests would all be sampled as the first one is"),
        (["--cb-block-size", "16"], "--cb-block-size: there is no continuous batching"),
        (["--chat-template-kwargs={}"], "--chat-template-kwargs: the prompts are those of the vendor's reference"),
        (["--device", "cpu", "--divice", "cpu"], "--divice: no such option; leave it out; options for this engine are"),
        (["-x"], "-x: no such option"),
        (["--tensor-parallel-size", "8"], "--tensor-parallel-size: no such option"),
    ],
)
def test_options_that_the_server_of_transformers_would_drop(options: list[str], problem: str) -> None:
    with pytest.raises(SettingError, match=re.escape(problem)):
        check_options(options)


def test_options_that_the_server_of_transformers_has() -> None:
    check_options(["--device", "cpu", "--dtype=float32", "--compile", "--default-seed", "-1", "--enable-cors"])

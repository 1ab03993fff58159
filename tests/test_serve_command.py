"""`mistral-large serve`: which engine it takes and what it tells it; the engines themselves are in tests/engines."""

import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_cli.serve import choose_engine
from modeling_mistral_large.errors import CheckpointError, MissingLibraryError

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


def test_vllm_takes_each_layout_with_its_options(
    demo_folder: Path, tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm", *SERVER)
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


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_transformers_serves_without_vllm(
    demo_folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    install(monkeypatch, *SERVER)
    printed = run(str(demo_folder), "--engine", engine, "--device", "cpu")
    assert started == [(str(demo_folder), {"host": "127.0.0.1", "port": 8000, "options": ["--device", "cpu"]})]
    (line,) = re.findall("^curl .+$", printed, re.MULTILINE)
    command = shlex.split(line)
    assert command[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(command[-1])["model"] == str(demo_folder)


def test_transformers_is_not_given_the_consolidated_layout(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *SERVER)
    folder = assemble_demo_checkpoint(tmp_path / "consolidated")
    with pytest.raises(CheckpointError, match="does not read the consolidated layout; convert it"):
        run(str(folder))
    assert started == []


@pytest.mark.parametrize(
    ("engine", "installed", "finding"),
    [
        ("auto", ["fastapi", "uvicorn", "pydantic"], r"pip install vllm, or pip install 'transformers\[serving\]'"),
        ("vllm", list(SERVER), "vLLM is not installed; run pip install vllm$"),
        ("transformers", ["vllm"], r"run pip install 'transformers\[serving\]'"),
    ],
)
def test_an_engine_that_is_missing(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, engine: str, installed: list[str], finding: str
) -> None:
    install(monkeypatch, *installed)
    with pytest.raises(MissingLibraryError, match=finding):
        run("folder", "--engine", engine)
    assert started == []

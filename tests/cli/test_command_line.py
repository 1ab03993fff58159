"""The command line as a whole: what it imports, what it is called by, and options that several commands have."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.errors import MistralLargeError
from tests.repository.command_line import COMMANDS, reference
from tests.support import clean_forks
from tests.support.clean_forks import CleanForks
from tests.support.errors import raises_exactly
from tests.support.loopback_hub import REPOSITORY, LoopbackHub, in_place_of_the_hub

ROOT = Path(__file__).parents[2]
WATCHED = ("torch", "transformers", "modeling_mistral_large", "rich.progress")
# What is typed, and its exit code: nothing here needs a model or a prompt.
AT_ONCE: dict[str, int] = {
    "--help": 0,
    "-h": 0,
    "show --help": 0,
    "chat -h": 0,
    "no-such-command": 2,
    "convert --no-such-option": 2,
    "inspect {demo}": 0,
    "inspect {none}": 2,
    "retag {none} --as mistral": 2,
    "verify {none}": 2,
    "adopt {none} {none}-hf": 2,
    "convert {demo} {none} --dry-run": 0,
    "convert {none} {none}-hf": 2,
    "compare {none} {demo} --text {readme}": 2,
    "compare {demo} {none} --text {readme}": 2,
    "compare {demo} {demo} --text {none}": 2,
    "compare {demo} {demo} --text {readme} --all-tokens": 2,
    "compare {demo} {demo} --text {readme} --token x": 2,
    "compare {demo} {demo}": 2,
    "plan --gpus 8xA100-80GB": 0,
    "plan {none} --gpus 80GB": 2,
    "plan --gpus card": 2,
    "chat {none}": 2,
    "chat {empty}": 2,
    "chat {demo} --temperature 0 --top-p 0.5": 2,
    "chat {demo} --revision main": 2,
    "serve {none}": 2,
    "show {none}": 2,
    "show {none} --ids": 2,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    demo = assemble_demo_checkpoint(folder / "demo")
    return {"demo": str(demo), "empty": str(folder / "empty"), "none": str(folder / "none"), "readme": "README.md"}


@pytest.fixture(scope="module")
def forks() -> Iterator[CleanForks]:
    """Interpreters that have imported what the command line is made of."""
    with clean_forks.start(["huggingface_hub.hf_api", "rich.console", "rich.table", "tokenizers", "typer"]) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("typed", AT_ONCE)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(
    typed: str, places: dict[str, str], forks: CleanForks
) -> None:
    arguments = ["mistral-large", *(part.format(**places) for part in typed.split())]
    watch = f"""
import sys
assert not [name for name in {WATCHED!r} if name in sys.modules]
sys.argv, sys.stderr = {arguments!r}, sys.stdout
from mistral_large_cli import main
try:
    main()
except SystemExit as end:
    print("ENDED", end.code)
finally:
    print("IMPORTED", *(name for name in {WATCHED!r} if name in sys.modules))
"""
    printed = forks.run(watch, cwd=ROOT, path=ROOT)
    assert printed.splitlines()[-2:] == [f"ENDED {AT_ONCE[typed]}", "IMPORTED"]
    assert "Traceback" not in printed


@pytest.mark.parametrize("command", ["", *(pytest.param(command, marks=pytest.mark.slow) for command in COMMANDS)])
def test_help_is_had_by_both_names(command: str) -> None:
    printed = {CliRunner().invoke(app, [*command.split(), option]).stdout for option in ("-h", "--help")}
    assert len(printed) == 1
    assert "Usage" in printed.pop()


def test_the_page_of_the_command_line_is_that_of_the_commands() -> None:
    assert (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8") == reference(), (
        "docs/command-line.md is out of date: run python -m tests.repository.command_line"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "bfloat16", "fp16", "float16", "fp32", "float32"])
def test_dtypes_have_short_and_long_names(name: str, places: dict[str, str]) -> None:
    dtype = {"b": "BF16", "f": f"F{name[-2:]}"}[name[0]]
    arguments = ["convert", places["demo"], places["none"], "--dry-run", "--json", "--dtype", name]
    assert json.loads(CliRunner().invoke(app, arguments).stdout)["dtype"] == dtype
    planned = CliRunner().invoke(app, ["plan", "--gpus", "16x80GB", "--weights", name, "--json"]).stdout
    assert json.loads(planned)["weights"] == dtype.lower().replace("f", "fp", 1).replace("bfp", "bf")


# The hub

ON_THE_HUB: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", REPOSITORY),
    "convert": ("convert", REPOSITORY, "{new}", "--dry-run"),
    "convert, calibrated": (
        *("convert", REPOSITORY, "{new}", "--dry-run", "--quantize", "int4"),
        *("--calibration", "default", "--samples", "1", "--length", "16"),
    ),
    "verify": ("verify", "{demo}", REPOSITORY),
    "compare": ("compare", REPOSITORY, "{demo}", "--text", "{conversation}", "--all-tokens"),
    "plan": ("plan", REPOSITORY, "--gpus", "80GB"),
    "show": ("show", "{conversation}", "--model", REPOSITORY),
    "chat": ("chat", REPOSITORY, "--temperature", "0"),
}
TAG = "v1"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    repository = LoopbackHub(assemble_demo_checkpoint(tmp_path / "repository"), revisions={TAG})
    with in_place_of_the_hub(repository, tmp_path / "usual-cache") as hub:
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_THE_HUB)
def test_revision_token_and_cache_arrive_at_the_hub(
    command: str, hub: LoopbackHub, places: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "conversation.json").write_text('[{"role": "user", "content": "Who are you?"}]')
    here = {**places, "new": str(tmp_path / "new"), "conversation": str(tmp_path / "conversation.json")}
    arguments = [part.format(**here) for part in ON_THE_HUB[command]]
    options = ["--revision", TAG, "--token", "hf_secret", "--cache-dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, [*arguments, *options], input="", catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert_asked_with_them(hub, tmp_path)


@pytest.mark.slow
def test_a_conversion_in_python_takes_them_too(hub: LoopbackHub, tmp_path: Path) -> None:
    where: dict[str, Any] = {"revision": TAG, "token": "hf_secret", "cache_dir": tmp_path / "cache"}
    convert_checkpoint(REPOSITORY, tmp_path / "new", progress=False, **where)
    assert_asked_with_them(hub, tmp_path)


def assert_asked_with_them(hub: LoopbackHub, folder: Path) -> None:
    asked = [path for path in hub.asked if "/resolve/" in path or "/revision/" in path or "/tree/" in path]
    assert any(f"/{TAG}" in path for path in asked)
    assert not any("/main" in path for path in asked)
    assert "Bearer hf_secret" in hub.authorizations
    assert not (folder / "usual-cache").exists()
    assert (folder / "cache").is_dir()


def test_a_revision_that_is_not_there_is_one_error(hub: LoopbackHub) -> None:
    with raises_exactly(
        MistralLargeError,
        f"owner/name: the repository has no such revision; {hub.url}/owner/name/commits/main lists them",
    ):
        CliRunner().invoke(app, ["inspect", REPOSITORY, "--revision", "v9"], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--revision", "--token", "--cache-dir"])
@pytest.mark.parametrize("command", ON_THE_HUB)
def test_a_folder_has_no_options_of_the_hub(command: str, option: str, places: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "conversation.json").write_text('[{"role": "user", "content": "Who are you?"}]')
    here = {**places, "new": str(tmp_path / "new"), "conversation": str(tmp_path / "conversation.json")}
    arguments = [places["demo"] if part == REPOSITORY else part.format(**here) for part in ON_THE_HUB[command]]
    with pytest.raises(MistralLargeError) as caught:
        CliRunner().invoke(app, [*arguments, option, "x"], catch_exceptions=False)
    assert str(caught.value) == (
        f"{option}: has no effect: {places['demo']} is a folder here; leave it out, or name a repository as owner/name"
    )


@pytest.mark.usefixtures("hub")
def test_engines_are_told_of_revision_token_and_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda _, command: started.append(command))
    monkeypatch.setattr("mistral_large_cli.serve.find_spec", lambda _: True)
    monkeypatch.setattr("mistral_large_cli.serve.reachable_options", lambda _, options: options)
    # So that they are as before in the end.
    environment = {"HF_TOKEN": "hf_secret", "HF_HUB_CACHE": str(tmp_path)}
    for name in environment:
        monkeypatch.setenv(name, "")
    options = ["--revision", TAG, "--token", "hf_secret", "--cache-dir", str(tmp_path)]
    assert CliRunner().invoke(app, ["serve", REPOSITORY, *options]).exit_code == 0
    assert started[0][-4:] == ["--revision", TAG, "--tokenizer-revision", TAG]
    assert {name: os.environ[name] for name in environment} == environment
    monkeypatch.setattr("mistral_large_cli.serve.serve_here", lambda model, **rest: started.append((model, rest)))
    assert CliRunner().invoke(app, ["serve", REPOSITORY, "--engine", "transformers", *options]).exit_code == 0
    assert (started[1][0], started[1][1]["hub"]["revision"]) == (REPOSITORY, TAG)

"""`mistral-large doctor`: what it finds right, and that it finds what is wrong."""

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.demo import convert_demo_checkpoint
from mistral_large_cli.doctor import MODES, find_packages, run_checks
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.transformers_api.keywords import cache_argument

CPU = {"cpu": "a processor"}
DOCTOR = sys.modules["mistral_large_cli.doctor"]


@pytest.fixture(autouse=True)
def _noise_as_before() -> Iterator[None]:
    """Undo what the command does to transformers' messages."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def only_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOCTOR, "DTYPES", ("float32",))


def wrong() -> dict[str, str]:
    """The checks that fail, and what they say."""
    return {check.name: check.detail for check in run_checks(CPU) if check.is_ok is False}


@pytest.mark.slow
def test_everything_is_right() -> None:
    """The bar of the command itself: `.ci/versions` runs it on every version of transformers."""
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (0, True)
    names = [check["name"] for check in report["checks"]]
    models = [f"{device} {dtype}" for device in report["devices"] for dtype in ("float32", "bfloat16")]
    expected = [f"{model}, {what}" for model in models for what in (*MODES, "tool call")]
    expected += [f"{device} float32, v7" for device in report["devices"]]
    assert [name for name in names if "float" in name] == expected
    assert {"Auto classes", "tokenizer", "conversion of the demo checkpoints"} <= {*names}
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("only_float32")
def test_the_report_says_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOCTOR, "run_checks", lambda _: iter(()))
    printed = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
    assert f"transformers             {transformers.__version__}" in printed
    assert "All 0 checks are right." in printed


@pytest.mark.parametrize(
    ("version", "is_in_range"),
    [("5.16.9", False), ("5.17.0", True), ("5.24.3", True), ("5.25.0", False), ("5.25.0.dev0", False), ("6.0", False)],
)
def test_the_range_of_transformers(monkeypatch: pytest.MonkeyPatch, version: str, is_in_range: bool) -> None:
    installed = {"transformers": version}
    monkeypatch.setattr(DOCTOR, "_installed", installed.get)
    (package,) = (package for package in find_packages() if package.name == "transformers")
    assert package.is_in_range is is_in_range


@pytest.mark.slow
@pytest.mark.usefixtures("only_float32")
def test_a_cache_that_is_swallowed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a `forward` does that knows the cache under another name than transformers has for it."""
    forward = MistralLargeForCausalLM.forward

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, **cache_argument(None), "use_cache": False})

    forgetful.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # generate reads it
    monkeypatch.setattr(MistralLargeForCausalLM, "forward", forgetful)
    modes = ("with a cache", "chunked prefill", "tool call", "v7")
    assert wrong().keys() == {f"cpu float32, {mode}" for mode in modes}
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "WRONG    cpu float32, with a cache" in result.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("only_float32")
def test_an_error_of_one_check_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(MistralLargeForCausalLM, "generate", broken)
    problems = wrong()
    assert problems["cpu float32, with a cache"] == "RuntimeError: no kernel for this"
    assert len(problems) == len(MODES) + 2
    monkeypatch.setattr(MistralLargeForCausalLM, "from_pretrained", broken)
    assert wrong() == dict.fromkeys(["cpu float32", "cpu float32, v7"], "RuntimeError: no kernel for this")


@pytest.mark.slow
@pytest.mark.usefixtures("only_float32")
def test_other_ids_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, convert = MistralLargeTokenizer.encode_texts, convert_demo_checkpoint

    def convert_first(folder: Path, prompt_format: str = "v3") -> None:
        """The conversion compares tokenizers, too."""
        convert(folder, prompt_format)
        if prompt_format == "v3":
            return
        monkeypatch.setattr(
            MistralLargeTokenizer, "encode_texts", lambda self, texts: encode(self, [text.strip() for text in texts])
        )

    monkeypatch.setattr(DOCTOR, "convert_demo_checkpoint", convert_first)
    assert "SentencePiece gives" in wrong()["tokenizer"]


def test_classes_that_are_not_registered_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(MistralLargeForCausalLM):
        pass

    monkeypatch.setattr(DOCTOR, "golden_conversations", dict)
    monkeypatch.setattr(DOCTOR, "convert_demo_checkpoint", lambda *_: (_ for _ in ()).throw(ValueError("not now")))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", classmethod(lambda cls, config: Other._from_config(config))
    )
    assert wrong() == {
        "Auto classes": "AutoModelForCausalLM makes Other and not MistralLargeForCausalLM",
        "conversion of the demo checkpoints": "ValueError: not now",
    }


@pytest.mark.parametrize("registered", [["LlamaForCausalLM", "MistralLargeForCausalLM"], ["LlamaForCausalLM"]])
def test_vllm_is_asked_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, registered: list[str]) -> None:
    vllm, plugins = ModuleType("vllm"), ModuleType("vllm.plugins")
    vllm.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: registered)  # type: ignore[attr-defined]
    plugins.load_general_plugins = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.plugins", plugins)
    monkeypatch.setattr(DOCTOR, "find_spec", lambda name: True)
    monkeypatch.setattr(DOCTOR, "convert_demo_checkpoint", lambda *_: (_ for _ in ()).throw(ValueError("not now")))
    (check,) = (check for check in run_checks(CPU) if check.name == "vLLM's registry")
    assert check.is_ok is ("MistralLargeForCausalLM" in registered)


def test_what_cannot_be_run_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 1
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("not run"))
    assert "tokenizer and golden responses" in line
    assert "pip install 'modeling-mistral-large[demo]'" in line
    assert result.stdout.endswith("0 of 2 checks are wrong, 1 could not be run; it says above what it needs.\n")


@pytest.mark.slow
def test_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(DOCTOR, "DTYPES", ())
    assert all(check.is_ok for check in run_checks(CPU))
    assert not list(tmp_path.iterdir())

"""`--adapter` of convert, verify, chat and serve, and adapters as the source of convert."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.serve import choose_engine
from mistral_large_conversion import convert_adapter, convert_checkpoint
from mistral_large_conversion.errors import CheckpointError
from tests.support import command
from tests.support.adapters import save_peft_adapter
from tests.support.checkpoints import contents
from tests.support.errors import raises_exactly

SERVE = sys.modules[choose_engine.__module__]


@pytest.fixture
def base(small_source: Path) -> Path:
    return small_source


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    save_peft_adapter(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert command.run(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_convert_merges_and_says_what(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert_checkpoint(base, tmp_path / "expected", adapter=adapter)
    printed = run("convert", base, tmp_path / "hf", "--adapter", adapter)
    assert "with  adapter: rank 4, 21 linear layers, merged\n" in printed
    assert "note:" not in printed
    assert contents(tmp_path / "hf") == contents(tmp_path / "expected")
    report = json.loads(run("convert", base, tmp_path / "hf", "--adapter", adapter, "--json"))
    assert report["result"] == "complete"
    assert report["adapter"] | {"files": None} == {
        "name": "adapter",
        "base": str(base),
        "ranks": [4],
        "linear_layers": 21,
        "files": None,
    }
    assert json.loads(run("convert", base, tmp_path / "plain", "--json", "--dry-run"))["adapter"] is None


def test_convert_says_that_the_adapter_names_another_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    printed = run("convert", other, tmp_path / "hf", "--adapter", adapter, "--dry-run")
    assert f"note: the adapter names {base} as its base; the shapes fit {other}, too\n" in printed


def test_an_adapter_as_source_is_converted(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert_adapter(adapter, tmp_path / "expected", to="consolidated", dtype="bf16")
    printed = run("convert", adapter, tmp_path / "vendors", "--to", "consolidated", "--dtype", "bf16")
    assert printed == (
        f"from  {adapter}: an adapter\n"
        f"to    {tmp_path / 'vendors'}: params.json and lora.safetensors, rank 4, 21 linear layers\n"
    )
    assert contents(tmp_path / "vendors") == contents(tmp_path / "expected")
    report = json.loads(run("convert", tmp_path / "vendors", tmp_path / "back", "--base", base, "--json"))
    assert (report["to"], report["result"], report["adapter"]["base"]) == ("hf", "converted", str(base))


@pytest.mark.parametrize(
    "options",
    [
        ("--quantize", "fp8"),
        ("--as", "mistral"),
        ("--max-shard-size", "1GB"),
        ("--jobs", "2"),
        ("--dry-run",),
        ("--adapter", "other"),
    ],
    ids=" ".join,
)
def test_options_without_effect_on_an_adapter(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    line = failure(capsys, "convert", adapter, tmp_path / "out", *options)
    assert f"{options[0]}: has no effect: {adapter} is an adapter, which is converted alone; leave it out" in line
    assert not (tmp_path / "out").exists()


def test_options_that_need_another(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(capsys, "convert", base, tmp_path / "out", "--base", "owner/name")
    assert f"--base owner/name: has no effect: {base} is no adapter; leave it out" in line
    line = failure(capsys, "verify", base, "--adapter", adapter)
    assert f"--adapter {adapter}: has no effect without SOURCE, which it was merged into; give it" in line


def test_verify_takes_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert_checkpoint(base, tmp_path / "hf", adapter=adapter)

    def tensors(*options: object) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["verify", str(tmp_path / "hf"), str(base), *map(str, options), "--json"])
        (check,) = (check for check in json.loads(result.stdout)["checks"] if check["name"] == "tensors")
        found: dict[str, Any] = check
        return found

    assert tensors("--adapter", adapter)["is_ok"]
    assert not tensors()["is_ok"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been started with vLLM, which looks as if it were installed."""
    calls: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: calls.append(command))
    monkeypatch.setattr(SERVE, "find_spec", lambda name: find_spec("json") if name == "vllm" else None)
    return calls


@pytest.mark.parametrize(("rank", "reserved"), [(4, "8"), (8, "8"), (9, "16"), (400, "512")])
def test_vllm_is_told_of_the_adapter(
    base: Path, tmp_path: Path, started: list[list[str]], rank: int, reserved: str
) -> None:
    save_peft_adapter(base, tmp_path / "mine", r=rank, target_modules=["q_proj"])
    lora = ["--enable-lora", "--max-lora-rank", reserved, "--lora-modules", f"mine={tmp_path / 'mine'}"]
    for arguments in ((base, "--adapter", tmp_path / "mine"), (tmp_path / "mine",)):
        printed = run("serve", *arguments, "--max-model-len", "99")
        assert '"model": "mine"' in printed
        command = started.pop()
        assert command[command.index("serve") + 1] == str(base)
        assert command[-len(lora) - 2 :] == [*lora, "--max-model-len", "99"]


def test_what_cannot_be_served_has_a_way_out(
    base: Path, adapter: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    convert_adapter(adapter, tmp_path / "vendors", to="consolidated")
    with pytest.raises(CheckpointError) as error:
        run("serve", base, "--adapter", tmp_path / "vendors")
    assert str(error.value) == (
        f"{tmp_path / 'vendors'}: vLLM loads adapters of PEFT only; convert it with `mistral-large convert "
        f"{tmp_path / 'vendors'} DESTINATION --to hf` and give that, or take --engine transformers"
    )
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/vendors: an adapter (lora.safetensors) of a base that it does not name, not a checkpoint; "
        f"merge it with `mistral-large convert BASE DESTINATION --adapter {tmp_path}/vendors`, and give that "
        "destination; chat and serve take BASE with --adapter",
    ):
        run("serve", tmp_path / "vendors")
    save_peft_adapter(base, tmp_path / "large", r=600, target_modules=["q_proj"])
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/large: rank 600, vLLM loads adapters up to 512; merge it with `mistral-large convert {base} "
        f"DESTINATION --adapter {tmp_path}/large` and serve that, or take --engine transformers",
    ):
        run("serve", base, "--adapter", tmp_path / "large")
    with raises_exactly(
        CheckpointError,
        f"{adapter}: has an adapter of its own, and {tmp_path}/large is another: one is loaded; give the base "
        "alone, or leave the other adapter out",
    ):
        run("serve", adapter, "--adapter", tmp_path / "large")
    assert started == []


def test_an_adapter_next_to_a_checkpoint_is_not_left_out(
    base: Path, adapter: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    both = shutil.copytree(base, tmp_path / "both")
    for path in adapter.iterdir():
        shutil.copy(path, both)
    with raises_exactly(
        CheckpointError,
        f"{both}: holds adapter_config.json next to the checkpoint, which vLLM would not apply; give --adapter {both}, "
        "or move adapter_config.json elsewhere",
    ):
        run("serve", both)
    run("serve", both, "--adapter", both)
    assert started.pop()[-1] == f"both={both}"
    (both / "adapter_config.json").rename(both / "lora.safetensors")
    with raises_exactly(
        CheckpointError,
        f"{both}: holds lora.safetensors next to the checkpoint, which vLLM would not apply; move lora.safetensors "
        "elsewhere",
    ):
        run("serve", both)
    with raises_exactly(
        CheckpointError,
        f"{both}: holds lora.safetensors next to the checkpoint, which would be left out; move it with the params.json "
        "of its training into a folder of its own, and give that as the adapter",
    ):
        run("chat", both)
    assert started == []


@pytest.mark.parametrize("kind", ["PEFT's", "vendor's", "as the model"])
def test_our_server_is_given_the_adapter(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        SERVE, "serve_here", lambda model, **rest: calls.append((model, rest["adapter"], rest["names"]))
    )
    monkeypatch.setattr(SERVE, "choose_engine", lambda _: "transformers")
    if kind == "vendor's":
        convert_adapter(adapter, tmp_path / "vendors", to="consolidated")
        adapter = tmp_path / "vendors"
    given = [str(adapter)] if kind == "as the model" else [str(base), "--adapter", str(adapter)]
    printed = run("serve", *given)
    assert calls == [(given[0], given[-1] if len(given) > 1 else None, [adapter.name])]
    assert f'"model": "{adapter.name}"' in printed


def test_the_chat_refuses_adapters_before_torch_is_imported(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_adapter(adapter, tmp_path / "vendors", to="consolidated")
    line = failure(capsys, "chat", base, "--adapter", tmp_path)
    assert f"{tmp_path}: no adapter; give a folder with adapter_config.json" in line
    line = failure(capsys, "chat", adapter, "--adapter", tmp_path / "vendors")
    assert f"{adapter}: has an adapter of its own, and {tmp_path / 'vendors'} is another: one is loaded" in line
    line = failure(capsys, "chat", tmp_path / "vendors")
    assert "an adapter (lora.safetensors) of a base that it does not name, not a checkpoint; merge it" in line


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "vendors"])
def test_the_chat_answers_as_the_merged_checkpoint(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    from io import StringIO

    from mistral_large_cli.demo import assemble_demo_checkpoint

    base = assemble_demo_checkpoint(tmp_path / "base")
    save_peft_adapter(base, tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "vendors", to="consolidated")
    convert_checkpoint(base, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="fp32")
    options = ("--max-new-tokens", "6", "--temperature", "0", "--dtype", "fp32")

    def answer(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO("Hello\n"))
        assert command.run("chat", *arguments, *options) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    expected, _ = answer(tmp_path / "merged")
    found, said = answer(demo_folder, "--adapter", tmp_path / kind)
    assert found == expected
    note = f"; it names {base} as its base" if kind == "adapter" else ""
    assert f"{tmp_path / kind}: an adapter, loaded on {demo_folder}{note}\n" in said

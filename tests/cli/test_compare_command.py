"""`mistral-large compare` as it is typed."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.errors import CheckpointError, SettingError
from mistral_large_conversion.samples import read_samples
from modeling_mistral_large.streamed import compare_checkpoints, comparison
from tests.support import folders
from tests.support.errors import raises_exactly
from tests.support.warm_python import WarmPython

KEYS = (
    *("kl_mean", "kl_p99", "top1_agreement", "flips_per_10k", "perplexity_reference", "perplexity_candidate", "tokens"),
    *("kl_standard_error", "hidden_errors", "sequences", "cut_conversations", "device", "reference", "candidate"),
)
CONVERSATION = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a toy model."}]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    demo = folders.vendor(root / "demo")
    convert_checkpoint(demo, root / "int4", quantize="int4")
    text = root / "samples.jsonl"
    text.write_text("\n".join(json.dumps({"messages": CONVERSATION[: 2 * count] * count}) for count in (1, 2)))
    return {"demo": demo, "int4": root / "int4", "text": text}


def typed(*arguments: object) -> list[str]:
    return ["compare", *map(str, arguments), "--device", "cpu"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, typed(*arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.slow
def test_json_is_the_comparison_and_how_it_was_made(places: dict[str, Path]) -> None:
    found = json.loads(
        run(places["demo"], places["int4"], "--text", places["text"], "--json", "--all-tokens", "--dtype", "fp32")
    )
    assert tuple(found) == KEYS
    wanted = compare_checkpoints(
        places["demo"], places["int4"], read_samples(places["text"]), scores_prompts=True, dtype=torch.float32
    )
    assert {name: found[name] for name in asdict(wanted)} == json.loads(json.dumps(asdict(wanted)))
    assert [found[name] for name in ("sequences", "cut_conversations", "device")] == [2, 0, "cpu"]
    assert found["reference"] == {
        "source": str(places["demo"]),
        "weights": "bf16",
        "dtype": "float32",
        "activations": "not rounded",
    }
    assert found["candidate"] == {
        "source": str(places["int4"]),
        "weights": "int4",
        "dtype": "float32",
        "activations": "not rounded (W4A16)",
    }


@pytest.mark.slow
def test_the_table_has_what_json_has(places: dict[str, Path]) -> None:
    wanted = compare_checkpoints(places["demo"], places["int4"], read_samples(places["text"]), length=12)
    printed = run(places["demo"], places["int4"], "--text", places["text"], "--length", 12)
    assert printed == (
        f"reference   {places['demo']}: bf16 weights, computes in bfloat16, activations not rounded\n"
        f"candidate   {places['int4']}: int4 weights, computes in bfloat16, activations not rounded (W4A16)\n"
        f"text        {places['text']}: 2 sequences, 24 tokens, {wanted.tokens} of them scored; 2 conversations cut, "
        "raise --length to have all of them\n"
        f"KL          {wanted.kl_mean:.6f} ± {wanted.kl_standard_error:.2g} nats in the mean, "
        f"{wanted.kl_p99:.4f} at the 99th percentile\n"
        f"top-1       {wanted.top1_agreement:.2%} agreement, {wanted.flips_per_10k:.1f} flips in 10,000 tokens\n"
        f"perplexity  {wanted.perplexity_reference:.4f} reference, {wanted.perplexity_candidate:.4f} candidate\n"
    )


@pytest.mark.slow
def test_repositories_are_read_from_the_cache(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders.hub_cache(tmp_path / "cache")
    found = json.loads(
        run(
            *(places["demo"], folders.REPOSITORY, "--text", places["text"], "--json", "--samples", 1),
            *("--cache-dir", tmp_path / "cache"),
        )
    )
    assert (found["kl_mean"], found["flips_per_10k"], found["sequences"]) == (0, 0, 1)


def test_options_without_effect_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Bonjour.")
    with raises_exactly(
        SettingError, f"--all-tokens: has no effect: {text} holds no conversation, and all of a text is scored"
    ):
        run(places["demo"], places["demo"], "--text", text, "--all-tokens")
    with raises_exactly(
        SettingError,
        f"--cache-dir: has no effect: {places['demo']} is a folder here; leave it out, or name a repository as "
        "owner/name",
    ):
        run(places["demo"], places["demo"], "--text", text, "--cache-dir", tmp_path)


def test_a_revision_is_of_one_repository(places: dict[str, Path]) -> None:
    with raises_exactly(
        SettingError,
        "--revision v1: of owner/one or of owner/two; it is for one repository; download the other with `hf download`, "
        "and name its folder",
    ):
        run("owner/one", "owner/two", "--text", places["text"], "--revision", "v1")


def test_what_is_wrong_with_a_folder_is_said_before_any_weights_are_read(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_nothing(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(comparison, "compare_streams", read_nothing)
    with raises_exactly(
        CheckpointError,
        f"{tmp_path / 'none'}: no such folder; give a folder, or a repository on the hub as owner/name",
    ):
        run(places["demo"], tmp_path / "none", "--text", places["text"])


# What the process of the next test runs: an interrupt in the middle of the layers, when the temporary file is there.
INTERRUPTED = """
import os, signal, tempfile
# Of this process's TMPDIR.
tempfile.tempdir = None
import modeling_mistral_large.streamed.activations as activations
from mistral_large_cli import main

read = activations.Activations.__getitem__

def interrupted(self, index):
    assert os.readlink(f"/proc/self/fd/{self._file.fileno()}").startswith(os.environ["TMPDIR"])
    os.kill(os.getpid(), signal.SIGINT)
    return read(self, index)

activations.BYTES_IN_MEMORY = 0
activations.Activations.__getitem__ = interrupted
main()
"""


@pytest.mark.slow
def test_an_interrupt_ends_it_without_a_traceback_or_a_file(
    places: dict[str, Path], tmp_path: Path, warm_python: WarmPython
) -> None:
    (tmp_path / "tmp").mkdir()
    ended = subprocess.run(
        [warm_python.python, "-c", INTERRUPTED, *typed(places["demo"], places["demo"], "--text", places["text"])],
        capture_output=True,
        text=True,
        env={**warm_python.environment, "TMPDIR": str(tmp_path / "tmp")},
    )
    assert (ended.returncode, ended.stdout) == (130, "")
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "tmp").iterdir())

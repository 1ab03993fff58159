"""`mistral-large convert --calibration` as it is typed."""

import json
from pathlib import Path

import pytest
import torch

from mistral_large_conversion import read_manifest
from modeling_mistral_large import MistralLargeConfig
from tests.support.checkpoints import write_consolidated
from tests.support.command import run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", 3], "--samples 3: has no effect without --calibration, which it is for; leave it out"),
        (["--length", 99], "--length 99: has no effect without --calibration, which it is for; leave it out"),
        (
            ["--quantize", "int4", "--device", "cpu"],
            "--device cpu: has no effect without --calibration, which it is for; leave it out",
        ),
        (
            ["--calibration", "chats.jsonl"],
            "--calibration chats.jsonl without --quantize: only int4 is calibrated; add --quantize int4",
        ),
        (
            ["--calibration", "default", "--quantize", "fp8"],
            "--calibration default with --quantize fp8: only int4 is calibrated; add --quantize int4",
        ),
        (
            ["--calibration", "default", "--quantize", "nvfp4"],
            "--calibration default with --quantize nvfp4: only int4 is calibrated; add --quantize int4",
        ),
    ],
)
def test_an_option_without_effect_is_refused(
    options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    assert run("convert", tmp_path / "source", tmp_path / "int4", *options) == 2
    assert " ".join(capsys.readouterr().err.split()) == f"mistral-large: {message}"
    assert not (tmp_path / "int4").exists()


def test_an_adapter_is_not_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for option, value in (("--calibration", "default"), ("--samples", 3), ("--length", 99), ("--device", "cpu")):
        assert run("convert", tmp_path, tmp_path / "out", option, value) == 2
        assert f"{option}: has no effect" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_plans_calibrates_and_compares(
    tiny_config: MistralLargeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.vocab_size, tiny_config.hidden_size, tiny_config.intermediate_size = 32768, 96, 160
    tiny_config.num_hidden_layers = 1
    write_consolidated(tmp_path / "source", tiny_config, torch.bfloat16)
    data, folder = tmp_path / "chats.jsonl", tmp_path / "int4"
    data.write_text('{"text": "One line."}\n{"text": "And another one, which is longer."}\n')
    command = ("convert", tmp_path / "source", folder, "--quantize", "int4", "--calibration", data, "--length", 8)
    assert run(*command, "--device", "cpu", "--json", "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not folder.exists()
    # The second text is cut in two.
    assert {name: planned["calibration"][name] for name in ("data", "samples", "length", "tokens", "device")} == {
        "data": "chats.jsonl",
        "samples": 3,
        "length": 8,
        "tokens": 14,
        "device": "cpu",
    }
    weight_bytes = sum(planned["files"].values())
    # The activations between layers, twice, and the small files.
    assert planned["needed_bytes"] > weight_bytes + 2 * 14 * 96 * 2
    assert run(*command, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "by    GPTQ on 3 sequences, 14 tokens, of chats.jsonl (sha256 " in printed
    assert "…), on cpu\n" in printed
    assert "all checks passed" in printed
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.calibration is not None
    assert manifest.calibration.to_json() == planned["calibration"]
    assert run(*command, "--device", "cpu") == 0
    assert (
        "every tensor is what the manifest says, and every one that is not calibrated what the source gives; nothing "
        "was written" in capsys.readouterr().out
    )
    assert run("inspect", folder) == 0
    assert f"calibration {manifest.calibration.description}\n" in capsys.readouterr().out
    assert run(*command, "--device", "cpu", "--samples", 2) == 2
    assert f"its weights are calibrated otherwise: {manifest.calibration.description}" in " ".join(
        capsys.readouterr().err.split()
    )

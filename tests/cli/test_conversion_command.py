"""`mistral-large convert` as it is typed."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mistral_large_conversion import convert_checkpoint, export_checkpoint, prepare_conversion
from mistral_large_conversion.errors import SettingError
from modeling_mistral_large import MistralLargeConfig
from tests.support.checkpoints import write_consolidated
from tests.support.command import run
from tests.support.errors import raises_exactly


@pytest.fixture
def source(tiny_config: MistralLargeConfig, tmp_path: Path) -> Path:
    tiny_config.vocab_size = 32768
    # A space, a quote, and what rich would take for markup.
    write_consolidated(tmp_path / "the [red]'source", tiny_config, torch.bfloat16)
    return tmp_path / "the [red]'source"


@pytest.mark.slow
def test_convert_prints_the_plan_and_a_command_that_runs(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = source.parent / "the [blue]'destination"
    assert run("convert", source, destination, "--max-shard-size", "2MB") == 0
    printed = capsys.readouterr().out
    # Nothing to redraw a bar with goes into a pipe.
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert f"from  {source}: 30 tensors, BF16, 0.01 GB\n" in printed
    assert f"to    {destination}: 3 × *.safetensors, --max-shard-size 2MB\n" in printed
    assert len(list(destination.glob("*.safetensors"))) == 3
    python, option, code = shlex.split(printed[printed.index("python -c") :])
    assert (python, option) == ("python", "-c")
    exec(compile(code, "printed", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_progress_bar_shows_bytes_rate_and_remaining_time(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # rich takes this for a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("convert", source, source.parent / "hf", "--max-shard-size", "2MB") == 0
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(r"converting .* 10\.9/10\.9 MB [\d.]+ [kMG]B/s 0:00:00", last)


@pytest.mark.slow
def test_dry_run_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", source, source.parent / "hf", "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (source.parent / "hf").exists()


@pytest.mark.slow
def test_json_is_all_that_is_printed_and_says_what_is_there(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = source.parent / "hf"
    options = ("convert", source, destination, "--max-shard-size", "2MB", "--json")
    assert run(*options, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not destination.exists()
    assert run(*options, "--jobs", 2) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    converted = json.loads(printed.out)
    assert run(*options) == 0
    again = json.loads(capsys.readouterr().out)
    assert [report.pop("result") for report in (planned, converted, again)] == ["planned", "converted", "complete"]
    assert [report.pop("destination_state") for report in (planned, converted, again)] == ["new", "new", "finished"]
    assert all(report.pop("seconds") > 0 for report in (converted, again))
    assert planned == converted == again
    assert planned["files"] == {path.name: path.stat().st_size for path in destination.glob("*.safetensors")}
    others = {path.name for path in destination.iterdir()} - planned["files"].keys()
    assert others == {*planned["small_files"], "conversion.manifest.json", "model.safetensors.index.json"}
    assert planned["tensors"] == 30
    assert (planned["to"], planned["model_type"], planned["dtype"]) == ("hf", "mistral_large", "BF16")


@pytest.mark.slow
def test_a_rerun_says_that_it_goes_on_or_that_all_is_there(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    destination = source.parent / "hf"
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, destination, progress=stop)
    assert run("convert", source, destination) == 0
    assert "which is an interrupted conversion, to be resumed\n" in capsys.readouterr().out
    assert run("convert", source, destination) == 0
    printed = capsys.readouterr().out
    assert "which is a finished conversion, to be compared with the source\n" in printed
    assert "every tensor is what the source gives; nothing was written\n" in printed


@pytest.mark.slow
def test_the_way_back_with_another_dtype_and_model_type(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock, back = source.parent / "stock", source.parent / "back"
    assert run("convert", source, stock, "--as", "mistral", "--dtype", "fp32") == 0
    printed = capsys.readouterr().out
    assert f"from  {source}: 30 tensors, BF16, rounded to F32, 0.02 GB\n" in printed
    exec(compile(shlex.split(printed[printed.index("python -c") :])[2], "printed", "exec"), {})
    assert run("convert", stock, back, "--to", "consolidated", "--dtype", "bf16") == 0
    printed = capsys.readouterr().out
    exec(compile(shlex.split(printed[printed.index("python -c") :])[2], "printed", "exec"), {})
    assert "MistralLargeForCausalLM(" in capsys.readouterr().out
    written = load_file(back / "consolidated.safetensors")
    of_source = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert written.keys() == of_source.keys()
    assert all(torch.equal(written[name], of_source[name]) for name in written)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--to", "consolidated", "--as", "mistral"], "--as mistral with --to consolidated: that layout has no model"),
        (["--to", "consolidated", "--as", "mistral_large"], "--as mistral_large with --to consolidated: that layout"),
        (["--dry-run", "--jobs", "2"], "--jobs 2 with --dry-run: nothing is written; leave one out"),
        (["--quantize", "fp8", "--dtype", "bf16"], "what is not quantized is bf16, with dtype bf16 too; leave `dtype`"),
        (["--quantize", "fp8", "--to", "consolidated"], "only the HF layout has a place for it; leave `to` out"),
        (["--jobs", "1025"], "jobs 1025: must be a whole number from 1 to 1024"),
        (["--max-shard-size", "9" * 400 + "GB"], "must be a size such as 5GB or 750MB"),
        (["--max-shard-size", "x" * 100_000], "must be a size such as 5GB or 750MB"),
        (["--max-shard-size", "1e400"], "max_shard_size '1e400': must be a size such as 5GB or 750MB"),
    ],
)
def test_options_without_effect_or_meaning_are_one_line(
    source: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    assert run("convert", source, source.parent / "out", *options) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.startswith("mistral-large: ")
    assert (error.count("\n"), len(error) < 1000) == (1, True)
    assert not (source.parent / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ({"to": "hff"}, "to 'hff': must be one of 'consolidated', 'hf'"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16': must be one of None, 'bf16', 'fp16', 'fp32'"),
        ({"quantize": "fp4"}, "quantize 'fp4': must be one of None, 'fp8', 'int4', 'nvfp4'"),
        ({"model_type": "llama"}, "model_type 'llama': must be one of 'mistral_large', 'mistral'"),
        ({"jobs": True}, "jobs True: must be a whole number from 1 to 1024"),
    ],
)
def test_values_of_options_that_mean_nothing_are_errors(
    small_source: Path, tmp_path: Path, option: dict[str, Any], problem: str
) -> None:
    with raises_exactly(SettingError, problem):
        convert_checkpoint(small_source, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_option_is_an_error(small_source: Path, tmp_path: Path) -> None:
    functions: tuple[Any, ...] = (convert_checkpoint, prepare_conversion, export_checkpoint)
    for function in functions:
        with pytest.raises(TypeError, match="unexpected keyword argument 'max_shard'"):
            function(small_source, tmp_path / "out", max_shard="5GB")


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_what_cannot_be_converted_is_one_message_and_exit_code_2(
    source: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert run("convert", source, source / "hf", *option) == 2
    assert capsys.readouterr().err.startswith("mistral-large: ")
    assert run("convert", source, source.parent / "hf", "--max-shard-size", "5 apples", *option) == 2
    assert "must be a size such as 5GB" in capsys.readouterr().err
    (source / "consolidated-00002-of-00002.safetensors").unlink()
    assert run("convert", source, source.parent / "hf", *option) == 2
    error = capsys.readouterr().err
    assert "consolidated-00002-of-00002.safetensors is missing" in error
    assert "Traceback" not in error
    assert not (source.parent / "hf").exists()

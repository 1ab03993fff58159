"""Bars of the calls that read or write all weights: huggingface_hub's, where somebody looks."""

import io
import sys
from pathlib import Path

import pytest
from huggingface_hub import utils

from mistral_large_conversion import convert_checkpoint, prepare_conversion, verify_checkpoint
from mistral_large_conversion.progress import progress_calls

pytestmark = pytest.mark.ground_floor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """No fixture: pytest sets stderr again between the fixtures and the test."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def bars(terminal: Terminal) -> list[str]:
    """Label, percentage and bytes at the end of each bar that was shown."""
    lines = terminal.getvalue().split("\n")
    assert lines.pop() == ""
    return [line.rpartition("\r")[2].partition(" [")[0].replace("#", "") for line in lines]


def test_every_act_shows_a_bar_that_ends_at_all_bytes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = open_terminal(monkeypatch)
    hf = tmp_path / "hf"
    plan = convert_checkpoint(small_source, hf)
    prepare_conversion(small_source, hf).run()
    verify_checkpoint(hf, small_source)
    verify_checkpoint(hf)
    size = f"{plan.tensor_bytes / 1e3:.0f}k/{plan.tensor_bytes / 1e3:.0f}k"
    assert bars(terminal) == [f"{act}: 100%|| {size}" for act in ("Converting", "Verifying", "Verifying", "Verifying")]


def test_false_and_functions_show_none(small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    hf, counts = tmp_path / "hf", list[int]()
    convert_checkpoint(small_source, hf, progress=False)
    prepare_conversion(small_source, hf).run(progress=False)
    verify_checkpoint(hf, small_source, progress=False)
    verify_checkpoint(hf, small_source, progress=counts.append)
    assert terminal.getvalue() == ""
    assert sum(counts) == prepare_conversion(small_source, hf).plan.tensor_bytes


def act(progress: bool) -> None:
    with progress_calls(progress, "Converting", 2) as tell:
        tell(1)
        tell(1)


def test_huggingface_hubs_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    utils.disable_progress_bars()  # type: ignore[attr-defined]  # exported when first used
    try:
        act(True)
        assert terminal.getvalue() == ""
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]  # exported when first used
    act(True)
    assert bars(terminal) == ["Converting: 100%|| 2.00/2.00"]


def test_a_pipe_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    act(True)
    assert pipe.getvalue() == ""

"""Damage of every kind, as the command line meets it: one message, exit code 2, nothing written, nothing touched."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_large_cli.demo import assemble_demo_checkpoint
from tests.support.checkpoints import everything_in
from tests.support.command import run
from tests.support.damage import DAMAGES, LAYOUTS

# The layouts of the demo and of its conversion; tests/campaign takes all of them.
CONSOLIDATED, HF = LAYOUTS["consolidated, shards with an index"], LAYOUTS["HF, one file"]
OF_CONSOLIDATED, OF_HF = (
    [name for name, damage in DAMAGES.items() if damage.where(layout)] for layout in (CONSOLIDATED, HF)
)

pytestmark = [pytest.mark.ground_floor, pytest.mark.usefixtures("remembered_tokenizer")]


@pytest.fixture(scope="module")
def sound_consolidated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble_demo_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a neighbour that must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("mine")
    monkeypatch.chdir(tmp_path)
    # A name without a folder could be a repository's id; no test may ask the hub.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # In a narrow terminal, a usage error is broken into lines anywhere in a path.
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


@pytest.fixture
def source(sound_consolidated: Path, place: Path, damage: str) -> Path:
    """The demo in the consolidated layout, with the damage of the test's parameter."""
    folder = Path(shutil.copytree(sound_consolidated, place / "source"))
    DAMAGES[damage].act(folder, CONSOLIDATED)
    return folder


Refused = Callable[..., tuple[str, str]]


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command for what it cannot take, holds it to its promise and returns what it printed."""

    def run_and_compare(problem: str, *arguments: object) -> tuple[str, str]:
        before = everything_in(place)
        assert run(*arguments) == 2
        out, error = capsys.readouterr()
        assert problem in error
        assert "Traceback" not in error
        assert everything_in(place) == before
        return out, error

    return run_and_compare


def assert_one_message(printed: tuple[str, str]) -> None:
    out, error = printed
    assert error.count("mistral-large: ") == 1
    assert error.startswith("mistral-large: ")
    assert "\x1b" not in error
    assert out == ""


@pytest.mark.slow
@pytest.mark.parametrize("damage", OF_CONSOLIDATED)
def test_a_damaged_source_is_refused(source: Path, place: Path, damage: str, refused: Refused) -> None:
    assert_one_message(refused(DAMAGES[damage].problem_in(CONSOLIDATED), "convert", source, place / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", OF_HF)
def test_a_damaged_source_of_the_way_back_is_refused(
    demo_folder: Path, place: Path, damage: str, refused: Refused
) -> None:
    source = Path(shutil.copytree(demo_folder, place / "source"))
    DAMAGES[damage].act(source, HF)
    command = (DAMAGES[damage].problem_in(HF), "convert", source, place / "back", "--to", "consolidated")
    assert_one_message(refused(*command))
    assert_one_message(refused(*command, "--dry-run"))


def mkdir_with(name: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text("mine")

    return make


# Where the destination is, relative to the place, what is there, and what the message says.
DESTINATIONS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "the source itself": ("source", lambda path: None, "choose a folder elsewhere"),
    "in the source": ("source/hf", lambda path: None, "choose a folder elsewhere"),
    "in the source, by detours": ("outside/../source/a/../hf", lambda path: None, "choose a folder elsewhere"),
    "around the source": (".", lambda path: None, "choose a folder elsewhere"),
    "a link to the source": ("link", lambda path: path.symlink_to("source"), "choose a folder elsewhere"),
    "a file": ("hf", lambda path: path.write_text("mine"), "hf"),
    "under a file": ("hf/deep", lambda path: path.parent.write_text("mine"), "hf"),
    "a pipe": ("hf", os.mkfifo, "hf"),
    "a link to nowhere": ("hf", lambda path: path.symlink_to("missing/deep"), "hf"),
    "a folder with a file": ("hf", mkdir_with("notes.txt"), "hf"),
    "a folder with weights": ("hf", mkdir_with("model.safetensors"), "hf"),
    "a folder with a hidden file": ("hf", mkdir_with(".git"), "hf"),
    "a foreign marker": ("hf", mkdir_with("conversion.unfinished.txt"), "hf"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DESTINATIONS)
def test_a_destination_that_must_not_be_written_is_refused(
    sound_consolidated: Path, place: Path, case: str, refused: Refused
) -> None:
    shutil.copytree(sound_consolidated, place / "source")
    name, make, problem = DESTINATIONS[case]
    make(place / name)
    # Of more than one line where the command line itself has found that a path is a file.
    refused(problem, "convert", place / "source", place / name)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["pickles only", "weights a pipe", "tokenizer foreign"])
@pytest.mark.usefixtures("source")
def test_a_process_of_its_own_says_the_same(place: Path, damage: str) -> None:
    before = everything_in(place)
    done = subprocess.run(
        [sys.executable, "-m", "mistral_large_cli", "convert", "source", "hf"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert DAMAGES[damage].problem_in(CONSOLIDATED) in done.stderr
    assert done.stderr.startswith("mistral-large: ")
    assert "Traceback" not in done.stderr
    assert everything_in(place) == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", [name for name in OF_CONSOLIDATED if name not in ("no folder", "folder a file")])
def test_inspect_finds_it_and_does_not_fail(
    source: Path, place: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(place)
    assert run("inspect", source, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    # What a tokenizer does is not in any header.
    assert bool(printed["problems"]) == (
        damage not in ("tokenizer empty", "tokenizer foreign", "tokenizer truncated", "vocabulary of another size")
    )
    assert everything_in(place) == before


VERIFIED = (
    *("no folder", "folder empty", "folder a file", "settings a pipe", "settings nested", "zero heads"),
    *("NaN norm_eps", "pickles only", "a shard missing", "weights a pipe", "weights a link out"),
    "weights a link to itself",
    *(
        "header length giant",
        "weights truncated",
        "tensors overlapping",
        "a tensor missing",
        "a tensor named as a path",
    ),
    *("index with an absolute path", "tokenizer foreign", "licence a pipe"),
)


@pytest.mark.slow
@pytest.mark.parametrize("damage", VERIFIED)
def test_verify_neither_passes_it_nor_fails(
    source: Path, demo_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(place)
    # Bad as a source, of which nothing can be proven, and bad as a result.
    for arguments in [(demo_folder, source), (source, demo_folder)]:
        assert run("verify", *arguments) in (1, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert everything_in(place) == before

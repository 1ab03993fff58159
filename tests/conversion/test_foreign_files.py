"""Names in a destination that are someone else's: hard links, links, pipes. Their bytes stay, and nothing hangs."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_large_conversion import convert_checkpoint, retag_checkpoint
from mistral_large_conversion.checkpoint.atomic_write import atomic_write
from mistral_large_conversion.checkpoint.remote_code import REMOTE_CODE_NAME
from mistral_large_conversion.destination import UNFINISHED_NAME, UNFINISHED_TEXT
from mistral_large_conversion.errors import DestinationError
from mistral_large_conversion.manifest import MANIFEST_NAME
from tests.support.checkpoints import contents
from tests.support.errors import raises_exactly

pytestmark = pytest.mark.ground_floor

SHARDS = "400KB"
FIRST = "consolidated-00001-of-00002.safetensors"


@pytest.fixture
def expected(small_source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert_checkpoint(small_source, tmp_path / "expected", max_shard_size=SHARDS)
    return contents(tmp_path / "expected")


def begin(destination: Path, source: Path) -> Path:
    """A destination that an interrupted run of the same conversion has left."""

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, destination, max_shard_size=SHARDS, progress=stop)
    return destination


def hard_link(path: Path, target: Path) -> None:
    os.link(target, path)


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


def own_file(path: Path, target: Path) -> None:
    path.write_bytes(b"torn")


KINDS: list[Callable[[Path, Path], None]] = [hard_link, link, pipe, own_file]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "target"),
    # A pipe and a file of its own have no target.
    [*itertools.product((hard_link, link), ("precious", FIRST)), (pipe, "precious"), (own_file, "precious")],
)
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_no_name_in_the_destination_is_written_through(
    small_source: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    make: Callable[[Path, Path], None],
    suffix: str,
    target: str,
) -> None:
    (small_source / "precious").write_bytes(b"precious" * 1000)
    before = contents(small_source)
    begun = begin(tmp_path / "begun", small_source)
    for name in sorted(expected):
        destination = Path(shutil.copytree(begun, tmp_path / "out"))
        (destination / f"{name}{suffix}").unlink(missing_ok=True)
        make(destination / f"{name}{suffix}", small_source / target)
        convert_checkpoint(small_source, destination, max_shard_size=SHARDS)
        assert contents(small_source) == before, name
        assert contents(destination) == expected, name
        assert all(path.lstat().st_nlink == 1 and not path.is_symlink() for path in destination.iterdir()), name
        shutil.rmtree(destination)


NOT_OURS = ": holds 'conversion.unfinished', not of an unfinished conversion; choose a new or empty folder"


def test_what_an_interrupted_run_has_finished_may_be_linked_elsewhere(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    # A snapshot by hard links, of all that is there.
    destination = begin(tmp_path / "out", small_source)
    (destination / UNFINISHED_NAME).rename(tmp_path / "marker")
    shutil.copytree(destination, tmp_path / "snapshot", copy_function=os.link)
    (tmp_path / "marker").rename(destination / UNFINISHED_NAME)
    before = contents(tmp_path / "snapshot")
    convert_checkpoint(small_source, destination, max_shard_size=SHARDS)
    assert contents(tmp_path / "snapshot") == before
    assert contents(destination) == expected


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            hard_link,
            "/conversion.unfinished: a hard link, so another file would be written too; remove the folder and convert "
            "again",
        ),
        (link, NOT_OURS),
        (pipe, NOT_OURS),
        (lambda path, _: path.mkdir(), NOT_OURS),
    ],
)
def test_a_marker_that_is_someone_elses_is_refused(
    small_source: Path, tmp_path: Path, make: Callable[[Path, Path], None], problem: str
) -> None:
    (tmp_path / "precious").write_bytes(UNFINISHED_TEXT)
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / UNFINISHED_NAME, tmp_path / "precious")
    with raises_exactly(DestinationError, f"{tmp_path}/out{problem}"):
        convert_checkpoint(small_source, tmp_path / "out")
    assert (tmp_path / "precious").read_bytes() == UNFINISHED_TEXT
    assert [path.name for path in (tmp_path / "out").iterdir()] == [UNFINISHED_NAME]


def test_a_marker_of_any_size_is_begun_anew(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse_short(line: bytes) -> None:
        assert len(line) < 10_000

    monkeypatch.setattr("mistral_large_conversion.destination.LARGEST_JSON", 100_000)
    monkeypatch.setattr("mistral_large_conversion.destination._json_object", parse_short)
    destination = begin(tmp_path / "out", small_source)
    os.truncate(destination / UNFINISHED_NAME, 1_000_000)
    convert_checkpoint(small_source, destination, max_shard_size=SHARDS)
    assert contents(destination) == expected


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS)
def test_retag_and_all_whole_files_replace_a_name(
    demo_folder: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    folder = Path(shutil.copytree(demo_folder, tmp_path / "hf"))
    (tmp_path / "precious").write_text("precious")
    names = ("config.json", "tokenizer_config.json", "chat_template.jinja", "README.md")
    for name in names:
        make(folder / f"{name}.partial", tmp_path / "precious")
    # A copy that shares the bytes, as `cp -al` makes it.
    shutil.copytree(demo_folder, tmp_path / "copy", copy_function=os.link)
    before = contents(demo_folder)
    changed = sorted((*names, MANIFEST_NAME, REMOTE_CODE_NAME))
    assert sorted(retag_checkpoint(folder, "mistral")) == changed
    assert sorted(retag_checkpoint(tmp_path / "copy", "mistral")) == changed
    assert contents(demo_folder) == before
    assert contents(folder) == contents(tmp_path / "copy")
    assert (tmp_path / "precious").read_text() == "precious"
    make(tmp_path / "new.partial", tmp_path / "precious")
    with atomic_write(tmp_path / "new") as stream:
        stream.write(b"new")
    assert (tmp_path / "new").read_bytes() == b"new"
    assert (tmp_path / "precious").read_text() == "precious"

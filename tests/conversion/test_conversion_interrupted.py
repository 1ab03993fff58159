"""Conversions that are killed, meet a full disk or a read error, or find what another run has left."""

import errno
import fcntl
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mistral_large_conversion.convert as convert_module
import mistral_large_conversion.stream as stream_module
from mistral_large_conversion import convert_checkpoint, planned_tensor, prepare_conversion, read_manifest
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor
from mistral_large_conversion.destination import UNFINISHED_NAME, check_destination, unfinished
from mistral_large_conversion.errors import CheckpointError, DestinationError
from mistral_large_conversion.manifest import MANIFEST_NAME
from tests.support.checkpoints import contents, write_consolidated
from tests.support.edits import edit_json
from tests.support.errors import raises_exactly, whole
from tests.support.interruptions import (
    FailingFile,
    can_mount,
    is_whole_or_unnamed,
    kill_at_random_moments,
    open_failing,
    small_disk,
)

pytestmark = pytest.mark.ground_floor

SHARDS = "300KB"


class Killed(BaseException):
    """Stands for the end of the process in tests that stay in one process."""


def kill_after(count: int) -> Callable[[int], None]:
    written = 0

    def progress(advance: int) -> None:
        nonlocal written
        written += advance
        if written > count:
            raise Killed

    return progress


def interrupt(source: Path, destination: Path, *, after: int = 400_000, jobs: int = 1) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(source, destination, max_shard_size=SHARDS, jobs=jobs, progress=kill_after(after))


@pytest.fixture
def expected(small_source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed conversion of the small source writes."""
    convert_checkpoint(small_source, tmp_path / "whole", max_shard_size=SHARDS)
    return contents(tmp_path / "whole")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", 50_000)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each block of a tensor that is written from now on."""
    counts: list[int] = []
    write = stream_module._write

    def counted(stream: Any, data: memoryview, offset: int) -> None:
        counts.append(len(data))
        write(stream, data, offset)

    monkeypatch.setattr(stream_module, "_write", counted)
    return counts


def assert_another_run_ends_it(source: Path, destination: Path, expected: dict[str, bytes]) -> None:
    """What an error has left is whole or unnamed, and the same conversion ends as if nothing had been."""
    assert is_whole_or_unnamed(destination, expected)
    convert_checkpoint(source, destination, max_shard_size=SHARDS)
    assert contents(destination) == expected


def run_and_kill(moment: int, run: Callable[[Callable[[int], None]], Any]) -> bool:
    """Run in a child process that dies by SIGKILL at its `moment`-th step; whether it got that far."""
    child = os.fork()
    if child == 0:
        steps = iter(range(moment))

        def step(*_: Any) -> None:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        for name in ("fsync", "replace", "unlink", "mkdir"):
            setattr(os, name, before(step, getattr(os, name)))
        try:
            run(step)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def before(step: Callable[[], None], act: Callable[..., Any]) -> Callable[..., Any]:
    def act_after_step(*args: Any, **kwargs: Any) -> Any:
        step()
        return act(*args, **kwargs)

    return act_after_step


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
# Threads take their steps in another order each time, so that every second moment is as good as all.
@pytest.mark.parametrize(("jobs", "stride"), [(1, 1), (3, 2)])
def test_killed_at_any_step_a_rerun_ends_byte_identical(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], jobs: int, stride: int
) -> None:
    destination = tmp_path / "killed"
    moments = 0
    while run_and_kill(
        moments,
        lambda step: convert_checkpoint(small_source, destination, max_shard_size=SHARDS, jobs=jobs, progress=step),
    ):
        moments += stride
        assert is_whole_or_unnamed(destination, expected)
        # Every third time another run is killed on top of it, the other times it may finish.
        if moments % 3:
            convert_checkpoint(small_source, destination, max_shard_size=SHARDS)
            assert contents(destination) == expected
            for path in destination.iterdir():
                path.unlink()
    assert moments > 50
    assert contents(destination) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("waiting_for_the_disk")
def test_killed_at_random_moments_a_rerun_ends_byte_identical(
    tiny_geometry: Geometry, tmp_path: Path, known_tokenizer: None
) -> None:
    kills = int(os.environ.get("MISTRAL_LARGE_KILLS", "12"))
    geometry = replace(tiny_geometry, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    write_consolidated(tmp_path / "source", geometry, torch.bfloat16)
    of_source = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "source").iterdir()}
    started = time.monotonic()
    convert_checkpoint(tmp_path / "source", tmp_path / "whole", max_shard_size="9MB")
    duration = time.monotonic() - started
    expected = contents(tmp_path / "whole")
    destination, moments = tmp_path / "killed", random.Random(0)
    kept = 0

    def start() -> int:
        child = os.fork()
        if child == 0:
            try:
                convert_checkpoint(tmp_path / "source", destination, max_shard_size="9MB")
            finally:
                os._exit(0)
        return child

    for _ in kill_at_random_moments(start, kills, duration, moments):
        assert is_whole_or_unnamed(destination, expected)
        kept += any(destination.glob("*.safetensors"))
        # Half of the kills hit what another one has left.
        if moments.random() < 0.5:
            convert_checkpoint(tmp_path / "source", destination, max_shard_size="9MB")
            assert contents(destination) == expected
            shutil.rmtree(destination)
    assert kept
    convert_checkpoint(tmp_path / "source", destination, max_shard_size="9MB")
    assert contents(destination) == expected
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "source").iterdir()} == of_source


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_the_bytes_are_the_same_with_any_number_of_threads(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], jobs: int
) -> None:
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS, jobs=jobs)
    assert contents(tmp_path / "hf") == expected
    with raises_exactly(ValueError, "jobs 0: must be a whole number from 1 to 1024"):
        convert_checkpoint(small_source, tmp_path / "none", jobs=0)


def test_an_interrupt_ends_all_threads(small_source: Path, tmp_path: Path, small_blocks: None) -> None:
    before = threading.active_count()
    interrupt(small_source, tmp_path / "hf", after=0, jobs=4)
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_rerun_keeps_what_is_done(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], written: list[int]
) -> None:
    interrupt(small_source, tmp_path / "hf")
    assert list((tmp_path / "hf").glob("*.safetensors"))
    assert list((tmp_path / "hf").glob("*.safetensors.partial"))
    before = sum(written)
    counts: list[int] = []
    plan = convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS, progress=counts.append)
    # Of what the first run wrote, only the tensor in which it ended is written again.
    assert plan.tensor_bytes < sum(written) < plan.tensor_bytes + 150_000
    assert before > 400_000
    assert sum(counts) == plan.tensor_bytes
    assert contents(tmp_path / "hf") == expected


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".safetensors.partial"])
def test_what_a_run_has_left_must_prove_itself(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], suffix: str
) -> None:
    interrupt(small_source, tmp_path / "hf")
    path = next(path for path in sorted((tmp_path / "hf").iterdir()) if path.name.endswith(suffix))
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[3] ^= 1
    content[start] ^= 1
    path.write_bytes(content)
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == expected


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".safetensors.partial"])
@pytest.mark.parametrize("length", [0, 10, 100_000])
def test_a_file_that_was_cut_short_is_written_again(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], suffix: str, length: int
) -> None:
    interrupt(small_source, tmp_path / "hf")
    os.truncate(next(path for path in (tmp_path / "hf").iterdir() if path.name.endswith(suffix)), length)
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == expected


def journal_edits() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "torn", lambda text: text[:-20]
    yield "empty", lambda text: b""
    yield "without identity", lambda text: text.split(b"\n", 2)[2]
    yield "with noise", lambda text: text + b'\xff\x00{"a": [1]}\n[]\n{"model.norm.weight": 7}\nnull\n{'
    yield "with another checksum", lambda text: text.replace(b'.weight": "', b'.weight": "0')


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(edit, id=name, marks=[] if name in ("torn", "with noise") else pytest.mark.slow)
        for name, edit in journal_edits()
    ],
)
def test_any_journal_leads_to_the_same_end(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], edit: Callable[[bytes], bytes]
) -> None:
    interrupt(small_source, tmp_path / "hf")
    marker = tmp_path / "hf" / UNFINISHED_NAME
    assert edit(marker.read_bytes()) != marker.read_bytes()
    marker.write_bytes(edit(marker.read_bytes()))
    interrupt(small_source, tmp_path / "hf", after=500_000)
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == expected


def test_a_source_that_has_changed_is_not_mixed_in(small_source: Path, tiny_geometry: Geometry, tmp_path: Path) -> None:
    interrupt(small_source, tmp_path / "hf")
    # The same names, shapes and sizes with other numbers, as a checkpoint of later training has them.
    torch.manual_seed(7)
    shutil.rmtree(small_source)
    write_consolidated(small_source, tiny_geometry, torch.bfloat16)
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    convert_checkpoint(small_source, tmp_path / "whole", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == contents(tmp_path / "whole")


def test_an_unfinished_conversion_of_another_shape_leaves_nothing(small_source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="50KB", progress=kill_after(600_000))
    assert len(list((tmp_path / "hf").glob("model-*"))) > 5
    convert_checkpoint(small_source, tmp_path / "hf")
    convert_checkpoint(small_source, tmp_path / "whole")
    assert contents(tmp_path / "hf") == contents(tmp_path / "whole")


def test_a_stranger_in_an_unfinished_conversion_is_not_removed(small_source: Path, tmp_path: Path) -> None:
    interrupt(small_source, tmp_path / "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/hf: holds 'notes.txt', not of an unfinished conversion; choose a new or empty folder",
    ):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def test_a_link_in_an_unfinished_conversion_is_not_written_through(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    interrupt(small_source, tmp_path / "hf")
    (tmp_path / "precious").write_text("mine")
    names = [path.name for path in (tmp_path / "hf").iterdir() if path.name != UNFINISHED_NAME]
    for name in names:
        (tmp_path / "hf" / name).unlink()
        (tmp_path / "hf" / name).symlink_to(tmp_path / "precious")
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == expected
    assert (tmp_path / "precious").read_text() == "mine"


def test_room_that_an_unfinished_conversion_takes_counts_as_free(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(small_source, tmp_path / "hf", progress=kill_after(0))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "hf").iterdir()) > 4_000_000
    convert_checkpoint(small_source, tmp_path / "hf")


def test_a_rerun_over_a_finished_folder_compares_and_writes_nothing(
    small_source: Path, tmp_path: Path, written: list[int]
) -> None:
    conversion = prepare_conversion(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert conversion.check_destination() == "new"
    assert conversion.run()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "hf").iterdir()}
    written.clear()
    counts: list[int] = []
    assert conversion.check_destination() == "finished"
    assert not conversion.run(progress=counts.append)
    assert not written
    assert sum(counts) == conversion.plan.tensor_bytes
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "hf").iterdir()} == before


def test_what_another_run_renames_meanwhile_takes_no_room(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(small_source, tmp_path / "hf")
    assert list((tmp_path / "hf").glob("*.partial"))
    state_of = Path.lstat

    def rename_first(path: Path) -> os.stat_result:
        if path.suffix == ".partial":
            path.rename(path.with_suffix(""))
        return state_of(path)

    monkeypatch.setattr(Path, "lstat", rename_first)
    assert check_destination(small_source, tmp_path / "hf", 0) == "unfinished"


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def add_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


LAST_SHARD = "model-00003-of-00003.safetensors"
ANOTHER = ": holds another finished conversion: {}; choose a new or empty folder"
CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights": (
        LAST_SHARD,
        flip_last_byte,
        f"/{LAST_SHARD}: tensor 'lm_head.weight' has changed; remove the folder and convert again",
    ),
    "length": (LAST_SHARD, add_bytes, ANOTHER.format(f"its {LAST_SHARD} is another")),
    "shard gone": (LAST_SHARD, Path.unlink, ANOTHER.format(f"{LAST_SHARD} is missing")),
    "index": ("model.safetensors.index.json", add_bytes, ANOTHER.format("its model.safetensors.index.json is another")),
    "model card": ("README.md", add_bytes, ANOTHER.format("its README.md is another")),
    "config gone": ("config.json", Path.unlink, ANOTHER.format("config.json is missing")),
}


@pytest.mark.parametrize(
    "change",
    [name if name in ("weights", "index") else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES],
)
def test_a_finished_folder_that_has_changed_is_refused(small_source: Path, tmp_path: Path, change: str) -> None:
    name, edit, problem = CHANGES[change]
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    edit(tmp_path / "hf" / name)
    before = contents(tmp_path / "hf")
    with raises_exactly(DestinationError, f"{tmp_path}/hf{problem}"):
        convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == before


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        pytest.param(
            {"max_shard_size": "5GB"}, "its tensors have other shapes, dtypes or files", marks=pytest.mark.slow
        ),
        ({"dtype": "fp16"}, "its tensors have other shapes, dtypes or files"),
        ({"model_type": "mistral"}, "its tokenizer_config.json is another"),
    ],
)
def test_a_finished_folder_of_another_plan_is_refused(
    small_source: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    before = contents(tmp_path / "hf")
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/hf: holds another finished conversion: {problem}; choose a new or empty folder",
    ):
        convert_checkpoint(small_source, tmp_path / "hf", **{"max_shard_size": SHARDS, **options})
    assert contents(tmp_path / "hf") == before


def test_a_finished_folder_of_another_source_is_refused(
    small_source: Path, tiny_geometry: Geometry, tmp_path: Path
) -> None:
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    before = contents(tmp_path / "hf")
    write_consolidated(tmp_path / "other", tiny_geometry, torch.bfloat16)
    # Which of the tensors that threads compare at the time is up to them.
    found = rf"{re.escape(str(tmp_path))}/hf: holds another finished conversion: the source gives another tensor "
    with pytest.raises(DestinationError, match=rf"\A{found}'[\w.]+'; choose a new or empty folder\Z"):
        convert_checkpoint(tmp_path / "other", tmp_path / "hf", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == before


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda manifest: manifest.update(checksum="crc32"), "checksums of kind 'crc32', must be xxh3_128"),
        (lambda manifest: manifest.pop("checksum"), "KeyError: 'checksum'"),
        (lambda manifest: manifest.update(tensors=[]), "AttributeError: <*>"),
        (lambda manifest: manifest["tensors"].update({"lm_head.weight": {}}), "TypeError: <*>"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(
    small_source: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    path = tmp_path / "hf" / MANIFEST_NAME
    edit_json(path, edit)
    message = whole(f"{path}: not a manifest of a conversion: {problem}; convert again")
    for read in (lambda: read_manifest(tmp_path / "hf"), lambda: convert_checkpoint(small_source, tmp_path / "hf")):
        with pytest.raises(CheckpointError, match=message):
            read()


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("limit", [0, 60_000, 300_000, 600_000])
def test_a_disk_that_becomes_full_is_one_error_and_the_rerun_completes(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    left, write = limit, stream_module._write

    def write_while_there_is_room(stream: Any, data: memoryview, offset: int) -> None:
        nonlocal left
        write(stream, data[:left], offset)
        left -= min(left, len(data))
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stream_module, "_write", write_while_there_is_room)
        with raises_exactly(
            DestinationError,
            f"{tmp_path}/hf: not finished: [Errno 28] No space left on device; when that is fixed, run it again",
        ):
            convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert_another_run_ends_it(small_source, tmp_path / "hf", expected)


def test_data_that_the_disk_refuses_at_last_is_one_error(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def sync_small_files(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 10**6 and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync_small_files)
        with raises_exactly(
            DestinationError,
            f"{tmp_path}/hf: not finished: [Errno 5] Input/output error; when that is fixed, run it again",
        ):
            convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="5GB")
    assert not list((tmp_path / "hf").glob("*.safetensors"))


def test_a_limit_on_the_size_of_files_is_one_error_and_the_rerun_completes(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, resource.RLIM_INFINITY))
            convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
        except DestinationError as error:
            status = 0 if "File too large" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert contents(tmp_path / "hf") == expected


@pytest.mark.skipif(
    not can_mount(), reason="a small disk can be mounted by the superuser only, where the system lets it"
)
@pytest.mark.parametrize(
    "room", [4_600_000, *(pytest.param(room, marks=pytest.mark.slow) for room in (4_400_000, 4_800_000))]
)
def test_a_full_disk_is_one_error_and_the_rerun_completes(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    needed = sum(map(len, expected.values()))
    assert needed > 4_900_000
    with small_disk(tmp_path / "disk", room) as resize:
        destination = tmp_path / "disk" / "hf"
        problem = f"{destination}: needs <*> bytes, the disk has <*> free; make room or choose another disk"
        with pytest.raises(DestinationError, match=whole(problem)):
            convert_checkpoint(small_source, destination, max_shard_size=SHARDS)
        assert not destination.exists()
        with monkeypatch.context() as patch:
            # Another program fills the disk meanwhile.
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
            with raises_exactly(
                DestinationError,
                f"{destination}: not finished: [Errno 28] No space left on device; when that is fixed, run it again",
            ):
                convert_checkpoint(small_source, destination, max_shard_size=SHARDS)
        assert is_whole_or_unnamed(destination, expected)
        resize(10 * needed)
        convert_checkpoint(small_source, destination, max_shard_size=SHARDS)
        assert contents(destination) == expected


@pytest.mark.parametrize("reads", [9, *(pytest.param(reads, marks=pytest.mark.slow) for reads in (0, 1, 22))])
def test_a_read_error_is_one_error_and_the_rerun_completes(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    monkeypatch.setattr(FailingFile, "reads_left", reads)
    with monkeypatch.context() as patch:
        patch.setattr(FileTensor, "open", open_failing)
        problem = "tensor '<*>' cannot be read: [Errno 5] Input/output error; fix that and run it again"
        with pytest.raises(CheckpointError, match=whole(problem)):
            convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
    assert_another_run_ends_it(small_source, tmp_path / "hf", expected)


def test_a_source_that_shrinks_meanwhile_is_one_error(small_source: Path, tmp_path: Path) -> None:
    def shrink(_: int) -> None:
        for path in small_source.glob("consolidated*"):
            os.truncate(path, 2000)

    # Which of the tensors that threads read at the time is up to them.
    message = r"tensor '[\w.]+' ends early: its file has changed since it was checked; run again"
    with pytest.raises(CheckpointError, match=rf"\A{message}\Z"):
        convert_checkpoint(small_source, tmp_path / "hf", progress=shrink)
    assert not (tmp_path / "hf" / "model.safetensors").exists()


def test_two_runs_into_one_folder_refuse_each_other(small_source: Path, tmp_path: Path) -> None:
    with (
        unfinished(tmp_path / "hf"),
        raises_exactly(DestinationError, f"{tmp_path}/hf: another conversion writes into it now; wait for its end"),
    ):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert not (tmp_path / "hf" / UNFINISHED_NAME).exists()


@pytest.mark.slow
def test_of_many_runs_at_once_one_writes_and_the_end_is_the_same(
    small_source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    children = []
    for _ in range(6):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                convert_checkpoint(small_source, tmp_path / "hf", max_shard_size=SHARDS)
                status = 0
            except DestinationError:
                status = 2
            finally:
                os._exit(status)
    statuses = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    assert 0 in statuses
    assert statuses <= {0, 2}
    assert contents(tmp_path / "hf") == expected


def test_a_conversion_that_finishes_before_the_lock_is_taken_is_not_replaced(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(small_source, tmp_path / "hf")

    def finish_and_lock(*_: Any) -> None:
        (tmp_path / "hf" / UNFINISHED_NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", finish_and_lock)
    before = contents(tmp_path / "hf")
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/hf: another conversion has just finished in it; use what it wrote",
    ):
        convert_checkpoint(small_source, tmp_path / "hf")
    before.pop(UNFINISHED_NAME)
    assert contents(tmp_path / "hf") == before


def test_a_conversion_that_finished_since_the_check_is_not_replaced(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_destination

    def check_and_finish(*arguments: Any) -> str:
        state = check(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(convert_module, "check_destination", check)
            convert_checkpoint(small_source, tmp_path / "hf")
        return state

    monkeypatch.setattr(convert_module, "check_destination", check_and_finish)
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/hf: holds 'LICENSE', not of an unfinished conversion; choose a new or empty folder",
    ):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert not (tmp_path / "hf" / UNFINISHED_NAME).exists()

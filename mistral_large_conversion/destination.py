"""Writing of a folder: files appear whole, an unfinished folder is known as such, and one run at a time writes."""

import json
import os
import shutil
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, BinaryIO, Literal

from mistral_large_conversion.checkpoint.atomic_write import PARTIAL_SUFFIX, sync_folder
from mistral_large_conversion.checkpoint.source_files import LARGEST_JSON, parse_json_object
from mistral_large_conversion.errors import DestinationError
from mistral_large_conversion.manifest import MANIFEST_NAME

# This file is the first to come and the last to go: a folder that holds it is an unfinished conversion of ours.
UNFINISHED_NAME = "conversion.unfinished"
UNFINISHED_TEXT = b"This conversion has not finished. Run it again: it keeps what is done and proves it.\n"
# Only these are removed from an unfinished conversion.
OUTPUT_PATTERNS = (
    "*.partial",
    "*.safetensors",
    "*.safetensors.index.json",
    "LICENSE*",
    "NOTICE*",
    "Notice*",
    MANIFEST_NAME,
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "modeling_mistral_large_remote.py",
    "params.json",
    "special_tokens_map.json",
    "tokenizer*",
)

State = Literal["new", "unfinished", "finished"]


def check_destination(source: Path | None, destination: Path, needed_bytes: int) -> State:
    """Refuse a folder that must not be written, before anything is, and say what the folder holds of ours.

    Raises:
        DestinationError: the source itself or a folder in or around it, a folder that holds anything but a conversion
            of ours, or a disk with less than `needed_bytes`.
    """
    target = destination.resolve()
    if source is not None:
        origin = source.resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise DestinationError(f"{destination}: is, holds or is in the source {source}; choose a folder elsewhere")
    if target.exists() and not target.is_dir():
        raise DestinationError(f"{destination}: is a file; choose a new or an empty folder")
    if (target / MANIFEST_NAME).exists() and not (target / UNFINISHED_NAME).exists():
        return "finished"
    if os.path.lexists(target / UNFINISHED_NAME):
        _check_marker(target / UNFINISHED_NAME)
    leftovers = _leftovers(target, may_be_unfinished=True) if target.is_dir() else []
    existing = next(folder for folder in (target, *target.parents) if folder.is_dir())
    # What an unfinished conversion has left is kept or removed: both makes room. A file may have holes.
    free = shutil.disk_usage(existing).free + sum(map(_bytes_on_disk, leftovers))
    if free < needed_bytes:
        raise DestinationError(
            f"{destination}: needs {needed_bytes:,} bytes, the disk has {free:,} free; make room or choose another disk"
        )
    return "unfinished" if (target / UNFINISHED_NAME).exists() else "new"


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of a new or empty one when all files are written; an error leaves nothing."""
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as work:
        # With the mode that a folder has, not that of a temporary one.
        partial = Path(work, "whole")
        partial.mkdir()
        yield partial
        if destination.is_dir():
            # One that has something in it by now is refused.
            destination.rmdir()
        partial.rename(destination)
    sync_folder(destination.parent)


class Journal:
    """What an unfinished conversion is of, and the checksums of the tensors that it has written."""

    def __init__(self, stream: BinaryIO, identity: dict[str, Any] | None) -> None:
        self._stream = stream
        self._lock = Lock()
        self.checksums: dict[str, str] = {}
        # Any line may be torn or damaged: what it says of is written again.
        is_readable = os.fstat(stream.fileno()).st_size <= LARGEST_JSON
        lines = stream.read().splitlines() if is_readable else []
        entries = [entry for line in lines if (entry := _json_object(line)) is not None]
        if identity is not None and entries[:1] == [{"identity": identity}]:
            for entry in entries[1:]:
                self.checksums |= entry
            self._stream.write(b"\n")
        else:
            stream.seek(0)
            stream.truncate()
            stream.write(UNFINISHED_TEXT)
            self._append({"identity": identity})
        self._stream.flush()
        os.fsync(stream.fileno())

    def record(self, tensor: str, checksum: str) -> None:
        """Note that a tensor is written, with this checksum of its bytes."""
        with self._lock:
            self.checksums[tensor] = checksum
            self._append({tensor: checksum})

    def _append(self, entry: dict[str, Any]) -> None:
        self._stream.write(json.dumps(entry).encode() + b"\n")
        self._stream.flush()


@contextmanager
def unfinished(
    destination: Path, *, keep: Container[str] = (), identity: dict[str, Any] | None = None
) -> Iterator[Journal]:
    """Hold a destination for one run; an error leaves it unfinished.

    keep: the names of files that may stay from an interrupted run, whole or not; all others are removed.
    identity: what is converted into what; the journal of an interrupted run of the same goes on. None is never the
        same.

    Raises:
        DestinationError: another run holds it, or has finished in it since it was checked.
    """
    destination.mkdir(parents=True, exist_ok=True)
    marker = destination / UNFINISHED_NAME
    may_be_unfinished = os.path.lexists(marker)
    if may_be_unfinished:
        _check_marker(marker)
    with marker.open("r+b" if may_be_unfinished else "x+b") as stream:
        _lock(stream, destination)
        try:
            leftovers = _leftovers(destination, may_be_unfinished)
        except DestinationError:
            if not may_be_unfinished:
                marker.unlink()
            raise
        journal = Journal(stream, identity)
        sync_folder(destination)
        for leftover in leftovers:
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif not _may_stay(leftover, keep):
                leftover.unlink()
        yield journal
        if os.name != "posix":
            # Windows removes no open file.
            stream.close()
        marker.unlink()
        sync_folder(destination)


def _may_stay(leftover: Path, keep: Container[str]) -> bool:
    """Whether a file of an interrupted run is of use, and of no one else: one with a second name would be written too.

    A small file is compared whole; of weights, the journal says what is there.
    """
    name = leftover.name.removesuffix(PARTIAL_SUFFIX)
    status = leftover.lstat()
    is_own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return is_own and name in keep and (leftover.name == name or not os.path.lexists(leftover.with_name(name)))


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_json_object(line)
    except ValueError:
        return None


def _bytes_on_disk(path: Path) -> int:
    try:
        status = path.lstat()
    except FileNotFoundError:
        # Another run that writes into the folder has just renamed it.
        return 0
    # Windows does not tell.
    return min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)


def _leftovers(destination: Path, may_be_unfinished: bool) -> list[Path]:
    """What an unfinished conversion has left, without its marker; a DestinationError if anything else is there."""
    present = {path.name: path for path in destination.iterdir()}
    is_unfinished = present.pop(UNFINISHED_NAME, None) is not None and may_be_unfinished
    strangers = [
        name
        for name in sorted(present)
        if not is_unfinished or not any(fnmatchcase(name, pattern) for pattern in OUTPUT_PATTERNS)
    ]
    if strangers:
        raise DestinationError(
            f"{destination}: holds {strangers[0]!r}, not of an unfinished conversion; choose a new or empty folder"
        )
    return list(present.values())


def _check_marker(marker: Path) -> None:
    """Refuse a marker that is no file, or has a second name: it is written in place, as it holds the lock.

    Raises:
        DestinationError: such a marker, and what to do about it.
    """
    try:
        status = marker.lstat()
    except FileNotFoundError:
        raise DestinationError(
            f"{marker.parent}: another conversion has just finished in it; use what it wrote"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise DestinationError(
            f"{marker.parent}: holds {marker.name!r}, not of an unfinished conversion; choose a new or empty folder"
        )
    if status.st_nlink > 1:
        raise DestinationError(
            f"{marker}: a hard link, so another file would be written too; remove the folder and convert again"
        )


def _lock(stream: BinaryIO, destination: Path) -> None:
    """Take the lock that a process loses when it ends in whatever way."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DestinationError(f"{destination}: another conversion writes into it now; wait for its end") from None
    if not os.fstat(stream.fileno()).st_nlink:
        raise DestinationError(f"{destination}: another conversion has just finished in it; use what it wrote")

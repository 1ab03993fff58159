"""Writing of a folder: files appear whole, an unfinished folder is known as such, and one run at a time writes."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from modeling_mistral_large.errors import DestinationError

# This file is the first to come and the last to go: a folder that holds it is an unfinished conversion of ours.
UNFINISHED_NAME = "conversion.unfinished"
UNFINISHED_TEXT = b"This conversion has not finished. Run it again: it starts over and replaces what is here.\n"
PARTIAL_SUFFIX = ".partial"
# Only these are removed from an unfinished conversion.
OUTPUT_PATTERNS = (
    "*.partial",
    "*.safetensors",
    "*.safetensors.index.json",
    "LICENSE*",
    "NOTICE*",
    "Notice*",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "params.json",
    "special_tokens_map.json",
    "tokenizer*",
)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside its place, and rename it into its place once all of it is on the disk."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def json_bytes(content: dict[str, Any]) -> bytes:
    """The text of a JSON file, laid out as transformers does it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; systems that cannot open a folder need no such thing."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_destination(source: Path | None, destination: Path, needed_bytes: int) -> None:
    """Refuse a folder that must not be written, before anything is.

    Raises:
        DestinationError: the source itself or a folder in or around it, a folder that holds anything but an unfinished
            conversion, or a disk with less than `needed_bytes`.
    """
    target = destination.resolve()
    if source is not None:
        origin = source.resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise DestinationError(f"{destination}: is, holds or is in the source {source}; choose a folder elsewhere")
    if target.exists() and not target.is_dir():
        raise DestinationError(f"{destination}: is a file; choose a new or an empty folder")
    leftovers = _leftovers(target, may_be_unfinished=True) if target.is_dir() else []
    existing = next(folder for folder in (target, *target.parents) if folder.is_dir())
    # What an unfinished conversion has left is removed before the new files come.
    free = shutil.disk_usage(existing).free + sum(path.lstat().st_size for path in leftovers)
    if free < needed_bytes:
        raise DestinationError(
            f"{destination}: needs {needed_bytes:,} bytes, the disk has {free:,} free; make room or choose another disk"
        )


@contextmanager
def unfinished(destination: Path) -> Iterator[None]:
    """Hold a destination for one run, which starts with nothing in it; an error leaves it unfinished.

    Raises:
        DestinationError: another run holds it, or has finished in it since it was checked.
    """
    destination.mkdir(parents=True, exist_ok=True)
    marker = destination / UNFINISHED_NAME
    may_be_unfinished = marker.exists()
    with marker.open("r+b" if may_be_unfinished else "xb") as stream:
        _lock(stream, destination)
        try:
            leftovers = _leftovers(destination, may_be_unfinished)
        except DestinationError:
            if not may_be_unfinished:
                marker.unlink()
            raise
        stream.write(UNFINISHED_TEXT)
        stream.flush()
        os.fsync(stream.fileno())
        sync_folder(destination)
        for leftover in leftovers:
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        yield
        if os.name != "posix":
            # Windows removes no open file.
            stream.close()
        marker.unlink()
        sync_folder(destination)


def _leftovers(destination: Path, may_be_unfinished: bool) -> list[Path]:
    """What an unfinished conversion has left, without its marker; a DestinationError if anything else is there."""
    present = {path.name: path for path in destination.iterdir()}
    marker = present.pop(UNFINISHED_NAME, None)
    is_unfinished = may_be_unfinished and marker is not None
    strangers = [
        name
        for name in sorted(present)
        if not is_unfinished or not any(fnmatchcase(name, pattern) for pattern in OUTPUT_PATTERNS)
    ]
    if marker is not None and (marker.is_symlink() or not marker.is_file()):
        strangers.append(UNFINISHED_NAME)
    if strangers:
        raise DestinationError(
            f"{destination}: holds {strangers[0]!r}, not of an unfinished conversion; choose a new or empty folder"
        )
    return list(present.values())


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

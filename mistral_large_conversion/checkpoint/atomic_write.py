"""Files that appear whole: written next to their place, flushed to the disk, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file next to its place, and rename it into its place once all of it is on the disk."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    # Whatever has the name, a link too, loses it: only a new file has certainly no other name.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as stream:
        yield stream
    commit_file(path)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file as `atomic_write` does."""
    with atomic_write(path) as stream:
        stream.write(content)


def commit_file(path: Path, partial: Path | None = None) -> None:
    """Flush what was written next to the place of a file, or as `partial`, then rename it into its place."""
    partial = partial or path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("r+b") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def json_bytes(content: dict[str, Any], *, sort_keys: bool = False) -> bytes:
    """The text of a JSON file, laid out as transformers does it."""
    return (json.dumps(content, indent=2, sort_keys=sort_keys) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; systems that cannot open a folder need no such thing."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

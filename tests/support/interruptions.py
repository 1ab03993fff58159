"""What ends a conversion before its time: kills, full disks, disks that cannot be read."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.safetensors_header import FileTensor
from mistral_large_conversion.destination import UNFINISHED_NAME
from tests.support.checkpoints import contents


def kill_at_random_moments(
    start: Callable[[], int], kills: int, seconds: float, moments: random.Random
) -> Iterator[bool]:
    """Start a process, send SIGKILL within `seconds`, yield whether that has ended it; until so many were killed."""
    killed = 0
    while killed < kills:
        process = start()
        time.sleep(moments.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        killed += was_killed
        yield was_killed


def is_whole_or_unnamed(folder: Path, expected: dict[str, bytes]) -> bool:
    """Whether all that has its name in the folder is whole, and the index came when all else was there."""
    found = contents(folder) if folder.exists() else {}
    named = {name: content for name, content in found.items() if not name.endswith(".partial")}
    named.pop(UNFINISHED_NAME, None)
    is_whole = all(expected.get(name) == content for name, content in named.items())
    return is_whole and (named == expected or not any(name.endswith(".index.json") for name in named))


def can_mount() -> bool:
    """Whether this user may mount a disk in memory."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "--mount", "true"], capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many bytes at a new folder; it can be given another size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class FailingFile(FileIO):
    """A file that cannot be read to its end."""

    reads_left = 3

    def readinto(self, buffer: Any) -> int:
        FailingFile.reads_left -= 1
        if FailingFile.reads_left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(memoryview(buffer)[:40_000]) or 0


def open_failing(tensor: FileTensor) -> FileIO:
    """A stream on a tensor as `FileTensor.open` gives it, but one that fails."""
    stream = FailingFile(tensor.path)
    stream.seek(tensor.offset)
    return stream

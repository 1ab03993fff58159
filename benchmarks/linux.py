"""What benchmarks of files ask of Linux: the page cache, the memory of a process, processes of their own."""

import ctypes
import mmap
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def evict(files: Sequence[Path]) -> None:
    """Put files out of the page cache; an error if some of a file stays."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if (share := cached_share(path)) > 0.01:
            raise SystemExit(f"{path}: {share:.0%} of it are still in the page cache")


def cached_share(path: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    residency = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    descriptor = os.open(path, os.O_RDONLY)
    size = path.stat().st_size
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    failed = libc.mincore(address, size, residency)
    libc.munmap(address, size)
    os.close(descriptor)
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in residency) / pages


def memory(name: str) -> float:
    """A figure of this process, in GB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in status.splitlines() if line.startswith(f"{name}:"))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, from a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} failed") from None
    finally:
        process.join()

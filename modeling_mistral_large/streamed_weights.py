"""Weights of safetensors files on their way to a GPU: read by many threads, ahead of the copies, through pinned memory.

transformers maps the files and copies whole tensors out of the mapping, at most four at once: every page is faulted in,
what the files hold is cast on the CPU, and the driver copies it once more, because mapped memory is not pinned. Here,
pieces of the tensors are read into a few pinned buffers, copied from there by the GPU itself while the next ones are
read, and cast on the GPU. Names, devices, shards of a rank, conversions and quantizers stay transformers': it is given
objects that it slices and moves as it does the library's own.

What goes to a CPU is mapped as before, which copies nothing.
"""

import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mistral_large_conversion.checkpoint.safetensors_header import BYTES_OF, TORCH_NAMES, FileTensor, read_header
from mistral_large_conversion.errors import CheckpointError, SettingError

SWITCH = "MISTRAL_LARGE_STREAMED_LOADING"
# Types of devices; tests add the CPU, whose buffers are not pinned.
STREAMED_DEVICES = {"cuda"}
BUFFER_BYTES = 4 * 2**20
# Also on few cores, since a thread that waits for the disk needs none.
READERS = min(16, max(4, os.cpu_count() or 1))
# One is filled while the other is copied.
BUFFERS_OF_A_READER = 2

Index = EllipsisType | tuple[slice, ...]


def is_streamed(device: Any) -> bool:
    """Whether weights of a device are streamed: one of a device_map, where 0 is a GPU and "disk" none at all."""
    if device is None or device == "disk" or (isinstance(device, int) and not torch.cuda.is_available()):
        return False
    return torch.device(device).type in STREAMED_DEVICES


def is_switched_on() -> bool:
    """Whether the environment leaves streaming on.

    Raises:
        SettingError: a value that is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise SettingError(f"{SWITCH}={value!r}: must be 1, which is the default, or 0 to load as transformers does")
    return value == "1"


@dataclass
class Buffer:
    """Bytes of the host that a GPU copies from."""

    memory: Tensor
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when the GPU has copied what was read before."""
        if self.copied is not None:
            self.copied.synchronize()


@dataclass(frozen=True)
class Piece:
    """Some of a tensor's elements, `start` to `stop` of those that are loaded; `read` fills bytes with them."""

    start: int
    stop: int
    read: Callable[[Tensor], None]


class Staging:
    """The buffers between files and GPUs, which bound the memory of the host, and the threads that fill them."""

    def __init__(self, readers: int, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        shape = (BUFFERS_OF_A_READER * readers, buffer_bytes)
        self.memory = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        for memory in self.memory:
            self._free.put(Buffer(memory))
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="weights")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)

    def load(
        self,
        shape: Sequence[int],
        stored: torch.dtype,
        pieces: Sequence[Piece],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return a tensor on the device, of another dtype than the stored one if asked for; may run in many threads."""
        loaded = torch.empty(shape, dtype=dtype, device=device)
        stream = self._stream(loaded.device)
        if stream is not None:
            # The memory may have been another tensor's that a kernel in flight still reads.
            stream.wait_stream(torch.cuda.current_stream(loaded.device))
        copies = [self._readers.submit(self._copy, piece, loaded.view(-1), stored, stream) for piece in pieces]
        try:
            _wait(copies)
        finally:
            # Also before an error, after which the memory becomes another tensor's.
            if stream is not None:
                stream.synchronize()
        return loaded

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch types no constructor
            return self._streams[device]

    def _copy(self, piece: Piece, loaded: Tensor, stored: torch.dtype, stream: torch.cuda.Stream | None) -> None:
        # There are more buffers than threads, so that none waits for another thread.
        buffer = self._free.get()
        try:
            buffer.wait()
            part = loaded[piece.start : piece.stop]
            read = buffer.memory[: part.numel() * stored.itemsize]
            piece.read(read)
            elements = read.view(stored)
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                if stored is not part.dtype:
                    # A copy between devices that casts would cast on the CPU.
                    elements = elements.to(part.device, non_blocking=True)
                part.copy_(elements, non_blocking=True)
                buffer.copied = None if stream is None else stream.record_event()
        finally:
            self._free.put(buffer)


def _wait(copies: Sequence[Future[None]]) -> None:
    """Return when all are done, and only then raise what one of them has raised."""
    failure: BaseException | None = None
    for copy in copies:
        try:
            copy.result()
        except BaseException as error:
            failure = failure or error
    if failure is not None:
        raise failure


@dataclass(frozen=True, eq=False)
class StreamedTensor:
    """A tensor in a file as transformers reads it: sliced, and then moved to its device and dtype.

    file: where its bytes are.
    mapped: the library's own slice of the mapped file, for the CPU and for what is not streamed.
    """

    file: FileTensor
    mapped: Any
    staging: Staging

    def get_shape(self) -> list[int]:
        return list(self.file.shape)

    def get_dtype(self) -> str:
        return self.file.dtype

    def __getitem__(self, index: Index) -> "Selection":
        return Selection(self, index)

    def load(self, index: Index, device: torch.device, dtype: torch.dtype | None) -> Tensor | None:
        """Stream what an index selects: all, rows, or columns of a matrix; None for anything else."""
        stored: torch.dtype = getattr(torch, TORCH_NAMES[self.file.dtype])
        bounds = _bounds(self.file.shape, index)
        if bounds is None:
            return None
        if all(ends == (0, length) for ends, length in list(zip(bounds, self.file.shape, strict=True))[1:]):
            pieces = self._pieces_of_rows(*(bounds[0] if bounds else (0, 1)))
        elif len(bounds) == 2:
            pieces = self._pieces_of_columns(*bounds)
        else:
            return None
        shape = [stop - start for start, stop in bounds]
        return self.staging.load(shape, stored, pieces, device, dtype or stored)

    def _pieces_of_rows(self, first: int, last: int) -> list[Piece]:
        """Whole rows are one range of the file, which is cut anywhere."""
        width, itemsize = math.prod(self.file.shape[1:]), BYTES_OF[self.file.dtype]
        count, step = (last - first) * width, self.staging.buffer_bytes // itemsize
        return [
            Piece(start, min(start + step, count), self._reader(self.file.offset + (first * width + start) * itemsize))
            for start in range(0, count, step)
        ]

    def _pieces_of_columns(self, rows: tuple[int, int], columns: tuple[int, int]) -> list[Piece]:
        """Parts of rows are many ranges of the file, which are copied out of its mapping."""
        width = columns[1] - columns[0]
        step = self.staging.buffer_bytes // max(1, width * BYTES_OF[self.file.dtype])
        assert step, "a row of a shard fits a buffer"
        return [
            Piece((row - rows[0]) * width, (last - rows[0]) * width, self._gatherer(slice(row, last), slice(*columns)))
            for row in range(*rows, step)
            for last in [min(row + step, rows[1])]
            if width
        ]

    def _reader(self, offset: int) -> Callable[[Tensor], None]:
        def read(memory: Tensor) -> None:
            rest = memory.numpy().data
            with self.file.path.open("rb", buffering=0) as stream:
                stream.seek(offset)
                while rest:
                    count = stream.readinto(rest)
                    if not count:
                        raise CheckpointError(
                            f"{self.file.path}: ends within tensor {self.file.name!r}, which its header has whole; "
                            "a file must stay as it is while it is loaded; load it again when nothing writes to it, or "
                            "download it again"
                        )
                    rest = rest[count:]

        return read

    def _gatherer(self, rows: slice, columns: slice) -> Callable[[Tensor], None]:
        def gather(memory: Tensor) -> None:
            part = self.mapped[rows, columns].view(torch.uint8).numpy()
            # torch would start threads of its own for each of ours.
            np.copyto(memory.numpy().reshape(part.shape), part)

        return gather


@dataclass(frozen=True)
class Selection:
    """What an index selects of a tensor, to be moved: `to` is all that transformers does with it."""

    tensor: StreamedTensor
    index: Index

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the elements on a device (none: the CPU) and in a dtype (none: the stored one)."""
        if is_streamed(device):
            loaded = self.tensor.load(self.index, torch.device(device), dtype)
            if loaded is not None:
                return loaded
        moved: Tensor = self.mapped().to(device=device, dtype=dtype)
        return moved

    def mapped(self) -> Tensor:
        mapped: Tensor = self.tensor.mapped[self.index]
        return mapped

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Be a tensor for torch's functions: transformers concatenates the parts of shards that are interleaved."""
        return function(*map(_as_tensors, args), **(kwargs or {}))


def _as_tensors(value: Any) -> Any:
    if isinstance(value, Selection):
        return value.mapped()
    return [_as_tensors(part) for part in value] if isinstance(value, list) else value


def _bounds(shape: Sequence[int], index: Index) -> list[tuple[int, int]] | None:
    """First and past-the-last element that an index selects of each dimension; None if it is no such index."""
    if index is Ellipsis:
        return [(0, length) for length in shape]
    if not isinstance(index, tuple) or len(index) != len(shape):
        return None
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in index):
        return None
    bounds = [part.indices(length)[:2] for part, length in zip(index, shape, strict=True)]
    return [(start, max(start, stop)) for start, stop in bounds]


@contextmanager
def streamed_weights(files: Sequence[str], devices: Collection[Any]) -> Iterator[dict[str, Any] | None]:
    """Open safetensors files for transformers, as long as the context lasts; None where it reads them itself.

    devices: those of the device_map.

    Raises:
        SettingError: the switch in the environment is neither 0 nor 1.
    """
    if not is_switched_on() or not any(map(is_streamed, devices)):
        yield None
        return
    with ExitStack() as stack:
        staging = Staging(READERS, BUFFER_BYTES)
        stack.callback(staging.close)
        weights = {}
        for file in files:
            mapped = stack.enter_context(safe_open(file, framework="pt"))
            # A tensor that the header's reader does not know, of another library's dtype, is read as before.
            known = {tensor.name: tensor for tensor in read_header(Path(file))[0]}
            for name in mapped.keys():  # noqa: SIM118  # not a dict
                part = mapped.get_slice(name)
                weights[name] = StreamedTensor(known[name], part, staging) if name in known else part
        yield weights

"""Moving of the weights: a few blocks of a few tensors in memory at a time, several threads."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO, Protocol, TypeVar

import numpy

from mistral_large_conversion.checkpoint.atomic_write import PARTIAL_SUFFIX, commit_file
from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.safetensors_header import TensorEntry
from mistral_large_conversion.destination import Journal
from mistral_large_conversion.manifest import new_checksum
from mistral_large_conversion.plan import ConversionPlan, PlannedFile
from mistral_large_conversion.planned_tensor import BLOCK_BYTES, PlannedTensor, transformed
from mistral_large_conversion.progress import Progress
from mistral_large_conversion.transforms import Rows

# For larger writes, Linux looks for as large pieces of free memory: five times the work once that is fragmented.
WRITE_BYTES = 2**17
# So much is written before the disk is told to begin with it: all at the end would be waited for.
WRITE_BACK_BYTES = 2**23
# The disk, the memory and one or two processors are busy with these; more threads help fast disks only.
DEFAULT_JOBS = 4

Item = TypeVar("Item")
# Rows of each output of a tensor, from the first on.
Blocks = Iterable[tuple[Rows, ...]]


class StoppedError(Exception):
    """Another thread has failed, or the user has interrupted all: this one has nothing to report."""


def write_weights(
    plan: ConversionPlan,
    destination: Path,
    journal: Journal,
    *,
    jobs: int,
    progress: Progress,
    calibrator: "Calibrator | None" = None,
) -> dict[str, str]:
    """Write the files of weights of a plan, each under its name once it is whole: the checksum of each tensor.

    Tensors that the journal of an interrupted run knows are read and kept if they have its checksum.
    calibrator: quantizes what the plan has calibrated, when all else is written.
    """
    files = [OutputFile(file, destination, journal) for file in plan.files]
    every = [(file, tensor) for file in files for tensor in file.plan.tensors]
    work = [(file, tensor) for file, tensor in every if not plan.is_calibrated(tensor)]

    def write(item: tuple[OutputFile, PlannedTensor], advance: Progress) -> None:
        item[0].write(item[1], advance)

    run_threads(write, work, jobs=jobs, progress=progress)
    if calibrator is not None:
        calibrator.quantize(WeightStore(every, progress), destination, journal)
    return {output.name: journal.checksums[output.name] for file in plan.files for output in file.outputs}


def run_threads(act: Callable[[Item, Progress], None], items: Iterable[Item], *, jobs: int, progress: Progress) -> None:
    """Call `act` on each item in some thread; the first error stops all. One thread at a time tells progress."""
    stop, lock = Event(), Lock()

    def advance(count: int) -> None:
        if stop.is_set():
            raise StoppedError
        with lock:
            progress(count)

    def run(item: Item) -> None:
        if stop.is_set():
            return
        try:
            act(item, advance)
        except StoppedError:
            return
        except BaseException:
            stop.set()
            raise

    work = list(items)
    with ThreadPoolExecutor(min(jobs, max(1, len(work)))) as pool:
        try:
            for future in as_completed([pool.submit(run, item) for item in work]):
                future.result()
        finally:
            # An interrupt comes here, in the main thread.
            stop.set()


class OutputFile:
    """One file of weights that is being written, by several threads."""

    def __init__(self, plan: PlannedFile, folder: Path, journal: Journal) -> None:
        self.plan = plan
        self.path = folder / plan.name
        self.partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self.journal = journal
        self.lock = Lock()
        self.tensors_to_come = len(plan.tensors)
        # What an interrupted run has finished has to prove itself again.
        if self.path.exists():
            self.path.replace(self.partial)
        with self.partial.open("r+b" if self.partial.exists() else "xb") as stream:
            stream.write(plan.header)
            stream.truncate(plan.size)

    def write(self, tensor: PlannedTensor, progress: Progress, blocks: Blocks | None = None) -> None:
        """Write a tensor; the one that is the last to come finishes the file.

        blocks: the rows of its outputs; without them, those that its source gives.
        """
        if self.has(tensor):
            progress(tensor.size)
        else:
            for output, checksum in self._copy(tensor, blocks or transformed(tensor), progress).items():
                self.journal.record(output, checksum)
        with self.lock:
            self.tensors_to_come -= 1
            is_last = not self.tensors_to_come
        if is_last:
            commit_file(self.path)

    def has(self, tensor: PlannedTensor) -> bool:
        """Whether an earlier run has written all outputs of a tensor, and they are still as it did."""
        return all(map(self._is_there, tensor.outputs))

    def _is_there(self, output: TensorEntry) -> bool:
        recorded = self.journal.checksums.get(output.name)
        return recorded is not None and recorded == file_checksum(self.partial, *self.plan.places[output.name])

    def _copy(self, tensor: PlannedTensor, blocks: Blocks, progress: Progress) -> dict[str, str]:
        checksums = [new_checksum() for _ in tensor.outputs]
        places = [self.plan.places[output.name][0] for output in tensor.outputs]
        on_their_way = places.copy()
        with self.partial.open("r+b", buffering=0) as stream:
            for rows in blocks:
                for number, block in enumerate(rows):
                    data = block.data.cast("B")
                    checksums[number].update(data)
                    _write(stream, data, places[number])
                    places[number] += len(data)
                    if places[number] - on_their_way[number] >= WRITE_BACK_BYTES:
                        _begin_write_back(stream, on_their_way[number], places[number])
                        on_their_way[number] = places[number]
                    progress(len(data))
        return {output.name: checksum.hexdigest() for output, checksum in zip(tensor.outputs, checksums, strict=True)}


class WeightStore:
    """What a calibrator reads of the source of a conversion, and where it writes; names are those of the HF layout."""

    def __init__(self, work: Iterable[tuple[OutputFile, PlannedTensor]], progress: Progress) -> None:
        self._work = {tensor.outputs[0].name.removesuffix("_packed"): (file, tensor) for file, tensor in work}
        self._progress = progress

    def read(self, name: str) -> tuple[Rows, str]:
        """All rows of a tensor as the conversion has them before it quantizes, and their dtype."""
        _, tensor = self._work[name]
        dtype = tensor.outputs[0].dtype if tensor.quantize is None else tensor.quantize.dtype
        blocks = [rows.copy() for (rows,) in transformed(replace(tensor, quantize=None))]
        return numpy.concatenate(blocks), dtype

    def has(self, name: str) -> bool:
        """Whether an earlier run has written a weight, codes and scales, and they are still as it did."""
        file, tensor = self._work[name]
        return file.has(tensor)

    def write(self, name: str, *outputs: Rows) -> None:
        """Write the codes and the scales of a weight, each once; of what an earlier run has written, nothing."""
        file, tensor = self._work[name]
        file.write(tensor, self._progress, [outputs] if outputs else None)


class Calibrator(Protocol):
    """Quantizes decoder layers by the activations that reach them: see `modeling_mistral_large.calibration`."""

    @property
    def calibration(self) -> Calibration: ...

    @property
    def working_bytes(self) -> int:
        """Bytes on disk that it takes besides the weights."""
        ...

    @property
    def working_names(self) -> Iterable[str]:
        """The names of its own files, without the suffix, that a later run of the same goes on with."""
        ...

    def quantize(self, weights: WeightStore, folder: Path, journal: Journal) -> None:
        """Write every calibrated weight, or keep it where it is written, and leave no file of its own."""
        ...


def checksums_of(tensor: PlannedTensor, progress: Progress) -> dict[str, str]:
    """The checksum of each output of a tensor, without writing it."""
    checksums = [new_checksum() for _ in tensor.outputs]
    for blocks in transformed(tensor):
        for checksum, block in zip(checksums, blocks, strict=True):
            checksum.update(block.data.cast("B"))
            progress(block.nbytes)
    return {output.name: checksum.hexdigest() for output, checksum in zip(tensor.outputs, checksums, strict=True)}


def file_checksum(path: Path, offset: int, size: int) -> str | None:
    """The checksum of a part of a file, or None if it ends before."""
    checksum = new_checksum()
    buffer = bytearray(min(BLOCK_BYTES, size))
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while size:
            count = stream.readinto(memoryview(buffer)[:size])
            if not count:
                return None
            checksum.update(memoryview(buffer)[:count])
            size -= count
    return checksum.hexdigest()


def _write(stream: BinaryIO, data: memoryview, offset: int) -> None:
    stream.seek(offset)
    while data:
        # A disk that becomes full takes a part first, and says so at the next one.
        data = data[stream.write(data[:WRITE_BYTES]) :]


def _begin_write_back(stream: BinaryIO, start: int, end: int) -> None:
    """Have what was written go to the disk from now on, without waiting for it, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)

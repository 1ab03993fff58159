"""Headers of safetensors files: what is stored where, checked against the file itself before a byte of it is used.

A file is 8 bytes of header length (little-endian), the header as JSON, and the data. Each tensor of the header has a
dtype, a shape and the two ends of its bytes in the data; together they must fill the data without gap or overlap.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mistral_large_conversion.checkpoint.source_files import parse_json_object, shown
from mistral_large_conversion.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
}
# Bytes of one number. Weights are of the first five; the integers are codes of quantized ones.
BYTES_OF = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I32": 4, "I64": 8}
FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# The limit of the safetensors library.
LARGEST_HEADER = 100_000_000
LENGTH_BYTES = 8
WEIGHTS_SUFFIX = ".safetensors"
# What every file of a checkpoint for PyTorch says of itself; transformers asks for it.
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor; `size` counts bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class StoredTensor(TensorEntry):
    """A tensor that can be read."""

    def open(self) -> BinaryIO:
        """A stream whose next `size` bytes are the tensor, row after row."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor in a safetensors file; `offset` counts bytes from the start of the file."""

    path: Path
    offset: int

    def open(self) -> BinaryIO:
        stream = self.path.open("rb", buffering=0)
        stream.seek(self.offset)
        return stream


@dataclass(frozen=True)
class MemoryTensor(StoredTensor):
    """A tensor of a state dict, on any device."""

    tensor: "torch.Tensor"

    @classmethod
    def of(cls, name: str, tensor: "torch.Tensor") -> "MemoryTensor":
        dtypes = {torch_name: dtype for dtype, torch_name in TORCH_NAMES.items()}
        torch_name = str(tensor.dtype).removeprefix("torch.")
        return cls(name, dtypes.get(torch_name, torch_name), tuple(tensor.shape), tensor.nbytes, tensor)

    def open(self) -> BinaryIO:
        import torch

        return BytesIO(self.tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)


def read_exactly(stream: BinaryIO, buffer: memoryview, tensor: TensorEntry) -> None:
    """Fill a buffer with the next bytes of a tensor, from what its `open` returned.

    Raises:
        CheckpointError: it cannot be read, or ends before.
    """
    filled = 0
    while filled < len(buffer):
        try:
            count = stream.readinto(buffer[filled:])  # type: ignore[attr-defined]  # every stream of ours is raw or BytesIO
        except OSError as error:
            raise CheckpointError(
                f"tensor {tensor.name!r} cannot be read: {error}; fix that and run it again"
            ) from error
        if not count:
            raise CheckpointError(
                f"tensor {tensor.name!r} ends early: its file has changed since it was checked; run again"
            )
        filled += count


def read_header(path: Path) -> tuple[list[FileTensor], list[str]]:
    """The tensors of a file in the order of their bytes, and what is wrong with the file."""
    try:
        with path.open("rb") as stream:
            file_size = path.stat().st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if length > min(file_size - LENGTH_BYTES, LARGEST_HEADER):
                return [], [f"{path.name} is not a whole safetensors file: header of {length} in {file_size} bytes"]
            header = parse_json_object(stream.read(length))
            if not _is_metadata(header.pop("__metadata__", {})):
                return [], [f"{path.name} has a broken header: __metadata__ must be an object of texts"]
    except OSError as error:
        return [], [f"{path.name} cannot be read: {error.strerror}"]
    except ValueError as error:
        return [], [f"{path.name} has a broken header: {error}"]
    data_start = LENGTH_BYTES + length
    tensors, problems = [], []
    for name, entry in header.items():
        try:
            tensors.append(_tensor(path, data_start, name, entry))
        except ValueError as error:
            problems.append(f"{path.name}: {name!r} {error}")
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    if not problems:
        problems = [f"{path.name}: {problem}" for problem in _layout_problems(tensors, data_start, file_size)]
    return tensors, problems


def header_bytes(path: Path) -> bytes:
    """The first bytes of a file, up to its data: the length of the header and the header, whatever they are.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        return start + stream.read(min(int.from_bytes(start, "little"), LARGEST_HEADER))


def _tensor(path: Path, data_start: int, name: str, entry: object) -> FileTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("has another entry than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_OF:
        raise ValueError(f"has dtype {shown(dtype)}, must be one of {', '.join(BYTES_OF)}")
    if not _are_sizes(shape):
        raise ValueError(f"has shape {shown(shape)}, must be a short list of whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"has data_offsets {shown(offsets)}, must be two whole numbers")
    start, end = offsets
    size = math.prod(shape) * BYTES_OF[dtype]
    if end - start != size:
        raise ValueError(f"has {end - start} bytes, {dtype} {shape} needs {size}")
    return FileTensor(name, dtype, tuple(shape), size, path, data_start + start)


def _is_metadata(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_sizes(values: Any) -> bool:
    # The limits keep a product of hostile sizes from taking for ever.
    return isinstance(values, list) and len(values) <= 8 and all(_is_size(value) for value in values)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _layout_problems(tensors: Iterable[FileTensor], data_start: int, file_size: int) -> Iterable[str]:
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            trouble = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            yield f"{tensor.name!r} {trouble}"
        end = max(end, tensor.offset + tensor.size)
    if end > file_size:
        yield f"is cut short: has {file_size} bytes, its header needs {end}"
    elif end < file_size:
        yield f"has {file_size - end} bytes after the last tensor"


def encode_header(tensors: Iterable[TensorEntry], metadata: Mapping[str, str] | None = METADATA) -> bytes:
    """The first bytes of a file that holds these tensors in this order; `metadata` of None is left out."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for tensor in tensors:
        end = start + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % LENGTH_BYTES)
    return len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded

"""The manifest of a converted folder: what each tensor and each file in it is, with checksums of all their bytes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from mistral_large_conversion.checkpoint.adapter import Adapter
from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.safetensors_header import WEIGHTS_SUFFIX, header_bytes
from mistral_large_conversion.checkpoint.source_files import MANIFEST_NAME as MANIFEST_NAME
from mistral_large_conversion.checkpoint.source_files import file_problem, read_json_object
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.plan import ConversionPlan

# 128 bits at the speed of the memory: 25 times as fast as SHA-256. They prove against accidents, not against forgers.
CHECKSUM_NAME = "xxh3_128"
new_checksum = xxhash.xxh3_128
BLOCK_BYTES = 2**18


@dataclass(frozen=True)
class ManifestTensor:
    """One tensor of a converted folder; `checksum` is that of its bytes in the file, in hexadecimal digits.

    It is None for a tensor of a file that was linked and not read.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str | None


@dataclass(frozen=True)
class ManifestFile:
    """One file of a converted folder: its size in bytes, and the checksum of its content.

    Of a file of weights, the checksum is that of its header, as its tensors have their own.
    """

    size: int
    checksum: str

    @classmethod
    def of(cls, content: bytes) -> "ManifestFile":
        """The entry of a small file with this content."""
        return cls(len(content), new_checksum(content).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> "ManifestFile":
        """The entry of a file that exists.

        Raises:
            OSError: it cannot be read.
        """
        checksum = new_checksum()
        if path.suffix == WEIGHTS_SUFFIX:
            checksum.update(header_bytes(path))
        else:
            with path.open("rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    checksum.update(block)
        return cls(path.stat().st_size, checksum.hexdigest())


@dataclass(frozen=True)
class ManifestAdapter:
    """The LoRA that was merged into the weights of a converted folder; `files` are the checksums of its files."""

    name: str
    files: dict[str, str]

    @classmethod
    def of(cls, adapter: Adapter) -> "ManifestAdapter":
        """The entry of an adapter; all of it is read."""
        return cls(adapter.name, adapter.checksums)


@dataclass(frozen=True)
class Manifest:
    """All tensors of a converted folder by name, and all its files but the manifest itself.

    files: None in a manifest that was written before files had entries.
    adapter: None where none was merged.
    calibration: None where no weight was calibrated.
    links: where files of weights are that are symbolic links, see `adopt_checkpoint`.
    """

    tensors: dict[str, ManifestTensor]
    files: dict[str, ManifestFile] | None
    adapter: ManifestAdapter | None = None
    calibration: Calibration | None = None
    links: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, plan: ConversionPlan, checksums: Mapping[str, str | None], small_files: Mapping[str, bytes]
    ) -> "Manifest":
        """The manifest of what a plan writes.

        checksums: those of the tensors, by name.
        small_files: all other files, the index of the weights included.
        """
        tensors = {
            output.name: ManifestTensor(file.name, output.dtype, output.shape, checksums[output.name])
            for file in plan.files
            for output in file.outputs
        }
        files = {name: ManifestFile.of(content) for name, content in small_files.items()}
        for file in plan.files:
            files[file.name] = ManifestFile(file.size, new_checksum(file.header).hexdigest())
        adapter = None if plan.adapter is None else ManifestAdapter.of(plan.adapter)
        return cls(tensors, dict(sorted(files.items())), adapter, plan.calibration)

    def to_json(self) -> dict[str, Any]:
        """The content of the file: no times and no paths, so that equal folders have equal manifests."""
        content: dict[str, Any] = {"checksum": CHECKSUM_NAME}
        if self.adapter is not None:
            content["adapter"] = asdict(self.adapter)
        if self.calibration is not None:
            content["calibration"] = self.calibration.to_json()
        if self.files is not None:
            content["files"] = {name: asdict(file) for name, file in self.files.items()}
        if self.links:
            content["links"] = self.links
        return {**content, "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()}}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None if it has none.

    Raises:
        CheckpointError: a manifest that cannot be read, or not one of ours.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    problem = file_problem(folder, MANIFEST_NAME)
    if problem is None:
        try:
            content = read_json_object(folder / MANIFEST_NAME)
            if content["checksum"] != CHECKSUM_NAME:
                problem = f"checksums of kind {content['checksum']!r}, must be {CHECKSUM_NAME}"
            else:
                files, adapter, calibration = (content.get(key) for key in ("files", "adapter", "calibration"))
                return Manifest(
                    {name: _tensor(**entry) for name, entry in content["tensors"].items()},
                    None if files is None else {name: ManifestFile(**entry) for name, entry in files.items()},
                    None if adapter is None else _adapter(**adapter),
                    None if calibration is None else Calibration(**calibration),
                    {str(name): str(target) for name, target in content.get("links", {}).items()},
                )
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{folder / MANIFEST_NAME}: not a manifest of a conversion: {problem}; convert again")


def _adapter(*, name: str, files: dict[str, str]) -> ManifestAdapter:
    return ManifestAdapter(name, dict(files))


def _tensor(*, file: str, dtype: str, shape: list[int], checksum: str | None) -> ManifestTensor:
    return ManifestTensor(file=file, dtype=dtype, shape=tuple(shape), checksum=checksum)

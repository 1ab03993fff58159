"""The manifest of a converted folder: what each tensor in it is, with a checksum of its bytes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from modeling_mistral_large.conversion.plan import ConversionPlan
from modeling_mistral_large.conversion.source_files import file_finding, read_json_object
from modeling_mistral_large.errors import CheckpointError

MANIFEST_NAME = "conversion.manifest.json"
# 128 bits at the speed of the memory: 25 times as fast as SHA-256. They prove against accidents, not against forgers.
CHECKSUM_NAME = "xxh3_128"
new_checksum = xxhash.xxh3_128


@dataclass(frozen=True)
class ManifestTensor:
    """One tensor of a converted folder; `checksum` is that of its bytes in the file, in hexadecimal digits."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """All tensors of a converted folder by name."""

    tensors: dict[str, ManifestTensor]

    @classmethod
    def of(cls, plan: ConversionPlan, checksums: Mapping[str, str]) -> "Manifest":
        """The manifest of what a plan writes."""
        return cls(
            {
                output.name: ManifestTensor(file.name, output.dtype, output.shape, checksums[output.name])
                for file in plan.files
                for output in file.outputs
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The content of the file: no times and no paths, so that equal folders have equal manifests."""
        tensors = {name: asdict(tensor) for name, tensor in self.tensors.items()}
        return {"checksum": CHECKSUM_NAME, "tensors": tensors}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None if it has none.

    Raises:
        CheckpointError: a manifest that cannot be read, or not one of ours.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    finding = file_finding(folder, MANIFEST_NAME)
    if finding is None:
        try:
            content = read_json_object(folder / MANIFEST_NAME)
            if content["checksum"] == CHECKSUM_NAME:
                return Manifest({name: _tensor(**entry) for name, entry in content["tensors"].items()})
            finding = f"checksums of kind {content['checksum']!r}, must be {CHECKSUM_NAME}"
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            finding = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{folder / MANIFEST_NAME}: not a manifest of a conversion: {finding}; convert again")


def _tensor(*, file: str, dtype: str, shape: list[int], checksum: str) -> ManifestTensor:
    return ManifestTensor(file=file, dtype=dtype, shape=tuple(shape), checksum=checksum)

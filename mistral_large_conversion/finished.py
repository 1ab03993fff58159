"""A folder that a conversion has finished: whether it is of this one, and still as it was written."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mistral_large_conversion.checkpoint.atomic_write import json_bytes
from mistral_large_conversion.checkpoint.source_files import file_problem
from mistral_large_conversion.errors import DestinationError
from mistral_large_conversion.manifest import MANIFEST_NAME, Manifest, read_manifest
from mistral_large_conversion.plan import ConversionPlan, PlannedFile
from mistral_large_conversion.planned_tensor import PlannedTensor
from mistral_large_conversion.progress import Progress
from mistral_large_conversion.stream import checksums_of, file_checksum, run_threads


def index_file(plan: ConversionPlan) -> dict[str, bytes]:
    """Name and content of the index of the weights, if there is one."""
    return {} if plan.index is None else {plan.index_name: json_bytes(plan.index)}


def refuse_another(folder: Path, plan: ConversionPlan, small_files: Mapping[str, bytes]) -> None:
    """Refuse a finished folder whose manifest, headers or small files are not those of a plan.

    Raises:
        DestinationError: it is of another conversion.
        CheckpointError: a manifest that cannot be read.
    """
    manifest = read_manifest(folder)
    assert manifest is not None
    if (problem := next(_problems(folder, plan, small_files, manifest), None)) is not None:
        raise DestinationError(f"{folder}: holds another finished conversion: {problem}; choose a new or empty folder")


def _problems(
    folder: Path, plan: ConversionPlan, small_files: Mapping[str, bytes], manifest: Manifest
) -> Iterator[str]:
    checksums = {name: tensor.checksum for name, tensor in manifest.tensors.items()}
    if checksums.keys() != {output.name for file in plan.files for output in file.outputs}:
        yield "its tensors have other names"
        return
    if manifest.calibration != plan.calibration:
        others = "rounded to the nearest" if manifest.calibration is None else manifest.calibration.description
        yield f"its weights are calibrated otherwise: {others}"
        return
    small_files = {**small_files, **index_file(plan)}
    wanted = Manifest.of(plan, checksums, small_files)
    if manifest.tensors != wanted.tensors:
        yield "its tensors have other shapes, dtypes or files"
    for name, content in small_files.items():
        if problem := file_problem(folder, name):
            yield problem
        elif (folder / name).read_bytes() != content:
            yield f"its {name} is another"
    for file in plan.files:
        if problem := file_problem(folder, file.name):
            yield problem
        elif not _has_header_and_size(folder / file.name, file):
            yield f"its {file.name} is another"
    if (folder / MANIFEST_NAME).read_bytes() != json_bytes(wanted.to_json()):
        yield f"its {MANIFEST_NAME} is another"


def _has_header_and_size(path: Path, file: PlannedFile) -> bool:
    header = file.header
    with path.open("rb") as stream:
        return stream.read(len(header)) == header and path.stat().st_size == file.size


def verify_finished(folder: Path, plan: ConversionPlan, *, jobs: int, progress: Progress) -> None:
    """Compare each tensor of a finished folder, its checksum in the manifest, and what the source gives now.

    Of calibrated ones, what the source gives is not computed again.

    Raises:
        DestinationError: a tensor that is another, and whether the folder or the source has changed.
    """
    manifest = read_manifest(folder)
    assert manifest is not None

    def verify(item: tuple[PlannedFile, PlannedTensor], advance: Progress) -> None:
        file, tensor = item
        if plan.is_calibrated(tensor):
            # To make them again is to calibrate again: what they were made of and by is in the manifest.
            checksums = {output.name: str(manifest.tensors[output.name].checksum) for output in tensor.outputs}
            advance(tensor.size)
        else:
            checksums = checksums_of(tensor, advance)
        for name, checksum in checksums.items():
            recorded = manifest.tensors[name]
            if checksum != recorded.checksum:
                raise DestinationError(
                    f"{folder}: holds another finished conversion: the source gives another tensor {name!r}; choose a "
                    "new or empty folder"
                )
            if file_checksum(folder / file.name, *file.places[name]) != recorded.checksum:
                raise DestinationError(
                    f"{folder / file.name}: tensor {name!r} has changed; remove the folder and convert again"
                )

    work = [(file, tensor) for file in plan.files for tensor in file.tensors]
    run_threads(verify, work, jobs=jobs, progress=progress)

"""Proof that a folder holds a checkpoint: whole by itself, and tensor by tensor the one it was made of."""

import filecmp
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy

from modeling_mistral_large.conversion.hub import refuse_adapter
from modeling_mistral_large.conversion.inspect import (
    Checkpoint,
    chat_template_findings,
    config_findings,
    finding_lines,
    layouts_of,
    licence_findings,
    load_headers,
    unfinished_findings,
)
from modeling_mistral_large.conversion.manifest import MANIFEST_NAME, Manifest, ManifestTensor, read_manifest
from modeling_mistral_large.conversion.names import expected_tensors
from modeling_mistral_large.conversion.plan import CONFIG_NAMES, TOKENIZER_NAME, PlannedTensor, planned_tensors
from modeling_mistral_large.conversion.safetensors_header import (
    BYTES_OF,
    METADATA,
    TORCH_NAMES,
    FileTensor,
    read_metadata,
)
from modeling_mistral_large.conversion.source_files import file_finding
from modeling_mistral_large.conversion.stream import DEFAULT_JOBS, Progress, file_checksum, transformed
from modeling_mistral_large.conversion.tokenizer import tokenizer_findings
from modeling_mistral_large.conversion.transforms import Rows
from modeling_mistral_large.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `is_ok` is None where there was nothing to compare it with."""

    name: str
    is_ok: bool | None
    detail: str


def verify_checkpoint(
    folder: Path | str, source: Path | str | None = None, *, progress: Progress | None = None
) -> list[Check]:
    """Check the checkpoint in `folder`, and compare it with the one in `source`, of the same layout or the other.

    Every byte of the weights is read, little of it held in memory; `progress` is told the bytes of tensors. Without
    `source`, they are compared with the checksums of the manifest, if the folder has one. `source` may have another
    dtype: then its values are rounded to that of `folder`.

    Raises:
        CheckpointError: no checkpoint in `folder`, or none that is sound in `source`.
    """
    folder = Path(folder)
    refuse_adapter(folder)
    layouts = layouts_of(folder) if folder.is_dir() else []
    if not layouts:
        raise CheckpointError(f"{folder}: no checkpoint; give a folder with {' or '.join(CONFIG_NAMES.values())}")
    origin = None if source is None else load_headers(Path(source), may_mix_dtypes=True)
    checks = [_check("finished", unfinished_findings(folder), "no conversion was interrupted here")]
    try:
        checkpoint = load_headers(folder, layouts[0])
    except CheckpointError as error:
        checks.append(_check("headers", finding_lines(error), ""))
        checks += [Check(name, None, "needs sound headers") for name in ("config", "tensors", "tokenizer")]
    else:
        count = len(checkpoint.tensors)
        # With a source, its tensors are the question, and the files may have been written anew.
        findings = _metadata_findings(checkpoint) if origin is None else []
        checks.append(_check("headers", findings, f"{count} tensors, {checkpoint.dtype}, as the geometry says"))
        checks.append(_check("config", config_findings(checkpoint, origin), "says what the weights are"))
        checks.append(_tensor_check(checkpoint, origin, progress))
        checks.append(_check("tokenizer", _tokenizer_findings(checkpoint, origin), "SentencePiece's ids"))
    if layouts[0] == "hf":
        checks.append(_check("chat template", chat_template_findings(folder), "the bundled one"))
    checks.append(_check("licence", licence_findings(folder, origin, layouts[0]), "goes along"))
    return checks


def _check(name: str, findings: Sequence[str], detail: str) -> Check:
    return Check(name, not findings, "; ".join(findings) or detail)


def _metadata_findings(checkpoint: Checkpoint) -> list[str]:
    """Of files that a conversion wrote, what their headers say beside the tensors, which no checksum covers."""
    if not (checkpoint.folder / MANIFEST_NAME).exists():
        return []
    paths = sorted({tensor.path for tensor in checkpoint.tensors.values()})
    return [f"{path.name}: the metadata in its header has changed" for path in paths if read_metadata(path) != METADATA]


def _tokenizer_findings(checkpoint: Checkpoint, origin: Checkpoint | None) -> list[str]:
    folder = checkpoint.folder
    if finding := file_finding(folder, TOKENIZER_NAME):
        return [finding]
    findings = []
    has_other = origin is not None and file_finding(origin.folder, TOKENIZER_NAME) is None
    if (
        origin is not None
        and has_other
        and not filecmp.cmp(folder / TOKENIZER_NAME, origin.folder / TOKENIZER_NAME, shallow=False)
    ):
        findings.append(f"{TOKENIZER_NAME} is not the source's")
    if checkpoint.layout == "hf":
        findings += tokenizer_findings(folder, vocab_size=checkpoint.config.vocab_size)
    return findings


def _tensor_check(checkpoint: Checkpoint, origin: Checkpoint | None, progress: Progress | None) -> Check:
    """Compare every byte of the weights with the source's, or with the checksums of the manifest."""
    count = len(checkpoint.tensors)
    compare: Callable[[PlannedTensor], str | None]
    if origin is None:
        try:
            manifest = read_manifest(checkpoint.folder)
        except CheckpointError as error:
            return Check("tensors", False, str(error))
        if manifest is None:
            return Check("tensors", None, "not compared: the folder has no manifest; give the source")
        compare, agreement = partial(_manifest_difference, manifest=manifest), "manifest's checksums"
        tensors = [_as_it_is(tensor, tensor) for tensor in checkpoint.tensors.values()]
    else:
        shapes = [(expected_tensors(each.config), each.config.head_dim) for each in (checkpoint, origin)]
        if shapes[0] != shapes[1]:
            return Check("tensors", False, "not compared: the source has other shapes")
        compare, agreement = partial(_difference, stored=checkpoint.tensors), "source's bits"
        if origin.quantization is not None:
            if (origin.quantization, origin.dtype) != (checkpoint.quantization, checkpoint.dtype):
                return Check("tensors", False, "not compared: the source is quantized; give the one it was made of")
            tensors = [_as_it_is(origin.tensors[name], own) for name, own in checkpoint.tensors.items()]
        else:
            tensors = planned_tensors(
                origin.tensors, checkpoint.config, origin.layout, checkpoint.layout, checkpoint.dtype
            )
            if checkpoint.quantization is not None:
                agreement += f", quantized to {checkpoint.quantization[0]}"
            elif {tensor.dtype for tensor in origin.tensors.values()} != {checkpoint.dtype}:
                agreement += f", rounded to {checkpoint.dtype}"

    def compare_and_count(tensor: PlannedTensor) -> str | None:
        difference = compare(tensor)
        if progress is not None:
            with lock:
                progress(tensor.size)
        return difference

    lock = Lock()
    try:
        with ThreadPoolExecutor(DEFAULT_JOBS) as pool:
            differences = [difference for difference in pool.map(compare_and_count, tensors) if difference is not None]
    except OSError as error:
        raise CheckpointError(f"{checkpoint.folder}: cannot be compared: {error}") from error
    if differences:
        return Check("tensors", False, f"{len(differences)} of {count} differ, first {differences[0]}")
    return Check("tensors", True, f"all {count} have the {agreement}")


def _as_it_is(source: FileTensor, own: FileTensor) -> PlannedTensor:
    return PlannedTensor(source, (), (own,))


def _manifest_difference(tensor: PlannedTensor, *, manifest: Manifest) -> str | None:
    """What the manifest says otherwise of a tensor, or None."""
    own = tensor.source
    assert isinstance(own, FileTensor)
    entry = manifest.tensors.get(own.name)
    checksum = file_checksum(own.path, own.offset, own.size)
    found = ManifestTensor(own.path.name, own.dtype, own.shape, checksum or "")
    return None if found == entry else f"{own.name}: {found}, the manifest has {entry}"


def _difference(tensor: PlannedTensor, *, stored: Mapping[str, FileTensor]) -> str | None:
    """Where what is stored first differs from what the source gives, or None."""
    own = [stored[output.name] for output in tensor.outputs]
    start = 0
    with ExitStack() as stack:
        streams = [stack.enter_context(part.open()) for part in own]
        for blocks in transformed(tensor):
            for part, stream, wanted in zip(own, streams, blocks, strict=True):
                found = numpy.frombuffer(stream.read(wanted.nbytes), numpy.uint8)
                if found.size != wanted.size:
                    raise CheckpointError(f"tensor {part.name!r} ends early: its file has changed since it was checked")
                found = found.reshape(wanted.shape)
                if not numpy.array_equal(found, wanted):
                    row, byte = numpy.argwhere(found != wanted)[0].tolist()
                    column = byte // BYTES_OF[part.dtype]
                    place = [start + row, column][: len(part.shape)]
                    values = (_numbers(rows[row], part.dtype)[column].item() for rows in (found, wanted))
                    return "{} at {}: {!r}, the source has {!r}".format(part.name, place, *values)
            start += len(blocks[0])
    return None


def _numbers(row: Rows, dtype: str) -> "torch.Tensor":
    import torch

    numbers: torch.Tensor = torch.from_numpy(row.copy()).view(getattr(torch, TORCH_NAMES[dtype]))
    return numbers

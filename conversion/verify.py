"""Proof that a folder holds a checkpoint: whole by itself, and tensor by tensor the one it was made of."""

import filecmp
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy

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
from modeling_mistral_large.conversion.manifest import Manifest, ManifestTensor, read_manifest
from modeling_mistral_large.conversion.names import ExpectedTensor, expected_tensors
from modeling_mistral_large.conversion.plan import CONFIG_NAMES, TOKENIZER_NAME, PlannedTensor
from modeling_mistral_large.conversion.safetensors_header import BYTES_OF, TORCH_NAMES
from modeling_mistral_large.conversion.source_files import file_finding
from modeling_mistral_large.conversion.stream import DEFAULT_JOBS, Progress, file_checksum, transformed
from modeling_mistral_large.conversion.tokenizer import tokenizer_findings
from modeling_mistral_large.conversion.transforms import Cast, RegroupRopePairs, Rows, Step
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
        checks.append(_check("headers", [], f"{count} tensors, {checkpoint.dtype}, as the geometry says"))
        checks.append(_check("config", config_findings(checkpoint, origin), "says what the weights are"))
        checks.append(_tensor_check(checkpoint, origin, progress))
        checks.append(_check("tokenizer", _tokenizer_findings(checkpoint, origin), "SentencePiece's ids"))
    if layouts[0] == "hf":
        checks.append(_check("chat template", chat_template_findings(folder), "the bundled one"))
    checks.append(_check("licence", licence_findings(folder, origin, layouts[0]), "goes along"))
    return checks


def _check(name: str, findings: Sequence[str], detail: str) -> Check:
    return Check(name, not findings, "; ".join(findings) or detail)


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
    tensors = expected_tensors(checkpoint.config)
    compare: Callable[[ExpectedTensor], str | None]
    if origin is None:
        try:
            manifest = read_manifest(checkpoint.folder)
        except CheckpointError as error:
            return Check("tensors", False, str(error))
        if manifest is None:
            return Check("tensors", None, "not compared: the folder has no manifest; give the source")
        compare, agreement = (
            partial(_manifest_difference, checkpoint=checkpoint, manifest=manifest),
            "manifest's checksums",
        )
    else:
        if (tensors, checkpoint.config.head_dim) != (expected_tensors(origin.config), origin.config.head_dim):
            return Check("tensors", False, "not compared: the source has other shapes")
        compare, agreement = partial(_difference, checkpoint=checkpoint, origin=origin), "source's bits"
        if {tensor.dtype for tensor in origin.tensors.values()} != {checkpoint.dtype}:
            agreement += f", rounded to {checkpoint.dtype}"

    def compare_and_count(tensor: ExpectedTensor) -> str | None:
        difference = compare(tensor)
        if progress is not None:
            with lock:
                progress(checkpoint.tensors[getattr(tensor, checkpoint.layout)].size)
        return difference

    lock = Lock()
    try:
        with ThreadPoolExecutor(DEFAULT_JOBS) as pool:
            differences = [difference for difference in pool.map(compare_and_count, tensors) if difference is not None]
    except OSError as error:
        raise CheckpointError(f"{checkpoint.folder}: cannot be compared: {error}") from error
    if differences:
        return Check("tensors", False, f"{len(differences)} of {len(tensors)} differ, first {differences[0]}")
    return Check("tensors", True, f"all {len(tensors)} have the {agreement}")


def _manifest_difference(tensor: ExpectedTensor, *, checkpoint: Checkpoint, manifest: Manifest) -> str | None:
    """What the manifest says otherwise of a tensor, or None."""
    own = checkpoint.tensors[getattr(tensor, checkpoint.layout)]
    entry = manifest.tensors.get(own.name)
    checksum = file_checksum(own.path, own.offset, own.size)
    found = ManifestTensor(own.path.name, own.dtype, own.shape, checksum or "")
    return None if found == entry else f"{own.name}: {found}, the manifest has {entry}"


def _difference(tensor: ExpectedTensor, *, checkpoint: Checkpoint, origin: Checkpoint) -> str | None:
    """Where a tensor first differs from the source's, or None."""
    own, others = checkpoint.tensors[getattr(tensor, checkpoint.layout)], origin.tensors[getattr(tensor, origin.layout)]
    steps: list[Step] = []
    if tensor.has_rope_pairs and checkpoint.layout != origin.layout:
        steps.append(RegroupRopePairs(checkpoint.layout, checkpoint.config.head_dim))
    if own.dtype != others.dtype:
        steps.append(Cast(others.dtype, own.dtype))
    start = 0
    with own.open() as stream:
        for (wanted,) in transformed(PlannedTensor(others, tuple(steps), (own,))):
            found = numpy.frombuffer(stream.read(wanted.nbytes), numpy.uint8)
            if found.size != wanted.size:
                raise CheckpointError(f"tensor {own.name!r} ends early: its file has changed since it was checked")
            found = found.reshape(wanted.shape)
            if not numpy.array_equal(found, wanted):
                row, byte = numpy.argwhere(found != wanted)[0].tolist()
                column = byte // BYTES_OF[own.dtype]
                place = [start + row, column][: len(own.shape)]
                values = (_numbers(rows[row], own.dtype)[column].item() for rows in (found, wanted))
                return "{} at {}: {!r}, the source has {!r}".format(own.name, place, *values)
            start += len(wanted)
    return None


def _numbers(row: Rows, dtype: str) -> "torch.Tensor":
    import torch

    numbers: torch.Tensor = torch.from_numpy(row.copy()).view(getattr(torch, TORCH_NAMES[dtype]))
    return numbers

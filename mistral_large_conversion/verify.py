"""Proof that a folder holds a checkpoint: whole by itself, and tensor by tensor the one it was made of."""

import filecmp
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from mistral_large_conversion.checkpoint.adapter import Adapter
from mistral_large_conversion.checkpoint.layout import (
    CONFIG_NAME,
    CONFIG_NAMES,
    TOKENIZER_NAME,
    Layout,
    is_consolidated,
    layouts_of,
)
from mistral_large_conversion.checkpoint.names import expected_tensors
from mistral_large_conversion.checkpoint.read import Checkpoint, load_headers, problem_lines, vocabulary_problem
from mistral_large_conversion.checkpoint.source_files import (
    adapter_problem,
    file_problem,
    parse_json_object,
    read_json_object,
    shown,
)
from mistral_large_conversion.errors import CheckpointError, SettingError, TokenizerFileError
from mistral_large_conversion.folder_checks import (
    added_files,
    chat_template_problems,
    config_problems,
    has_model_file,
    licence_problems,
    manifest_problems,
    recorded_prompt_format,
    unfinished_problems,
)
from mistral_large_conversion.folder_tokenizer import read_folder_tokenizer
from mistral_large_conversion.hf_files import consolidated_files, hf_files
from mistral_large_conversion.manifest import MANIFEST_NAME, Manifest, read_manifest
from mistral_large_conversion.plan import open_adapter, planned_tensors
from mistral_large_conversion.planned_tensor import PlannedTensor
from mistral_large_conversion.progress import Progress, progress_calls
from mistral_large_conversion.stream import DEFAULT_JOBS
from mistral_large_conversion.tensor_comparison import (
    manifest_difference,
    source_difference,
    unchanged_tensor,
)
from mistral_large_conversion.tokenizer import tokenizer_problems
from mistral_large_conversion.vocabulary import find_vocabulary, known_vocabulary

# What config.json says and no shape of a tensor shows.
NOT_IN_SHAPES = ("numbers of heads", "head_dim", "norm_eps", "rope_theta", "max_position_embeddings")

# By what is noted of the prompt format.
TEMPLATE_DETAILS = {
    "own": "its own: prompts are what it renders",
    None: "of another program: `mistral-large inspect` says what prompts are",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `is_ok` is None where it is not proven: there was nothing to compare it with."""

    name: str
    is_ok: bool | None
    detail: str


def verify_checkpoint(
    folder: Path | str,
    source: Path | str | None = None,
    *,
    adapter: Path | str | None = None,
    progress: Progress | bool = True,
) -> list[Check]:
    """Check the checkpoint in `folder`, and compare it with the one in `source`, of the same layout or the other.

    Every byte of the weights is read, little of it held in memory. Without `source`, they are compared with the
    checksums of the manifest, if the folder has one. `source` may have another dtype: then its values are rounded to
    that of `folder`.

    adapter: the LoRA that was merged into the source, if one was.
    progress: shows a bar at a terminal and in a notebook; False shows none. A function is called with the bytes of each
        tensor that was compared.

    Raises:
        CheckpointError: no checkpoint in `folder`, none that is sound in `source`, or no adapter that fits it.
        SettingError: an adapter without `source`.
    """
    if adapter is not None and source is None:
        raise SettingError(
            f"adapter {shown(str(adapter))}: has no effect without the source it was merged into; give it"
        )
    folder = Path(folder)
    if problem := adapter_problem(folder):
        raise CheckpointError(f"{folder}: {problem}")
    layouts = layouts_of(folder) if folder.is_dir() else []
    if not layouts:
        raise CheckpointError(f"{folder}: no checkpoint; give a folder with {' or '.join(CONFIG_NAMES.values())}")
    origin = None if source is None else load_headers(Path(source), may_mix_dtypes=True)
    lora = None if origin is None or adapter is None else _read_adapter(adapter, origin)
    checks = [_check("finished", unfinished_problems(folder), "no conversion was interrupted here")]
    manifest, manifest_problem = _read_manifest(folder)
    checkpoint = None
    try:
        checkpoint = load_headers(folder, layouts[0])
    except CheckpointError as error:
        checks.append(_check("headers", problem_lines(error), ""))
        checks += [Check(name, None, "needs sound headers") for name in ("config", "tensors", "tokenizer")]
    else:
        count = len(checkpoint.tensors)
        checks.append(_check("headers", [], f"{count} tensors, {checkpoint.dtype}, match the config"))
        checks.append(_config_check(checkpoint, origin, manifest))
        if origin is None and manifest_problem is not None:
            checks.append(Check("tensors", False, manifest_problem))
        else:
            checks.append(_tensor_check(checkpoint, origin, lora, manifest, progress))
        checks.append(_tokenizer_check(checkpoint, origin))
    if layouts[0] == "hf":
        detail = TEMPLATE_DETAILS.get(recorded_prompt_format(folder), "the bundled one")
        checks.append(_check("chat template", chat_template_problems(folder), detail))
    checks.append(_licence_check(folder, origin, layouts[0], manifest))
    if manifest_problem is not None:
        return [*checks, Check("files", False, manifest_problem)]
    return [*checks, _files_check(folder, checkpoint, origin, lora, manifest)]


def _read_manifest(folder: Path) -> tuple[Manifest | None, str | None]:
    """The manifest of a folder, or None, with the reason where it is there and cannot be read."""
    try:
        return read_manifest(folder), None
    except CheckpointError as error:
        return None, str(error)


def _read_adapter(adapter: Path | str, origin: Checkpoint) -> Adapter:
    if origin.quantization is not None:
        raise CheckpointError(f"{origin.folder}: quantized, so no adapter was merged into it; give its own source")
    return open_adapter(adapter, origin.geometry)


def _merged_problem(manifest: Manifest | None, lora: Adapter | None) -> str | None:
    """Where a manifest says that another adapter was merged, or that none was; None if nowhere."""
    merged = None if manifest is None else manifest.adapter
    if merged is not None and lora is None:
        return f"the adapter {shown(merged.name)} was merged into this folder; give it with --adapter"
    if merged is not None and lora is not None and merged.files != lora.checksums:
        return f"another adapter was merged into this folder, {shown(merged.name)}; give that one with --adapter"
    if manifest is not None and merged is None and lora is not None:
        return "no adapter was merged into this folder; leave --adapter out"
    return None


def _check(name: str, problems: Sequence[str], detail: str) -> Check:
    return Check(name, not problems, "; ".join(problems) or detail)


def _config_check(checkpoint: Checkpoint, origin: Checkpoint | None, manifest: Manifest | None) -> Check:
    if problems := config_problems(checkpoint, origin):
        return _check("config", problems, "")
    if origin is None and (manifest is None or manifest.files is None):
        return Check("config", None, f"matches the weights; not proven: {', '.join(NOT_IN_SHAPES)}; give the source")
    return Check("config", True, "matches the weights" if origin is None else "matches the weights and the source")


def _tokenizer_check(checkpoint: Checkpoint, origin: Checkpoint | None) -> Check:
    if checkpoint.layout == "hf" and recorded_prompt_format(checkpoint.folder) is None:
        return _foreign_tokenizer_check(checkpoint.folder)
    problems, detail = _tokenizer_problems(checkpoint, origin), "the vendor's, made again from it"
    if problems or origin is None or (not_compared := vocabulary_problem(origin.folder)) is None:
        return _check("tokenizer", problems, detail)
    return Check("tokenizer", None, f"{detail}; not compared with the source: {not_compared}")


def _foreign_tokenizer_check(folder: Path) -> Check:
    """What is known of a tokenizer that another program has written."""
    try:
        tokenizer = read_folder_tokenizer(folder, layout="hf")
    except TokenizerFileError as error:
        return Check("tokenizer", False, str(error))
    if tokenizer.vocabulary is None:
        return Check("tokenizer", None, "; ".join(tokenizer.remarks))
    added = f" and {len(tokenizer.added)} added tokens" if tokenizer.added else ""
    detail = f"the {tokenizer.vocabulary} vocabulary{added}, written by another program: exact ids through this package"
    return Check("tokenizer", None, "; ".join([detail, *tokenizer.remarks]))


def _tokenizer_problems(checkpoint: Checkpoint, origin: Checkpoint | None) -> list[str]:
    folder = checkpoint.folder
    try:
        # The consolidated layout is read under the file's other name, too.
        known = find_vocabulary(folder)
        others = None if origin is None else find_vocabulary(origin.folder)
    except TokenizerFileError as error:
        return [str(error)]
    if known is None and checkpoint.layout == "hf" and not has_model_file(folder):
        return tokenizer_problems(folder, vocab_size=checkpoint.geometry.vocab_size, may_lack_model=True)
    name = TOKENIZER_NAME if known is None else known.name
    if problem := file_problem(folder, name):
        return [problem]
    problems = []
    if (
        origin is not None
        and others is not None
        and file_problem(others.parent, others.name) is None
        # One that was not read, as tokenizer.json next to it says otherwise, is no source.
        and (is_consolidated(origin.folder) or known_vocabulary(others) == known_vocabulary(folder / name))
        and not filecmp.cmp(folder / name, others, shallow=False)
    ):
        problems.append(f"{name} is not the source's")
    if checkpoint.layout == "hf":
        problems += tokenizer_problems(folder, vocab_size=checkpoint.geometry.vocab_size)
    elif known_vocabulary(folder / name) is None:
        problems.append(f"{name} is not the vendor's: other pieces, scores, types or settings")
    return problems


def _licence_check(folder: Path, origin: Checkpoint | None, layout: Layout, manifest: Manifest | None) -> Check:
    problems = licence_problems(folder, origin, layout)
    if problems or origin is not None or (manifest is not None and manifest.files is not None):
        return _check("licence", problems, "is copied with the weights")
    return Check("licence", None, "not proven: no manifest to compare it with; give the source")


def _files_check(
    folder: Path,
    checkpoint: Checkpoint | None,
    origin: Checkpoint | None,
    lora: Adapter | None,
    manifest: Manifest | None,
) -> Check:
    """Compare every file with the manifest; without one, say which are as a conversion would write them."""
    try:
        if manifest is not None and manifest.files is not None:
            if problems := manifest_problems(folder, manifest):
                return _check("files", problems, "")
            detail = f"all {len(manifest.files)} have the manifest's sizes and checksums"
            if added := added_files(folder, manifest):
                return Check("files", None, f"{detail}; not proven, added since: {', '.join(map(repr, added))}")
            return Check("files", True, detail)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be compared: {error}") from error
    what = "no manifest" if manifest is None else "a manifest without checksums of files"
    detail = f"not proven: {what}; convert again for one"
    if checkpoint is not None and (checkpoint.layout != "hf" or recorded_prompt_format(folder) is not None):
        detail += f"; {_made_again(checkpoint, origin, lora)}"
    return Check("files", None, detail)


def _made_again(checkpoint: Checkpoint, origin: Checkpoint | None, lora: Adapter | None) -> str:
    """Which small files are what a conversion of the source, or of what the folder says of itself, writes."""
    folder, geometry = checkpoint.folder, checkpoint.geometry
    source = (origin or checkpoint).folder
    dtypes = {tensor.dtype for tensor in (origin or checkpoint).tensors.values()}
    cast = None if origin is None or dtypes == {checkpoint.dtype} else (", ".join(sorted(dtypes)), checkpoint.dtype)
    if problem := vocabulary_problem(source):
        return f"nothing made again: {problem}"
    try:
        if checkpoint.layout == "hf":
            model_type = read_json_object(folder / CONFIG_NAME)["model_type"]
            files = hf_files(
                geometry,
                quantization=checkpoint.quantization,
                dtype=checkpoint.dtype,
                model_type=model_type,
                source=source,
                keeps_settings=origin is not None and origin.layout == "hf",
                cast=cast,
                adapter=lora,
            )
        else:
            files = consolidated_files(geometry, source=source, cast=cast, adapter=lora)
    except (CheckpointError, TokenizerFileError) as error:
        return f"nothing made again: {error}"
    weights = {tensor.path.name for tensor in checkpoint.tensors.values()}
    others = {path.name for path in folder.iterdir()} - weights - {MANIFEST_NAME, *files}
    differing = [
        difference for name, content in files.items() if (difference := _file_difference(folder, name, content))
    ]
    differing += [f"{name!r} is extra" for name in sorted(others)]
    of_what = "itself" if origin is None else "the source"
    return f"made again from {of_what}: " + ("; ".join(differing) if differing else "the same small files")


def _file_difference(folder: Path, name: str, wanted: bytes) -> str | None:
    if problem := file_problem(folder, name):
        return problem
    path = folder / name
    if path.stat().st_size == len(wanted) and path.read_bytes() == wanted:
        return None
    if path.suffix != ".json":
        return f"{name} differs"
    try:
        settings, wanted_settings = read_json_object(path), parse_json_object(wanted)
    except ValueError as error:
        return f"{name}: {error}"
    keys = sorted({*settings, *wanted_settings})
    absent = object()
    differing = [repr(key) for key in keys if settings.get(key, absent) != wanted_settings.get(key, absent)]
    return f"{name} differs in {', '.join(differing) or 'its layout'}"


def _tensor_check(
    checkpoint: Checkpoint,
    origin: Checkpoint | None,
    lora: Adapter | None,
    manifest: Manifest | None,
    progress: Progress | bool,
) -> Check:
    """Compare every byte of the weights with the source's, or with the checksums of the manifest."""
    count = len(checkpoint.tensors)
    compare: Callable[[PlannedTensor], str | None]
    if origin is None:
        if manifest is None:
            return Check("tensors", None, "not compared: the folder has no manifest; give the source")
        compare, agreement = partial(manifest_difference, manifest=manifest), "manifest's checksums"
        tensors = [unchanged_tensor(tensor, tensor) for tensor in checkpoint.tensors.values()]
    else:
        shapes = [(expected_tensors(each.geometry), each.geometry.head_dim) for each in (checkpoint, origin)]
        if shapes[0] != shapes[1]:
            return Check("tensors", False, "not compared: the source has other shapes")
        compare, agreement = partial(source_difference, stored=checkpoint.tensors), "source's bits"
        if origin.quantization is not None:
            if (origin.quantization, origin.dtype) != (checkpoint.quantization, checkpoint.dtype):
                return Check("tensors", False, "not compared: the source is quantized; give the one it was made of")
            tensors = [unchanged_tensor(origin.tensors[name], own) for name, own in checkpoint.tensors.items()]
        else:
            tensors = planned_tensors(
                origin.tensors,
                checkpoint.geometry,
                origin.layout,
                checkpoint.layout,
                checkpoint.dtype,
                checkpoint.quantization,
                lora,
            )
            if lora is not None:
                agreement += " with the adapter merged"
            if manifest is not None and manifest.calibration is not None:
                agreement += "; of calibrated ones the manifest's checksums, and values near the source's"
                compare = partial(source_difference, stored=checkpoint.tensors, calibrated=manifest)
            elif checkpoint.quantization is not None:
                agreement += f", quantized to {checkpoint.quantization.scheme}"
            elif {tensor.dtype for tensor in origin.tensors.values()} != {checkpoint.dtype}:
                agreement += f", rounded to {checkpoint.dtype}"

    def compare_and_count(tensor: PlannedTensor) -> str | None:
        difference = compare(tensor)
        with lock:
            tell(tensor.size)
        return difference

    lock, total = Lock(), sum(tensor.size for tensor in tensors)
    try:
        with progress_calls(progress, "Verifying", total) as tell, ThreadPoolExecutor(DEFAULT_JOBS) as pool:
            differences = [difference for difference in pool.map(compare_and_count, tensors) if difference is not None]
    except OSError as error:
        raise CheckpointError(f"{checkpoint.folder}: cannot be compared: {error}") from error
    if differences:
        hint = "" if origin is None or (problem := _merged_problem(manifest, lora)) is None else f"; {problem}"
        return Check("tensors", False, f"{len(differences)} of {count} differ, first {differences[0]}{hint}")
    if origin is None and manifest is not None and any(each.checksum is None for each in manifest.tensors.values()):
        detail = "weights were linked, not read: of their bytes only the headers are compared; give the source"
        return Check("tensors", None, detail)
    return Check("tensors", True, f"all {count} have the {agreement}")

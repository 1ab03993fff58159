"""The ways between a consolidated checkpoint, the HF layout, and weights in memory, whole folders at a time."""

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_large_conversion.checkpoint.atomic_write import atomic_write, json_bytes
from mistral_large_conversion.checkpoint.hub import CONSOLIDATED_FILES, HF_FILES, LICENCE_PATTERNS, resolve_source
from mistral_large_conversion.checkpoint.layout import OTHER_LAYOUT, TOKENIZER_NAME, Layout
from mistral_large_conversion.checkpoint.params import PARAMS_NAME, params_from_geometry
from mistral_large_conversion.checkpoint.quantization import Scheme
from mistral_large_conversion.checkpoint.read import vocabulary_problem
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor, header_bytes
from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME, read_json_object, shown
from mistral_large_conversion.destination import State, check_destination, unfinished
from mistral_large_conversion.errors import CheckpointError, DestinationError, MistralLargeError, SettingError
from mistral_large_conversion.finished import index_file, refuse_another, verify_finished
from mistral_large_conversion.hf_files import (
    ARCHITECTURES,
    consolidated_files,
    hf_files,
    kept_settings,
    refuse_other_ids,
)
from mistral_large_conversion.manifest import MANIFEST_NAME, Manifest, new_checksum
from mistral_large_conversion.model_card import ModelType, licence_files
from mistral_large_conversion.options import check_option
from mistral_large_conversion.plan import (
    DEFAULT_SHARD_SIZE,
    ConversionPlan,
    OutputDtype,
    layout_to_read,
    plan_conversion,
    plan_export,
)
from mistral_large_conversion.stream import DEFAULT_JOBS, Progress, write_weights
from mistral_large_conversion.vocabulary import SPECIAL_IDS, VOCAB_SIZE

if TYPE_CHECKING:
    import torch

# A change of what is written makes another journal: an interrupted run of before is not continued.
JOURNAL_VERSION = 2
# More threads than that only take memory.
MOST_JOBS = 1024


@dataclass(frozen=True)
class Conversion:
    """A conversion that can begin: the weights to be moved, and every small file next to them.

    source: the folder of the weights, or None for weights in memory.
    """

    plan: ConversionPlan
    source: Path | None
    destination: Path
    small_files: dict[str, bytes]

    @property
    def needed_bytes(self) -> int:
        return self.plan.file_bytes + sum(map(len, self.small_files.values()))

    def check_destination(self) -> State:
        """What the destination holds of ours; a DestinationError if it must not be written, see `destination`."""
        state = check_destination(self.source, self.destination, self.needed_bytes)
        if state == "finished":
            refuse_another(self.destination, self.plan, self.small_files)
        return state

    def run(self, *, jobs: int | None = None, progress: Progress | None = None) -> bool:
        """Convert, or go on where an interrupted run of the same stopped: True; False if it was finished before.

        What is finished is compared with the source and with its manifest, byte by byte.
        `progress` is told the bytes of tensors to be written as they come, by one thread at a time.

        Raises:
            CheckpointError: a source that cannot be read to its end.
            DestinationError: a destination that cannot be written, or is of another conversion.
        """
        threads = DEFAULT_JOBS if jobs is None else jobs
        if type(threads) is not int or not 1 <= threads <= MOST_JOBS:
            raise SettingError(f"jobs {shown(jobs)}: must be a whole number from 1 to {MOST_JOBS}")
        tell = progress or (lambda _: None)
        try:
            if self.check_destination() == "finished":
                verify_finished(self.destination, self.plan, jobs=threads, progress=tell)
                return False
            _return_freed_memory()
            self._write(threads, tell)
            return True
        except MistralLargeError:
            raise
        except OSError as error:
            raise DestinationError(
                f"{self.destination}: not finished: {error}; when that is fixed, run it again"
            ) from error

    def _write(self, jobs: int, progress: Progress) -> None:
        plan, destination = self.plan, self.destination
        names = {*self.small_files, *(file.name for file in plan.files)}
        with unfinished(destination, keep=names, identity=self._identity()) as journal:
            for name, content in self.small_files.items():
                path = destination / name
                if not path.exists() or path.read_bytes() != content:
                    _write_file(path, content)
            checksums = write_weights(plan, destination, journal, jobs=jobs, progress=progress)
            index = index_file(plan)
            manifest = Manifest.of(plan, checksums, {**self.small_files, **index})
            _write_file(destination / MANIFEST_NAME, json_bytes(manifest.to_json()))
            for name, content in index.items():
                _write_file(destination / name, content)

    def _identity(self) -> dict[str, Any] | None:
        """What is converted into what; None for weights in memory, which may change unseen."""
        if self.source is None:
            return None
        sources = [tensor.source for file in self.plan.files for tensor in file.tensors]
        paths = {source.path for source in sources if isinstance(source, FileTensor)}
        return {
            "version": JOURNAL_VERSION,
            "source": {path.name: _file_identity(path) for path in sorted(paths)},
            "files": {file.name: new_checksum(file.header).hexdigest() for file in self.plan.files},
            "small_files": {name: new_checksum(content).hexdigest() for name, content in self.small_files.items()},
        }


def prepare_conversion(
    source: Path | str,
    destination: Path | str,
    *,
    to: Layout = "hf",
    model_type: ModelType = "mistral_large",
    dtype: OutputDtype | None = None,
    quantize: Scheme | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> Conversion:
    """Check a source and make ready all that `convert_checkpoint` does with it; nothing is written.

    Raises:
        CheckpointError, TokenizerFileError: the reasons of `convert_checkpoint`.
    """
    check_option("to", to, OTHER_LAYOUT)
    check_option("model_type", model_type, ARCHITECTURES)
    if to == "consolidated" and model_type != "mistral_large":
        raise CheckpointError(f"model type {model_type!r}: the consolidated layout has none; leave it out")
    folder = resolve_source(source, patterns=CONSOLIDATED_FILES if to == "hf" else HF_FILES)
    plan = plan_conversion(folder, to=to, dtype=dtype, quantize=quantize, max_shard_size=max_shard_size)
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise CheckpointError(
            f"{folder}: holds an adapter next to the checkpoint, which would be left out; save what merge_and_unload() "
            f"returns and convert that, or move {ADAPTER_CONFIG_NAME} elsewhere"
        )
    is_hf = layout_to_read(folder, to=to, quantize=quantize) == "hf"
    if is_hf:
        _refuse_added_tokens(folder, plan.geometry.vocab_size)
    licences = licence_files(folder)
    if to == "hf":
        small_files = hf_files(
            plan.geometry,
            quantization=plan.quantization,
            dtype=plan.dtype,
            model_type=model_type,
            source=folder,
            licences=licences,
            cast=plan.cast,
            kept_from=folder if is_hf else None,
        )
    else:
        refuse_other_ids(folder, kept_settings(folder)[0])
        small_files = consolidated_files(plan.geometry, source=folder, licences=licences, cast=plan.cast)
    return Conversion(plan, folder, Path(destination), small_files)


def convert_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    to: Layout = "hf",
    model_type: ModelType = "mistral_large",
    dtype: OutputDtype | None = None,
    quantize: Scheme | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Convert the checkpoint in `source`, a folder or a hub repository, to layout `to` in `destination`, bit for bit.

    Weights, tokenizer, config or params, model card and licence files are written; `source` is only read. Licence files
    of the source are copied; a source without any is taken for the vendor's weights, see `licence_files`.
    An interrupted conversion is completed by running it again, a finished one is compared with its source.

    model_type: of the HF layout; `mistral` for stock transformers and engines that do not know us.
    dtype: rounds the weights to another one; without it, every bit stays.
    quantize: writes a quantized checkpoint of the HF layout, see `quantize`; the source may have the HF layout, too.
        Weights are rounded to the nearest, without any calibration.
    jobs: threads; the bytes are the same with any number.
    progress: is told the bytes of tensors to be written as they come, by one thread at a time.

    Raises:
        CheckpointError: a source that is not a complete, sound checkpoint, or options that do not fit together.
        TokenizerFileError: a tokenizer file that is not the v3 one.
        DestinationError: a destination that is not new, empty or of the same conversion, or has no room.
    """
    conversion = prepare_conversion(
        source,
        destination,
        to=to,
        model_type=model_type,
        dtype=dtype,
        quantize=quantize,
        max_shard_size=max_shard_size,
    )
    conversion.run(jobs=jobs, progress=progress)
    return conversion.plan


def export_checkpoint(
    weights: "torch.nn.Module | Mapping[str, torch.Tensor]",
    destination: Path | str,
    *,
    config: Any = None,
    origin: Path | str | None = None,
    dtype: OutputDtype | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Write weights in memory to `destination` in the consolidated layout, bit for bit.

    weights: a model with a config, or a state dict under HF names, which needs its `config`.
    origin: a folder or hub repository whose tokenizer.model.v3 and licence files go along, with a model card; without
        it, only the weights and params.json are written.

    Raises:
        CheckpointError: weights that are not a complete Mistral Large.
        DestinationError: a destination that is not new, empty or unfinished, or has no room.
    """
    if hasattr(weights, "merge_and_unload"):
        raise CheckpointError("the model has adapters beside its weights; export model.merge_and_unload()")
    config = config or getattr(weights, "config", None)
    if config is None:
        raise TypeError("export_checkpoint() of a state dict needs its config")
    state_dict = weights if isinstance(weights, Mapping) else weights.state_dict()
    for settings in (config, getattr(weights, "generation_config", None)):
        refuse_other_ids("the model", {name: getattr(settings, name, None) for name in SPECIAL_IDS})
    plan = plan_export(state_dict, config.to_dict(), dtype=dtype, max_shard_size=max_shard_size)
    small_files = {PARAMS_NAME: json_bytes(params_from_geometry(plan.geometry))}
    if origin is not None:
        folder = resolve_source(origin, patterns=(TOKENIZER_NAME, *LICENCE_PATTERNS))
        if problem := vocabulary_problem(folder):
            raise CheckpointError(f"{folder}: {problem}; give the folder that holds it")
        small_files = consolidated_files(plan.geometry, source=folder, licences=licence_files(folder), cast=plan.cast)
    Conversion(plan, None, Path(destination), small_files).run(jobs=jobs, progress=progress)
    return plan


def _refuse_added_tokens(folder: Path, rows: int) -> None:
    """Refuse a fine-tune with a larger vocabulary: what is written has the vendor's tokenizer, which knows none of it.

    Raises:
        CheckpointError: the rows, and the tokens that the folder's own tokenizer has for them.
    """
    if rows <= VOCAB_SIZE:
        return
    try:
        entries = read_json_object(folder / "tokenizer.json").get("added_tokens")
    except (OSError, ValueError):
        entries = None
    added = [
        entry.get("content")
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("id"), int) and entry["id"] >= VOCAB_SIZE
    ]
    names = f", {shown(added)}" if added else ""
    raise CheckpointError(
        f"{folder}: the weights have {rows} rows, {TOKENIZER_NAME} has {VOCAB_SIZE} pieces: {rows - VOCAB_SIZE} were "
        f"added{names}, and the vendor's tokenizer, which is written, has no place for added tokens; use this folder "
        "as it is, or remove them and their rows first"
    )


def _return_freed_memory() -> None:
    """Give back to the system what converting the tokenizer took: glibc keeps 40 MB of it, which no thread reuses."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _file_identity(path: Path) -> dict[str, Any]:
    """What another version of a file would have otherwise, as far as that is seen without reading all of it."""
    status, checksum = path.stat(), new_checksum(header_bytes(path))
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns, "header": checksum.hexdigest()}


def _write_file(path: Path, content: bytes) -> None:
    with atomic_write(path) as out:
        out.write(content)

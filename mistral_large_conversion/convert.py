"""The ways between a consolidated checkpoint, the HF layout, and weights in memory, whole folders at a time."""

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_large_conversion.chat_templates import prompt_format_of
from mistral_large_conversion.checkpoint.adapter_folder import refuse_left_out
from mistral_large_conversion.checkpoint.atomic_write import json_bytes, write_file
from mistral_large_conversion.checkpoint.hub import LICENCE_PATTERNS, resolve_conversion_source, resolve_source
from mistral_large_conversion.checkpoint.layout import OTHER_LAYOUT, TOKENIZER_STEM, Layout
from mistral_large_conversion.checkpoint.params import PARAMS_NAME, params_from_geometry
from mistral_large_conversion.checkpoint.quantization import Scheme
from mistral_large_conversion.checkpoint.read import vocabulary_problem
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor, header_bytes
from mistral_large_conversion.checkpoint.source_files import shown
from mistral_large_conversion.destination import State, check_destination, unfinished
from mistral_large_conversion.errors import CheckpointError, DestinationError, MistralLargeError, SettingError
from mistral_large_conversion.finished import index_file, refuse_another, verify_finished
from mistral_large_conversion.folder_tokenizer import FolderTokenizer, PromptFormat, read_folder_tokenizer
from mistral_large_conversion.hf_files import (
    ARCHITECTURES,
    consolidated_files,
    hf_files,
    kept_settings,
    refuse_other_ids,
    refuse_outside_layout,
)
from mistral_large_conversion.manifest import MANIFEST_NAME, Manifest, new_checksum
from mistral_large_conversion.model_card import ModelType
from mistral_large_conversion.options import check_option
from mistral_large_conversion.plan import (
    DEFAULT_SHARD_SIZE,
    ConversionPlan,
    OutputDtype,
    layout_to_read,
    plan_conversion,
    plan_export,
)
from mistral_large_conversion.progress import Progress, progress_calls
from mistral_large_conversion.stream import DEFAULT_JOBS, Calibrator, write_weights
from mistral_large_conversion.vocabulary import SPECIAL_IDS

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
    remarks: what of the source is not exact, or not taken, one line each.
    calibrator: quantizes the weights that the plan has calibrated, if it has any.
    """

    plan: ConversionPlan
    source: Path | None
    destination: Path
    small_files: dict[str, bytes]
    remarks: tuple[str, ...] = ()
    calibrator: Calibrator | None = None

    @property
    def needed_bytes(self) -> int:
        working_bytes = 0 if self.calibrator is None else self.calibrator.working_bytes
        return self.plan.file_bytes + sum(map(len, self.small_files.values())) + working_bytes

    def check_destination(self) -> State:
        """What the destination holds of ours; a DestinationError if it must not be written, see `destination`."""
        state = check_destination(self.source, self.destination, self.needed_bytes)
        if state == "finished":
            refuse_another(self.destination, self.plan, self.small_files)
        return state

    def run(self, *, jobs: int | None = None, progress: Progress | bool = True) -> bool:
        """Convert, or go on where an interrupted run of the same stopped: True; False if it was finished before.

        What is finished is compared with the source and with its manifest, byte by byte.
        progress: see `convert_checkpoint`.

        Raises:
            CheckpointError: a source that cannot be read to its end.
            DestinationError: a destination that cannot be written, or is of another conversion.
        """
        threads = DEFAULT_JOBS if jobs is None else jobs
        if type(threads) is not int or not 1 <= threads <= MOST_JOBS:
            raise SettingError(f"jobs {shown(jobs)}: must be a whole number from 1 to {MOST_JOBS}")
        try:
            is_finished = self.check_destination() == "finished"
            label = "Verifying" if is_finished else "Converting"
            with progress_calls(progress, label, self.plan.tensor_bytes) as tell:
                if is_finished:
                    verify_finished(self.destination, self.plan, jobs=threads, progress=tell)
                else:
                    _return_freed_memory()
                    self._write(threads, tell)
            return not is_finished
        except MistralLargeError:
            raise
        except OSError as error:
            raise DestinationError(
                f"{self.destination}: not finished: {error}; when that is fixed, run it again"
            ) from error

    def _write(self, jobs: int, progress: Progress) -> None:
        plan, destination = self.plan, self.destination
        names = {*self.small_files, *(file.name for file in plan.files)}
        names |= set() if self.calibrator is None else set(self.calibrator.working_names)
        with unfinished(destination, keep=names, identity=self._identity()) as journal:
            for name, content in self.small_files.items():
                path = destination / name
                if not path.exists() or path.read_bytes() != content:
                    write_file(path, content)
            checksums = write_weights(
                plan, destination, journal, jobs=jobs, progress=progress, calibrator=self.calibrator
            )
            index = index_file(plan)
            manifest = Manifest.of(plan, checksums, {**self.small_files, **index})
            write_file(destination / MANIFEST_NAME, json_bytes(manifest.to_json()))
            for name, content in index.items():
                write_file(destination / name, content)

    def _identity(self) -> dict[str, Any] | None:
        """What is converted into what; None for weights in memory, which may change unseen."""
        if self.source is None:
            return None
        sources = [tensor.source for file in self.plan.files for tensor in file.tensors]
        paths = {source.path for source in sources if isinstance(source, FileTensor)}
        adapter, calibration = self.plan.adapter, self.plan.calibration
        return {
            "version": JOURNAL_VERSION,
            **({} if calibration is None else {"calibration": calibration.to_json()}),
            **({} if adapter is None else {"adapter": adapter.checksums}),
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
    adapter: Path | str | None = None,
    prompt_format: PromptFormat | None = None,
    calibrator: Calibrator | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
) -> Conversion:
    """Check a source and make ready all that `convert_checkpoint` does with it; nothing is written.

    calibrator: chooses the codes and scales of int4: see `modeling_mistral_large.calibration`.

    Raises:
        CheckpointError, TokenizerFileError: the reasons of `convert_checkpoint`.
    """
    check_option("to", to, OTHER_LAYOUT)
    check_option("model_type", model_type, ARCHITECTURES)
    if to == "consolidated" and model_type != "mistral_large":
        raise CheckpointError(f"model type {model_type!r}: the consolidated layout has none; leave it out")
    folder = resolve_conversion_source(source, to=to, revision=revision, token=token, cache_dir=cache_dir)
    plan = plan_conversion(
        folder,
        to=to,
        dtype=dtype,
        quantize=quantize,
        max_shard_size=max_shard_size,
        adapter=adapter,
        calibration=None if calibrator is None else calibrator.calibration,
    )
    refuse_left_out(folder, None if plan.adapter is None else plan.adapter.folder)
    is_hf = layout_to_read(folder, to=to, quantize=quantize) == "hf"
    tokenizer = None
    if is_hf:
        tokenizer = read_folder_tokenizer(folder, layout="hf", prompt_format=prompt_format)
    elif prompt_format is not None:
        raise SettingError(
            f"prompt_format {prompt_format!r}: has no effect on the consolidated layout, whose vocabulary decides; "
            "leave it out"
        )
    if to == "hf":
        small_files = hf_files(
            plan.geometry,
            quantization=plan.quantization,
            dtype=plan.dtype,
            model_type=model_type,
            source=folder,
            keeps_settings=is_hf,
            cast=plan.cast,
            adapter=plan.adapter,
            calibration=plan.calibration,
            tokenizer=tokenizer,
        )
    else:
        assert tokenizer is not None
        refuse_other_ids(folder, kept_settings(folder)[0])
        refuse_outside_layout(tokenizer, plan.geometry.vocab_size)
        small_files = consolidated_files(
            plan.geometry, source=folder, cast=plan.cast, adapter=plan.adapter, tokenizer=tokenizer
        )
    return Conversion(plan, folder, Path(destination), small_files, remarks_of(tokenizer), calibrator)


def convert_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    to: Layout = "hf",
    model_type: ModelType = "mistral_large",
    dtype: OutputDtype | None = None,
    quantize: Scheme | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    adapter: Path | str | None = None,
    prompt_format: PromptFormat | None = None,
    jobs: int | None = None,
    progress: Progress | bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
) -> ConversionPlan:
    """Convert the checkpoint in `source`, a folder or a hub repository, to layout `to` in `destination`, bit for bit.

    A source of the HF layout, such as a fine-tune, becomes a folder of ours in the same layout; where a folder has both
    layouts, the consolidated one is read.

    Weights, tokenizer, config or params, model card and licence files are written; `source` is only read. Licence files
    of the source are copied; a source without any is taken for the vendor's weights, see `licence_files`.
    An interrupted conversion is completed by running it again, a finished one is compared with its source.

    model_type: of the HF layout; `mistral` for stock transformers and engines that do not know us.
    dtype: rounds the weights to another one; without it, every bit stays.
    quantize: writes a quantized checkpoint of the HF layout, see `quantize`.
        Weights are rounded to the nearest, without any calibration.
    adapter: a folder or hub repository with a LoRA that is merged into the weights: PEFT's, or the vendor's
        lora.safetensors with its params.json. The bits are those of PEFT's merge_and_unload() on the CPU, of a base
        loaded in the dtype that is written. Before quantizing, the dtype is the source's.
    prompt_format: of a source of the HF layout, "v3", "v7" or "own" for its own chat template; without it, what the
        template renders decides, see `recognize_prompt_format`.
    jobs: threads; the bytes are the same with any number.
    progress: shows a bar at a terminal and in a notebook, as huggingface_hub's downloads do; False shows none. A
        function is called with the bytes of tensors to be written as they come, by one thread at a time.
    revision, token, cache_dir: of a source on the hub, as in `from_pretrained`.

    Raises:
        CheckpointError: a source that is not a complete, sound checkpoint, or options that do not fit together.
        TokenizerFileError: a tokenizer file that cannot be read, or in the consolidated layout is not v3's or v7's.
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
        adapter=adapter,
        prompt_format=prompt_format,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
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
    progress: Progress | bool = True,
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
        raise CheckpointError("the model has adapters that are not merged; export model.merge_and_unload()")
    config = config or getattr(weights, "config", None)
    if config is None:
        raise TypeError("export_checkpoint() of a state dict needs its config")
    state_dict = weights if isinstance(weights, Mapping) else weights.state_dict()
    for settings in (config, getattr(weights, "generation_config", None)):
        refuse_other_ids("the model", {name: getattr(settings, name, None) for name in SPECIAL_IDS})
    plan = plan_export(state_dict, config.to_dict(), dtype=dtype, max_shard_size=max_shard_size)
    small_files = {PARAMS_NAME: json_bytes(params_from_geometry(plan.geometry))}
    if origin is not None:
        folder = resolve_source(origin, patterns=(f"{TOKENIZER_STEM}*", *LICENCE_PATTERNS))
        if problem := vocabulary_problem(folder):
            raise CheckpointError(f"{folder}: {problem}; give the folder that holds it")
        small_files = consolidated_files(plan.geometry, source=folder, cast=plan.cast)
    Conversion(plan, None, Path(destination), small_files).run(jobs=jobs, progress=progress)
    return plan


def remarks_of(tokenizer: FolderTokenizer | None) -> tuple[str, ...]:
    """What to say of the tokenizer of a source of the HF layout: its prompt format and why, and what is not exact."""
    if tokenizer is None:
        return ()
    if prompt_format_of(tokenizer.chat_templates.get("default")) == tokenizer.prompt_format == tokenizer.vocabulary:
        # One of ours: nothing had to be found out.
        return tokenizer.remarks
    prompts = tokenizer.prompt_format or "those of its own chat template"
    return (f"prompts: {prompts}; {tokenizer.format_reason}", *tokenizer.remarks)


def _return_freed_memory() -> None:
    """Give back to the system what converting the tokenizer took: glibc keeps 40 MB of it, which no thread reuses."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _file_identity(path: Path) -> dict[str, Any]:
    """What another version of a file would have otherwise, as far as that is seen without reading all of it."""
    status, checksum = path.stat(), new_checksum(header_bytes(path))
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns, "header": checksum.hexdigest()}

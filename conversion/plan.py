"""What a conversion will read and write, decided from file headers before anything is written."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from huggingface_hub import split_state_dict_into_shards_factory

from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.conversion.names import expected_tensors, is_buffer, unwrapped_name
from modeling_mistral_large.conversion.params import (
    PARAMS_NAME,
    config_from_params,
    params_findings,
    params_from_hf_config,
)
from modeling_mistral_large.conversion.quantize import (
    CANNOT_UNDO,
    FORMATS,
    Quantization,
    Quantize,
    choose_group_size,
    is_part,
    is_quantized,
    quantization_config,
    quantization_of,
    quantized_entries,
    shape_tensor,
)
from modeling_mistral_large.conversion.safetensors_header import (
    BYTES_OF,
    FLOATS,
    FileTensor,
    MemoryTensor,
    StoredTensor,
    TensorEntry,
    encode_header,
    read_header,
)
from modeling_mistral_large.conversion.source_files import adapter_finding, file_finding, read_json_object, shown
from modeling_mistral_large.conversion.transforms import Cast, RegroupRopePairs, Rows, Step
from modeling_mistral_large.errors import CheckpointError, SettingError
from modeling_mistral_large.sentencepiece_bpe import VOCABULARY_NAMES, find_vocabulary

if TYPE_CHECKING:
    import torch

Layout = Literal["consolidated", "hf"]
OutputDtype = Literal["bf16", "fp16", "fp32"]

OTHER_LAYOUT: dict[Layout, Layout] = {"consolidated": "hf", "hf": "consolidated"}
OUTPUT_DTYPES: dict[OutputDtype, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
WEIGHTS_STEM: dict[Layout, str] = {"consolidated": "consolidated", "hf": "model"}
CONFIG_NAMES: dict[Layout, str] = {"consolidated": PARAMS_NAME, "hf": "config.json"}
TOKENIZER_NAME = "tokenizer.model.v3"
FIRST_QUERY = "model.layers.0.self_attn.q_proj.weight"
DEFAULT_SHARD_SIZE = "5GB"
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# An error that lists more than this is no longer read.
MOST_FINDINGS = 1000
LONGEST_FINDING = 400


class ExpectedEntry(NamedTuple):
    """One tensor that the files of a checkpoint must hold, with one of these dtypes."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor on its way: its rows go through the steps, a few at a time, and become those of the outputs.

    quantize: makes the rows of several outputs of what comes out of the steps.
    """

    source: StoredTensor
    steps: tuple[Step, ...]
    outputs: tuple[TensorEntry, ...]
    quantize: Quantize | None = None

    @property
    def rows_at_once(self) -> int:
        """The steps take multiples of so many rows."""
        return math.lcm(*(step.rows_at_once for step in self.steps))

    @property
    def size(self) -> int:
        """Bytes to be written."""
        return sum(output.size for output in self.outputs)

    def transform(self, rows: Rows) -> tuple[Rows, ...]:
        """The rows of each output that come of these rows of the source."""
        for step in self.steps:
            rows = step(rows)
        return (rows,) if self.quantize is None else self.quantize(rows)


@dataclass(frozen=True)
class PlannedFile:
    """One file of weights to be written."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def outputs(self) -> tuple[TensorEntry, ...]:
        """What the file will hold, in the order of its bytes."""
        return tuple(output for tensor in self.tensors for output in tensor.outputs)

    @property
    def header(self) -> bytes:
        return encode_header(self.outputs)

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.size for tensor in self.tensors)

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Offset and size of each output in the file, in bytes."""
        start, places = len(self.header), {}
        for output in self.outputs:
            places[output.name] = (start, output.size)
            start += output.size
        return places


@dataclass(frozen=True)
class ConversionPlan:
    """All that moving the weights needs to know.

    to: the layout that is written.
    config: what the config.json will say.
    dtype, source_dtypes: what is written, and what there is; quantized weights are of other dtypes.
    """

    to: Layout
    config: MistralLargeConfig
    dtype: str
    source_dtypes: tuple[str, ...]
    files: tuple[PlannedFile, ...]

    @property
    def quantization(self) -> tuple[Quantization, int] | None:
        """How the weights are quantized and in groups of how many, or None."""
        return quantization_in(self.config)

    @property
    def cast(self) -> tuple[str, str] | None:
        """The dtypes of the source and of the output where they differ."""
        return None if self.source_dtypes == (self.dtype,) else (", ".join(self.source_dtypes), self.dtype)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return sum(tensor.size for file in self.files for tensor in file.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(file.size for file in self.files)

    @property
    def index_name(self) -> str:
        return f"{WEIGHTS_STEM[self.to]}.safetensors.index.json"

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of the index, or None for a single file, which needs none."""
        if len(self.files) == 1:
            return None
        weight_map = {output.name: file.name for file in self.files for output in file.outputs}
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def plan_conversion(
    source: Path | str,
    *,
    to: Layout = "hf",
    dtype: OutputDtype | None = None,
    quantize: Quantization | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> ConversionPlan:
    """Plan the way from the other layout to layout `to`, from the headers of the folder `source`.

    Only the files of that other layout are looked at: the second copy of the weights in the vendor's folder is ignored.
    `dtype` is that of the output; without it, the source must have one, which stays. A source that is to be quantized
    may have the HF layout, too.

    Raises:
        CheckpointError: everything that is missing, extra, damaged or of another shape than the geometry says, in one
            error; options that do not fit together.
    """
    check_option("to", to, OTHER_LAYOUT)
    check_option("dtype", dtype, (None, *OUTPUT_DTYPES))
    check_option("quantize", quantize, (None, *FORMATS))
    layout = layout_to_read(source, to=to, quantize=quantize)
    if quantize is None:
        config, tensors = read_checkpoint(source, layout, may_mix_dtypes=dtype is not None)
        return _plan(tensors, config, layout, to, dtype, max_shard_size)
    if to != "hf":
        raise CheckpointError(f"quantizing to {quantize}: only the HF layout has a place for it; leave `to` out")
    if dtype is not None:
        raise CheckpointError(
            f"quantizing to {quantize}: what is not quantized is bf16, with dtype {dtype} too; leave `dtype` out"
        )
    config, tensors = read_checkpoint(source, layout, may_mix_dtypes=True)
    quantized_shapes = [tensor.shape for tensor in expected_tensors(config) if is_quantized(tensor.hf)]
    config.quantization_config = quantization_config(quantize, choose_group_size(quantized_shapes, quantize))
    return _plan(tensors, config, layout, to, "bf16", max_shard_size)


def layout_to_read(source: Path | str, *, to: Layout, quantize: Quantization | None) -> Layout:
    """The layout that is converted: the other one, unless it is quantized."""
    return OTHER_LAYOUT[to] if quantize is None else source_layout(source)


def check_option(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse an option whose value means nothing.

    Raises:
        SettingError: the option, its value and what it may be.
    """
    values = tuple(allowed)
    if not any(type(value) is type(each) and value == each for each in values):
        raise SettingError(f"{name} {shown(value)}: must be one of {', '.join(map(repr, values))}")


def source_layout(source: Path | str) -> Layout:
    """The layout from which a folder is quantized: the vendor's, unless there is only the other one."""
    folder = Path(source)
    has = {layout: any(folder.glob(f"{stem}*.safetensors")) for layout, stem in WEIGHTS_STEM.items()}
    return "hf" if has["hf"] and not has["consolidated"] else "consolidated"


def quantization_in(config: MistralLargeConfig) -> tuple[Quantization, int] | None:
    """How the weights of a checkpoint with this config are quantized and in groups of how many, or None."""
    return quantization_of(getattr(config, "quantization_config", None))


def vocabulary_finding(folder: Path) -> str | None:
    """What keeps the vendor's SentencePiece file of a folder from being read, or None if nothing does."""
    if (vocabulary := find_vocabulary(folder)) is not None:
        return file_finding(folder, vocabulary.name)
    other = VOCABULARY_NAMES[1]
    is_there = f", and {other} is another vocabulary" if (folder / other).exists() else ""
    return f"{TOKENIZER_NAME} is missing{is_there}"


def read_checkpoint(
    source: Path | str,
    layout: Layout,
    *,
    needs_tokenizer: bool = True,
    may_mix_dtypes: bool = False,
    may_be_quantized: bool = False,
) -> tuple[MistralLargeConfig, list[FileTensor]]:
    """The geometry of the checkpoint of this layout in a folder, and where each of its tensors is, from the headers.

    The config of a quantized checkpoint has its `quantization_config`.

    Raises:
        CheckpointError: everything that is missing, extra, damaged or of another shape than the geometry says, in one
            error.
    """
    folder = Path(source)
    _check_folder(folder, layout)
    tensors, weight_findings = _read_weights(folder, layout)
    params, quantization, findings = _read_params(folder, layout, tensors)
    if quantization is not None and not may_be_quantized:
        raise CheckpointError(f"{folder}: {CANNOT_UNDO}")
    findings += weight_findings
    if needs_tokenizer and (finding := vocabulary_finding(folder)):
        findings.append(finding)
    config = None if params is None else config_from_params(params)
    if config is not None:
        if quantization is not None:
            config.quantization_config = quantization_config(*quantization)
        # Without a readable file, every tensor of it would be listed as missing too.
        findings += _tensor_findings(tensors, config, layout, are_complete=not weight_findings)
    if not may_mix_dtypes:
        findings += _dtype_findings(tensor for tensor in tensors if quantization is None or not is_part(tensor.name))
    _refuse(findings, f"{folder} is not a complete {layout} checkpoint")
    assert config is not None
    return config, tensors


def read_geometry(source: Path | str, layout: Layout) -> MistralLargeConfig:
    """The geometry and quantization that the settings of a folder say; its weights may be elsewhere.

    Raises:
        CheckpointError: settings that are not those of a Mistral Large, all reasons in one error.
    """
    folder = Path(source)
    _check_folder(folder, layout)
    # Only for a config.json without head_dim, which its weights can prove.
    tensors, _ = _read_weights(folder, layout)
    params, quantization, findings = _read_params(folder, layout, tensors)
    if params is None:
        raise CheckpointError(f"{folder}: no geometry of a Mistral Large: {'; '.join(findings)}; give another folder")
    config = config_from_params(params)
    if quantization is not None:
        config.quantization_config = quantization_config(*quantization)
    return config


def _check_folder(folder: Path, layout: Layout) -> None:
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise CheckpointError(f"{folder}: no folder that can be read; give the one that holds {CONFIG_NAMES[layout]}")
    if finding := adapter_finding(folder):
        raise CheckpointError(f"{folder}: {finding}")


def plan_export(
    state_dict: Mapping[str, "torch.Tensor"],
    config: Mapping[str, Any],
    *,
    dtype: OutputDtype | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> ConversionPlan:
    """Plan the way of a state dict in memory, under HF names, to the consolidated layout.

    config: what its config.json would say, of ours or of transformers' Mistral.

    Raises:
        CheckpointError: as for `plan_conversion`.
    """
    check_option("dtype", dtype, (None, *OUTPUT_DTYPES))
    if quantization_of(config.get("quantization_config")) is not None:
        raise CheckpointError(f"the model: {CANNOT_UNDO}")
    tensors = [MemoryTensor.of(unwrapped_name(name), tensor) for name, tensor in state_dict.items()]
    tensors = [tensor for tensor in tensors if not is_buffer(tensor.name)]
    params, findings = params_from_hf_config(config)
    findings += _derive_head_dim(params, tensors)
    findings += params_findings(params)
    _refuse([f"config: {finding}" for finding in findings], "the config is not that of a Mistral Large")
    own_config = config_from_params(params)
    findings = _tensor_findings(tensors, own_config, "hf", are_complete=True)
    findings += [
        f"tensor {tensor.name!r} is on device meta, without data; load the model without offload"
        for tensor in tensors
        if tensor.tensor.is_meta
    ]
    if dtype is None:
        findings += _dtype_findings(tensors)
    _refuse(findings, "the state dict does not fit its config")
    return _plan(tensors, own_config, "hf", "consolidated", dtype, max_shard_size)


def _refuse(findings: Sequence[str], what: str) -> None:
    if not findings:
        return
    listed = [f"  {' '.join(finding.splitlines())[:LONGEST_FINDING]}" for finding in findings[:MOST_FINDINGS]]
    if len(findings) > MOST_FINDINGS:
        listed.append(f"  and {len(findings) - MOST_FINDINGS} more")
    raise CheckpointError("\n".join([f"{what}; nothing was done, mend or download it again:", *listed]))


def _read_params(
    folder: Path, layout: Layout, tensors: Sequence[StoredTensor]
) -> tuple[dict[str, Any] | None, tuple[Quantization, int] | None, list[str]]:
    """The geometry under the names of params.json and the quantization, or no geometry and the reasons.

    tensors: those of the folder, which must say what an older config.json does not.
    """
    name = CONFIG_NAMES[layout]
    if finding := file_finding(folder, name):
        return None, None, [finding]
    try:
        params = read_json_object(folder / name)
    except (OSError, ValueError) as error:
        return None, None, [f"{name}: {error}"]
    findings: list[str] = []
    quantization = None
    if layout == "hf":
        if (quantization := quantization_of(params.get("quantization_config"))) is not None:
            del params["quantization_config"]
        params, findings = params_from_hf_config(params)
        findings += _derive_head_dim(params, tensors)
    findings += params_findings(params)
    return (None if findings else params), quantization, [f"{name}: {finding}" for finding in findings]


def _derive_head_dim(params: dict[str, Any], tensors: Iterable[StoredTensor]) -> list[str]:
    """Add the head_dim that a config.json of 2024 leaves to the reader, or say why it is not proven.

    transformers takes hidden_size / num_attention_heads. That is a guess, unless the rows of the query weights agree.
    """
    width, heads = params.get("dim"), params.get("n_heads")
    if "head_dim" in params or type(width) is not int or type(heads) is not int or heads < 1:
        return []
    rows = next((tensor.shape[0] for tensor in tensors if tensor.name == FIRST_QUERY and tensor.shape), None)
    if rows is None or width % heads:
        return []
    if rows != width:
        return [
            f"hidden_size / num_attention_heads is {width // heads}, but {FIRST_QUERY!r} has {rows} rows, not {width}: "
            "add the model's own head_dim"
        ]
    params["head_dim"] = width // heads
    return []


def _read_weights(folder: Path, layout: Layout) -> tuple[list[FileTensor], list[str]]:
    """All tensors of the files of weights, and what is wrong with the files, their number and their index.

    Names are those of the model alone, without what training has put around it, and buffers are left out.
    """
    stem = WEIGHTS_STEM[layout]
    names, findings = _weight_files(folder, stem)
    tensors: list[FileTensor] = []
    for name in names:
        if finding := file_finding(folder, name):
            findings.append(finding)
        else:
            of_file, file_findings = read_header(folder / name)
            tensors += of_file
            findings += file_findings
    index_name = f"{stem}.safetensors.index.json"
    if not findings and os.path.lexists(folder / index_name):
        findings = _index_findings(folder, index_name, tensors)
    tensors = [replace(tensor, name=unwrapped_name(tensor.name)) for tensor in tensors]
    return [tensor for tensor in tensors if layout != "hf" or not is_buffer(tensor.name)], findings


def _weight_files(folder: Path, stem: str) -> tuple[list[str], list[str]]:
    single = f"{stem}.safetensors"
    present = sorted(path.name for path in folder.iterdir() if re.fullmatch(rf"{stem}.*\.safetensors", path.name))
    if present == [single]:
        return present, []
    if not present:
        pickled = sorted(path.name for path in folder.glob(f"{stem}*.pth"))
        hint = f", only {pickled[0]!r}: pickles are not read" if pickled else ""
        return [], [f"no {single} and no {stem}-00001-of-….safetensors{hint}"]
    matches = [re.fullmatch(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.safetensors", name) for name in present]
    totals = {match[2] for match in matches if match}
    if None in matches or len(totals) != 1:
        return [], [f"files of more than one checkpoint: {present}"]
    (total,) = totals
    wanted = [f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    there, needed = set(present), set(wanted)
    return present, [f"{name} is missing" for name in wanted if name not in there] + [
        f"{name} is not one of {total}" for name in present if name not in needed
    ]


def _index_findings(folder: Path, index_name: str, tensors: Iterable[FileTensor]) -> list[str]:
    """Where the index and the headers say different things; the headers are what is read."""
    if finding := file_finding(folder, index_name):
        return [finding]
    try:
        weight_map = read_json_object(folder / index_name).get("weight_map")
    except (OSError, ValueError) as error:
        return [f"{index_name}: {error}"]
    if not isinstance(weight_map, dict):
        return [f"{index_name} has no weight_map"]
    stored = {tensor.name: tensor.path.name for tensor in tensors}
    return [
        f"{index_name}: {shown(name)} is in {shown(weight_map.get(name))}, but stored in {shown(stored.get(name))}"
        for name in sorted({*stored, *weight_map})
        if weight_map.get(name) != stored.get(name)
    ]


def _tensor_findings(
    tensors: Sequence[StoredTensor], config: MistralLargeConfig, layout: Layout, *, are_complete: bool
) -> list[str]:
    expected = {entry.name: entry for entry in expected_entries(config, layout)}
    seen: set[str] = set()
    findings = []
    for tensor in tensors:
        if tensor.name in seen:
            findings.append(f"tensor {tensor.name!r} is there twice")
        elif tensor.name not in expected:
            findings.append(f"tensor {tensor.name!r} is extra: this geometry has none of that name")
        elif tensor.dtype not in expected[tensor.name].dtypes:
            dtypes = ", ".join(expected[tensor.name].dtypes)
            findings.append(f"tensor {tensor.name!r} has dtype {tensor.dtype}, must be one of {dtypes}")
        elif tensor.shape != expected[tensor.name].shape:
            needed = list(expected[tensor.name].shape)
            findings.append(f"tensor {tensor.name!r} has shape {list(tensor.shape)}, this geometry needs {needed}")
        seen.add(tensor.name)
    if are_complete:
        findings += [f"tensor {name!r} is missing" for name in expected if name not in seen]
    return findings


def _dtype_findings(tensors: Iterable[TensorEntry]) -> list[str]:
    dtypes = sorted({tensor.dtype for tensor in tensors})
    if len(dtypes) <= 1:
        return []
    return [f"tensors of dtypes {', '.join(dtypes)}: a checkpoint has one; ask for a dtype to have them converted"]


def expected_entries(config: MistralLargeConfig, layout: Layout) -> list[ExpectedEntry]:
    """All tensors that the files of a checkpoint of this layout must hold, in order."""
    quantization = quantization_in(config)
    entries: list[ExpectedEntry] = []
    for tensor in expected_tensors(config):
        name = getattr(tensor, layout)
        if quantization is not None and is_quantized(name):
            parts = quantized_entries(name, tensor.shape, *quantization)
            entries += [ExpectedEntry(part.name, part.shape, (part.dtype,)) for part in parts]
        else:
            entries.append(ExpectedEntry(name, tensor.shape, FLOATS))
    return entries


def planned_tensors(
    stored: Mapping[str, StoredTensor], config: MistralLargeConfig, layout: Layout, to: Layout, dtype: str
) -> list[PlannedTensor]:
    """The way of each tensor of a checkpoint of `layout` to layout `to`, in the order of the forward pass.

    dtype: of what is not quantized, as safetensors names it; `config` says what is.
    """
    quantization = quantization_in(config)
    planned = []
    for expected in expected_tensors(config):
        source, name = stored[getattr(expected, layout)], getattr(expected, to)
        steps: list[Step] = []
        if expected.has_rope_pairs and layout != to:
            steps.append(RegroupRopePairs(to, config.head_dim))
        if quantization is not None and is_quantized(name):
            codes, scales, *shapes = quantized_entries(name, expected.shape, *quantization)
            planned.append(PlannedTensor(source, tuple(steps), (codes, scales), Quantize(source.dtype, *quantization)))
            planned += [PlannedTensor(shape_tensor(entry, expected.shape), (), (entry,)) for entry in shapes]
            continue
        if source.dtype != dtype:
            steps.append(Cast(source.dtype, dtype))
        size = source.size // BYTES_OF[source.dtype] * BYTES_OF[dtype]
        planned.append(PlannedTensor(source, tuple(steps), (TensorEntry(name, dtype, source.shape, size),)))
    return planned


def _plan(
    tensors: Sequence[StoredTensor],
    config: MistralLargeConfig,
    layout: Layout,
    to: Layout,
    dtype: OutputDtype | None,
    max_shard_size: int | str,
) -> ConversionPlan:
    written_dtype = tensors[0].dtype if dtype is None else OUTPUT_DTYPES[dtype]
    planned = {
        tensor.outputs[0].name: tensor
        for tensor in planned_tensors({tensor.name: tensor for tensor in tensors}, config, layout, to, written_dtype)
    }
    split = split_state_dict_into_shards_factory(
        {name: tensor.size for name, tensor in planned.items()},
        get_storage_size=int,
        filename_pattern=WEIGHTS_STEM[to] + "{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size),
    )
    files = tuple(
        PlannedFile(file, tuple(planned[name] for name in names)) for file, names in split.filename_to_tensors.items()
    )
    source_dtypes = tuple(sorted({tensor.dtype for tensor in tensors}))
    return ConversionPlan(to=to, config=config, dtype=written_dtype, source_dtypes=source_dtypes, files=files)


def parse_size(size: int | str, what: str = "max_shard_size") -> int:
    """Bytes of a size such as 5GB, 750 MB or 1000000; `what` has that size, for the error."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT]?B|)\s*", str(size), re.IGNORECASE)
    size_bytes = int(float(match[1]) * SIZE_UNITS[match[2].upper()]) if match else 0
    if size_bytes < 1:
        raise CheckpointError(f"{what} {shown(size)}: must be a size such as 5GB or 750MB")
    return size_bytes

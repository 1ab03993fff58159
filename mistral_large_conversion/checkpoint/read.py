"""A checkpoint of either layout, read from its small files and the headers of its weights."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mistral_large_conversion.checkpoint.geometry import Geometry, ModelSizes
from mistral_large_conversion.checkpoint.layout import (
    CONFIG_NAMES,
    TOKENIZER_NAME,
    WEIGHTS_STEM,
    Layout,
    source_layout,
)
from mistral_large_conversion.checkpoint.names import expected_tensors, is_buffer, unwrapped_name
from mistral_large_conversion.checkpoint.params import (
    TO_GEOMETRY,
    geometry_from_params,
    params_from_hf_config,
    params_problems,
)
from mistral_large_conversion.checkpoint.quantization import (
    CANNOT_UNDO,
    Quantization,
    foreign_quantization,
    is_part,
    is_quantized,
    quantization_of,
    quantized_entries,
)
from mistral_large_conversion.checkpoint.safetensors_header import (
    FLOATS,
    FileTensor,
    StoredTensor,
    TensorEntry,
    read_header,
)
from mistral_large_conversion.checkpoint.source_files import adapter_problem, file_problem, json_or_problem, shown
from mistral_large_conversion.errors import CheckpointError, TokenizerFileError
from mistral_large_conversion.vocabulary import VOCABULARY_NAMES, find_vocabulary

FIRST_QUERY = "model.layers.0.self_attn.q_proj.weight"

# Weights of older programs, which run code when they are read.
PICKLES = ("*.pth", "*.pt", "*.bin")
NO_PICKLES = (
    "pickles are not read, as they may run code; take the safetensors files, or load it with transformers and save it "
    "again with save_pretrained, which writes them"
)

# An error that lists more than this is no longer read.
MOST_PROBLEMS = 1000

LONGEST_PROBLEM = 400


class ExpectedEntry(NamedTuple):
    """One tensor that the files of a checkpoint must hold, with one of these dtypes."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are sound; `tensors` are in the order of the files."""

    folder: Path
    layout: Layout
    geometry: Geometry
    quantization: Quantization | None
    tensors: dict[str, FileTensor]

    @property
    def dtype(self) -> str:
        """That of the weights, or of those that are not quantized."""
        return self.tensors[getattr(expected_tensors(self.geometry)[0], self.layout)].dtype

    @property
    def parameters(self) -> int:
        """How many parameters the model has, quantized or not."""
        return sum(math.prod(tensor.shape) for tensor in expected_tensors(self.geometry))

    @property
    def bits_per_weight(self) -> float | None:
        """Bits in the file, with scales, of a quantized weight, or None if none is."""
        if self.quantization is None:
            return None
        weights = sum(math.prod(tensor.shape) for tensor in expected_tensors(self.geometry) if is_quantized(tensor.hf))
        return 8 * sum(tensor.size for tensor in self.tensors.values() if is_part(tensor.name)) / weights


def vocabulary_problem(folder: Path) -> str | None:
    """What keeps the vendor's SentencePiece file of a folder from being read, or None if nothing does."""
    try:
        vocabulary = find_vocabulary(folder)
    except TokenizerFileError as error:
        return str(error)
    if vocabulary is not None:
        return file_problem(folder, vocabulary.name)
    other = VOCABULARY_NAMES[-1]
    is_there = f", and {other} is another vocabulary" if (folder / other).exists() else ""
    return f"{TOKENIZER_NAME} is missing{is_there}"


def read_checkpoint(
    source: Path | str,
    layout: Layout,
    *,
    needs_tokenizer: bool = True,
    may_mix_dtypes: bool = False,
    may_be_quantized: bool = False,
) -> Checkpoint:
    """The checkpoint of this layout in a folder, from the headers.

    Raises:
        CheckpointError: everything that is missing, extra, damaged or of another shape than the geometry says, in one
            error.
    """
    folder = Path(source)
    _check_folder(folder, layout)
    tensors, weight_problems = read_weights(folder, layout)
    params, quantization, problems = _read_params(folder, layout, tensors)
    if quantization is not None and not may_be_quantized:
        raise CheckpointError(f"{folder}: {CANNOT_UNDO}")
    problems += weight_problems
    if needs_tokenizer and (problem := vocabulary_problem(folder)):
        problems.append(problem)
    geometry = None if params is None else geometry_from_params(params)
    if geometry is not None:
        # Without a readable file, every tensor of it would be listed as missing too.
        expected = expected_entries(geometry, layout, quantization)
        problems += tensor_problems(tensors, expected, are_complete=not weight_problems)
    if not may_mix_dtypes:
        problems += dtype_problems(tensor for tensor in tensors if quantization is None or not is_part(tensor.name))
    refuse(problems, f"{folder} is not a complete {layout} checkpoint")
    assert geometry is not None
    return Checkpoint(folder, layout, geometry, quantization, {tensor.name: tensor for tensor in tensors})


def read_geometry(source: Path | str, layout: Layout) -> tuple[Geometry, Quantization | None]:
    """The geometry and quantization that the settings of a folder say; its weights may be elsewhere.

    Raises:
        CheckpointError: settings that are not those of a Mistral Large, all reasons in one error.
    """
    folder = Path(source)
    _check_folder(folder, layout)
    # Only for a config.json without head_dim, which its weights can prove.
    tensors, _ = read_weights(folder, layout)
    params, quantization, problems = _read_params(folder, layout, tensors)
    if params is None:
        raise CheckpointError(f"{folder}: no geometry of a Mistral Large: {'; '.join(problems)}; give another folder")
    return geometry_from_params(params), quantization


def _check_folder(folder: Path, layout: Layout) -> None:
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise CheckpointError(f"{folder}: no folder that can be read; give the one that holds {CONFIG_NAMES[layout]}")
    if problem := adapter_problem(folder):
        raise CheckpointError(f"{folder}: {problem}")


def refuse(problems: Sequence[str], what: str, *, remedy: str = "fix or download it again") -> None:
    """Raise a CheckpointError that lists all problems, if there are any."""
    if not problems:
        return
    listed = [f"  {' '.join(problem.splitlines())[:LONGEST_PROBLEM]}" for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        listed.append(f"  and {len(problems) - MOST_PROBLEMS} more")
    raise CheckpointError("\n".join([f"{what}; nothing was done, {remedy}:", *listed]))


def _read_params(
    folder: Path, layout: Layout, tensors: Sequence[StoredTensor]
) -> tuple[dict[str, Any] | None, Quantization | None, list[str]]:
    """The geometry under the names of params.json and the quantization, or no geometry and the reasons.

    tensors: those of the folder, which must say what an older config.json does not.
    """
    name = CONFIG_NAMES[layout]
    params, problem = json_or_problem(folder, name)
    if problem is not None:
        return None, None, [problem]
    quantization = None
    if layout == "consolidated":
        problems = params_problems(params)
    else:
        settings = params.get("quantization_config")
        if (quantization := quantization_of(settings)) is not None:
            del params["quantization_config"]
        elif settings:
            # Its tensors have other names and shapes: all of them would be listed.
            raise CheckpointError(f"{folder}: {foreign_quantization(settings)}")
        params, problems = params_of_config(params, tensors)
    return (None if problems else params), quantization, [f"{name}: {problem}" for problem in problems]


def params_of_config(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> tuple[dict[str, Any], list[str]]:
    """The params of a config.json of these tensors, and what keeps them from being those of a Mistral Large."""
    params, problems = params_from_hf_config(config)
    problems += _derive_head_dim(params, tensors)
    return params, problems + params_problems(params, names=TO_GEOMETRY)


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


def read_weights(folder: Path, layout: Layout) -> tuple[list[FileTensor], list[str]]:
    """All tensors of the files of weights, and what is wrong with the files, their number and their index.

    Names are those of the model alone, without what training has put around it, and buffers are left out.
    """
    stem = WEIGHTS_STEM[layout]
    names, problems = _weight_files(folder, stem)
    tensors: list[FileTensor] = []
    for name in names:
        if problem := file_problem(folder, name):
            problems.append(problem)
        else:
            of_file, file_problems = read_header(folder / name)
            tensors += of_file
            problems += file_problems
    index_name = f"{stem}.safetensors.index.json"
    if not problems and os.path.lexists(folder / index_name):
        problems = _index_problems(folder, index_name, tensors)
    tensors = [replace(tensor, name=unwrapped_name(tensor.name)) for tensor in tensors]
    return [tensor for tensor in tensors if layout != "hf" or not is_buffer(tensor.name)], problems


def _weight_files(folder: Path, stem: str) -> tuple[list[str], list[str]]:
    single = f"{stem}.safetensors"
    present = sorted(path.name for path in folder.iterdir() if re.fullmatch(rf"{stem}.*\.safetensors", path.name))
    if present == [single]:
        return present, []
    if not present:
        pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        hint = f", only {pickled[0]!r}: {NO_PICKLES}" if pickled else ""
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


def _index_problems(folder: Path, index_name: str, tensors: Iterable[FileTensor]) -> list[str]:
    """Where the index and the headers say different things; the headers are what is read."""
    index, problem = json_or_problem(folder, index_name)
    if problem is not None:
        return [problem]
    if not isinstance(weight_map := index.get("weight_map"), dict):
        return [f"{index_name} has no weight_map"]
    stored = {tensor.name: tensor.path.name for tensor in tensors}
    return [
        f"{index_name}: {shown(name)} is in {shown(weight_map.get(name))}, but stored in {shown(stored.get(name))}"
        for name in sorted({*stored, *weight_map})
        if weight_map.get(name) != stored.get(name)
    ]


def tensor_problems(
    tensors: Iterable[StoredTensor], entries: Iterable[ExpectedEntry], *, are_complete: bool
) -> list[str]:
    """Where tensors are not the expected ones; what is missing is said if all files could be read."""
    expected = {entry.name: entry for entry in entries}
    seen: set[str] = set()
    problems = []
    for tensor in tensors:
        if tensor.name in seen:
            problems.append(f"tensor {tensor.name!r} is there twice")
        elif tensor.name not in expected:
            problems.append(f"tensor {tensor.name!r} is extra: this geometry has none of that name")
        elif tensor.dtype not in expected[tensor.name].dtypes:
            dtypes = ", ".join(expected[tensor.name].dtypes)
            problems.append(f"tensor {tensor.name!r} has dtype {tensor.dtype}, must be one of {dtypes}")
        elif tensor.shape != expected[tensor.name].shape:
            needed = list(expected[tensor.name].shape)
            problems.append(f"tensor {tensor.name!r} has shape {list(tensor.shape)}, this geometry needs {needed}")
        seen.add(tensor.name)
    if are_complete:
        problems += [f"tensor {name!r} is missing" for name in expected if name not in seen]
    return problems


def dtype_problems(tensors: Iterable[TensorEntry]) -> list[str]:
    """What is wrong with weights of more than one dtype."""
    dtypes = sorted({tensor.dtype for tensor in tensors})
    if len(dtypes) <= 1:
        return []
    return [f"tensors of dtypes {', '.join(dtypes)}: a checkpoint has one; ask for a dtype to have them converted"]


def expected_entries(
    geometry: ModelSizes, layout: Layout, quantization: Quantization | None = None
) -> list[ExpectedEntry]:
    """All tensors that the files of a checkpoint of this layout must hold, in order."""
    entries: list[ExpectedEntry] = []
    for tensor in expected_tensors(geometry):
        name = getattr(tensor, layout)
        if quantization is not None and is_quantized(name):
            parts = quantized_entries(name, tensor.shape, *quantization)
            entries += [ExpectedEntry(part.name, part.shape, (part.dtype,)) for part in parts]
        else:
            entries.append(ExpectedEntry(name, tensor.shape, FLOATS))
    return entries


def load_headers(folder: Path, layout: Layout | None = None, *, may_mix_dtypes: bool = False) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: the reasons of `read_checkpoint`.
    """
    layout = layout or source_layout(folder)
    return read_checkpoint(folder, layout, needs_tokenizer=False, may_mix_dtypes=may_mix_dtypes, may_be_quantized=True)


def problem_lines(error: CheckpointError) -> list[str]:
    """The problems that an error lists, or the error itself if it lists none."""
    heading, *problems = str(error).splitlines()
    return [problem.strip() for problem in problems] or [heading]

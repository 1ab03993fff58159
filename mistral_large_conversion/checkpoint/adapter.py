"""LoRA adapters on disk: PEFT's folders, and the vendor's lora.safetensors in consolidated names.

PEFT has adapter_config.json and adapter_model.safetensors, with A [rank, columns] and B [rows, rank] of each linear
layer under HF names. The vendor has params.json, whose `lora` says rank and scaling, and lora.safetensors with the same
pairs under consolidated names; the rows of B of query and key are interleaved there, as those of the weights are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from mistral_large_conversion.checkpoint.adapter_config import (
    LET_PEFT_MERGE,
    config_problems,
    is_target,
    rank_and_scaling,
)
from mistral_large_conversion.checkpoint.adapter_folder import ADAPTER_WEIGHTS_NAME, FILES, require_adapter
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.layout import Layout
from mistral_large_conversion.checkpoint.names import expected_tensors
from mistral_large_conversion.checkpoint.params import PARAMS_NAME, geometry_from_params, params_problems
from mistral_large_conversion.checkpoint.read import refuse
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor, read_exactly, read_header
from mistral_large_conversion.checkpoint.source_files import (
    ADAPTER_CONFIG_NAME,
    LORA_NAME,
    file_problem,
    is_number,
    read_json_object,
    shown,
)
from mistral_large_conversion.errors import CheckpointError

PEFT_PREFIX = "base_model.model."
DOWN, UP = "lora_A.weight", "lora_B.weight"
LORA_DTYPES = ("F32", "F16", "BF16")
# The context length is no size of a weight, and params.json of the vendor leaves it out.
NOT_OF_WEIGHTS = ("max_position_embeddings",)
READ_BLOCK_BYTES = 2**20
# Parts of names in an adapter's file that are something else than LoRA of a linear layer.
OTHER_KINDS = {
    "lora_magnitude_vector": "is of DoRA",
    "lora_embedding_": "is LoRA of an embedding",
    ".bias": "is a bias",
    "norm": "is a norm that was trained whole",
}


@dataclass(frozen=True)
class LoraPair:
    """The LoRA of one linear layer: its weight grows by `scaling` * up @ down.

    down: A, [rank, columns of the weight].
    up: B, [rows of the weight, rank]; of query and key with `interleaved_head_dim`, in the consolidated order.
    """

    down: FileTensor
    up: FileTensor
    scaling: float
    interleaved_head_dim: int | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter whose settings and headers are sound.

    name: that of its folder or repository.
    layout: `hf` for PEFT, `consolidated` for the vendor's.
    geometry: that of its base.
    base: the checkpoint that it says it is for, or None.
    dropout: of its training.
    pairs: by the HF name of the weight, such as model.layers.0.self_attn.q_proj.weight.
    """

    folder: Path
    name: str
    layout: Layout
    geometry: Geometry
    base: str | None
    dropout: float
    pairs: dict[str, LoraPair]

    @cached_property
    def checksums(self) -> dict[str, str]:
        """The checksum of the whole content of each of its files."""
        return {name: _checksum(self.folder / name) for name in FILES[self.layout]}

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that occur, in order."""
        return tuple(sorted({pair.rank for pair in self.pairs.values()}))

    @property
    def scalings(self) -> tuple[float, ...]:
        """All scalings that occur, in order."""
        return tuple(sorted({pair.scaling for pair in self.pairs.values()}))

    @property
    def description(self) -> str:
        """Rank and number of layers, as people read them."""
        return f"rank {', '.join(map(str, self.ranks))}, {len(self.pairs)} linear layers"


def read_adapter(folder: Path, geometry: Geometry | None = None, *, name: str | None = None) -> Adapter:
    """Read the adapter in a folder from its settings and the header of its weights.

    geometry: that of the base. Only the vendor's format has one of its own; where both are there, they must agree.
    name: how the adapter was named, if not by its folder.

    Raises:
        CheckpointError: no adapter, or everything in it that is missing, extra, damaged, of another rank or shape, or
            that cannot be merged exactly, in one error.
    """
    folder = Path(folder)
    layout = require_adapter(folder)
    problems = [problem for file in FILES[layout] if (problem := file_problem(folder, file))]
    if layout == "hf" and (folder / "adapter_model.bin").exists() and not (folder / ADAPTER_WEIGHTS_NAME).exists():
        problems = [
            "only adapter_model.bin: pickles are not read; load the adapter with PEFT and save_pretrained() it again"
        ]
    settings: dict[str, Any] = {}
    if not problems:
        try:
            settings = read_json_object(folder / FILES[layout][0])
        except (OSError, ValueError) as error:
            problems.append(f"{FILES[layout][0]}: {error}")
    _refuse(problems, folder)
    read = _read_peft if layout == "hf" else _read_vendors
    return read(folder, settings, geometry, name or folder.resolve().name)


def _refuse(problems: list[str], folder: Path) -> None:
    refuse(problems, f"{folder} is not an adapter that can be read")


def check_shapes(folder: Path, geometry: Geometry) -> None:
    """Refuse an adapter of PEFT whose LoRA has other shapes than a base; what else it has is PEFT's to judge.

    Raises:
        CheckpointError: every tensor that does not fit.
    """
    if (folder / ADAPTER_WEIGHTS_NAME).exists():
        tensors, problems = read_header(folder / ADAPTER_WEIGHTS_NAME)
        stems = {f"{PEFT_PREFIX}{hf.removesuffix('.weight')}": shape for hf, shape, _, _ in linear_layers(geometry)}
        for tensor in tensors:
            # A has the columns of the weight, B its rows.
            for end, axis in ((f".{DOWN}", 1), (f".{UP}", 0)):
                shape = stems.get(tensor.name.removesuffix(end)) if tensor.name.endswith(end) else None
                if shape is not None and (len(tensor.shape) != 2 or tensor.shape[axis] != shape[axis]):
                    problems.append(
                        f"tensor {tensor.name!r} has shape {list(tensor.shape)}, the weight of the base {list(shape)}"
                    )
        _refuse(problems, folder)


def _read_peft(folder: Path, config: dict[str, Any], geometry: Geometry | None, name: str) -> Adapter:
    if geometry is None:
        raise CheckpointError(
            f"{folder}: an adapter of PEFT, which does not say the sizes of its base; give the folder of the base"
        )
    base = config.get("base_model_name_or_path")
    problems = [f"{ADAPTER_CONFIG_NAME}: {problem}" for problem in config_problems(config)]
    if base is not None and not isinstance(base, str):
        problems.append(f"{ADAPTER_CONFIG_NAME}: base_model_name_or_path is {shown(base)}: must be a text")
    _refuse(problems, folder)
    wanted: dict[str, _Wanted] = {}
    for hf, shape, layer, _ in linear_layers(geometry):
        module = hf.removesuffix(".weight")
        if is_target(config, module, layer):
            wanted[hf] = _Wanted(f"{PEFT_PREFIX}{module}", shape, *rank_and_scaling(config, module), None)
    pairs = _read_pairs(folder, ADAPTER_WEIGHTS_NAME, wanted)
    dropout = config.get("lora_dropout")
    return Adapter(folder, name, "hf", geometry, base, float(dropout) if is_number(dropout) else 0.0, pairs)


def _read_vendors(folder: Path, params: dict[str, Any], geometry: Geometry | None, name: str) -> Adapter:
    own, lora = split_params(folder, params)
    if geometry is not None:
        sizes = [field.name for field in fields(Geometry) if field.name not in NOT_OF_WEIGHTS]
        problems = [
            f"{PARAMS_NAME}: {size} is {getattr(own, size)}, the base has {getattr(geometry, size)}"
            for size in sizes
            if getattr(own, size) != getattr(geometry, size)
        ]
        _refuse(problems, folder)
    wanted = {
        hf: _Wanted(
            consolidated.removesuffix(".weight"), shape, lora["rank"], lora["scaling"], own.head_dim if rope else None
        )
        for hf, shape, layer, (consolidated, rope) in linear_layers(own)
        # The vendor's code puts LoRA on each linear layer but the last.
        if layer is not None
    }
    pairs = _read_pairs(folder, LORA_NAME, wanted)
    return Adapter(folder, name, "consolidated", own, None, float(lora.get("dropout", 0.0)), pairs)


def split_params(folder: Path, params: Mapping[str, Any]) -> tuple[Geometry, dict[str, Any]]:
    """Return the geometry and the settings of LoRA that the params.json of the vendor's adapter says.

    Raises:
        CheckpointError: everything that is wrong with them.
    """
    lora = params.get("lora")
    others = {key: value for key, value in params.items() if key != "lora"}
    problems = [f"{PARAMS_NAME}: {problem}" for problem in [*params_problems(others), *_lora_problems(lora)]]
    _refuse(problems, folder)
    assert isinstance(lora, dict)
    return geometry_from_params(others), {**lora, "scaling": float(lora["scaling"])}


def _lora_problems(lora: object) -> list[str]:
    if not isinstance(lora, dict):
        return [f"lora is {shown(lora)}: must be an object that says rank and scaling of {LORA_NAME}"]
    problems = []
    rank, scaling, dropout = lora.get("rank"), lora.get("scaling"), lora.get("dropout", 0.0)
    if type(rank) is not int or rank < 1:
        problems.append(f"lora.rank is {shown(rank)}: must be a whole number greater than 0")
    if not is_number(scaling) or scaling <= 0:
        problems.append(f"lora.scaling is {shown(scaling)}: must be a finite number greater than 0")
    if not is_number(dropout) or not 0 <= dropout <= 1:
        problems.append(f"lora.dropout is {shown(dropout)}: must be a number from 0 to 1")
    if lora.get("enable", True) is not True:
        problems.append(f"lora.enable is {shown(lora['enable'])}: the adapter is off; set it to true to have it read")
    known = ("rank", "scaling", "dropout", "enable")
    return problems + [f"lora has {shown(key)}: unknown, it may change the result" for key in lora if key not in known]


@dataclass(frozen=True)
class _Wanted:
    """The LoRA that a linear layer must have: the name of both tensors without their ends, rank and scaling."""

    stem: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    interleaved_head_dim: int | None


def linear_layers(geometry: Geometry) -> Iterable[tuple[str, tuple[int, ...], int | None, tuple[str, bool]]]:
    """Yield each linear layer: HF name of its weight, shape, layer (None for lm_head), consolidated name and whether
    its rows are rotary pairs."""
    for tensor in expected_tensors(geometry):
        if tensor.hf.endswith("_proj.weight"):
            yield tensor.hf, tensor.shape, int(tensor.hf.split(".")[2]), (tensor.consolidated, tensor.has_rope_pairs)
        elif tensor.hf == "lm_head.weight":
            yield tensor.hf, tensor.shape, None, (tensor.consolidated, False)


def _read_pairs(folder: Path, file: str, wanted: Mapping[str, _Wanted]) -> dict[str, LoraPair]:
    """Return the pairs of an adapter's file, which must be those that its settings say."""
    tensors, problems = read_header(folder / file)
    _refuse(problems, folder)
    stored = {tensor.name: tensor for tensor in tensors}
    expected = {f"{each.stem}.{end}" for each in wanted.values() for end in (DOWN, UP)}
    problems = [f"tensor {shown(name)} {_kind(name)}" for name in stored if name not in expected]
    problems += [f"tensor {name!r} is missing: the settings name its layer" for name in sorted(expected - {*stored})]
    for each in wanted.values():
        shapes = {DOWN: (each.rank, each.shape[1]), UP: (each.shape[0], each.rank)}
        for end, shape in shapes.items():
            tensor = stored.get(f"{each.stem}.{end}")
            if tensor is None:
                continue
            if tensor.dtype not in LORA_DTYPES:
                problems.append(
                    f"tensor {tensor.name!r} has dtype {tensor.dtype}, must be one of {', '.join(LORA_DTYPES)}"
                )
            if tensor.shape != shape:
                problems.append(
                    f"tensor {tensor.name!r} has shape {list(tensor.shape)}, rank {each.rank} of this geometry needs "
                    f"{list(shape)}"
                )
    if not wanted and not problems:
        problems.append(f"{ADAPTER_CONFIG_NAME}: target_modules name no linear layer of this model")
    _refuse(problems, folder)
    return {
        hf: LoraPair(
            stored[f"{each.stem}.{DOWN}"], stored[f"{each.stem}.{UP}"], each.scaling, each.interleaved_head_dim
        )
        for hf, each in wanted.items()
    }


def _kind(name: str) -> str:
    """What a tensor is that has no place in an adapter."""
    if name.endswith((DOWN, UP)):
        return "is extra: the settings name no such linear layer"
    kind = next((kind for part, kind in OTHER_KINDS.items() if part in name), "is a weight that was saved whole")
    return f"{kind}; {LET_PEFT_MERGE}"


def read_bytes(tensor: FileTensor) -> bytearray:
    """All bytes of a tensor of an adapter.

    Raises:
        CheckpointError: it cannot be read to its end.
    """
    data = bytearray(tensor.size)
    try:
        with tensor.open() as stream:
            read_exactly(stream, memoryview(data), tensor)
    except OSError as error:
        raise CheckpointError(f"tensor {tensor.name!r} cannot be read: {error}; fix that and run it again") from error
    return data


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as stream:
            while block := stream.read(READ_BLOCK_BYTES):
                checksum.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; fix that and run it again") from error
    return checksum.hexdigest()

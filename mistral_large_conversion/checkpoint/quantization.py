"""Quantized checkpoints in the formats of compressed-tensors: what a weight is in the file, and what config.json says.

The weights of the linear layers of the decoder are quantized, each rounded to the nearest or, of int4, by calibration;
embeddings, norms and head are BF16.

| | fp8, `float-quantized` | int4, `pack-quantized` | nvfp4, `nvfp4-pack-quantized` |
| --- | --- | --- | --- |
| codes | `weight` F8_E4M3 [out, in] | `weight_packed` I32 [out, in / 8] | `weight_packed` U8 [out, in / 2] |
| `weight_scale` | BF16 [out, 1] | BF16 [out, in / group] | F8_E4M3 [out, in / 16] |
| besides | | `weight_shape` I64 [2] | `weight_global_scale` F32 [1] |
| a weight is | code * scale | (code - 8) * scale | code * (scale / global scale) |
| activations | rounded to FP8 for each token | as they are | as they are |

The first code is in the lowest bits; codes of nvfp4 are FP4 (E2M1). Weights that engines fuse, see `fused_weights`,
have the same global scale: engines take one for all of them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from mistral_large_conversion.checkpoint.safetensors_header import BYTES_OF, TensorEntry
from mistral_large_conversion.errors import CheckpointError

Scheme = Literal["fp8", "int4", "nvfp4"]


class Quantization(NamedTuple):
    """How the weights of a checkpoint are quantized; `group_size` weights in a row share a scale, but in fp8."""

    scheme: Scheme
    group_size: int


QUANT_METHOD = "compressed-tensors"
FORMATS: dict[Scheme, str] = {"fp8": "float-quantized", "int4": "pack-quantized", "nvfp4": "nvfp4-pack-quantized"}

# What people are told of a checkpoint.
DESCRIPTIONS: dict[Scheme, str] = {
    "fp8": "to FP8 (E4M3) with one scale for each output channel, for activations in FP8",
    "int4": "to 4 bits with one scale for each group of {group_size} weights",
    "nvfp4": "to FP4 (E2M1) with one FP8 (E4M3) scale for each group of {group_size} weights",
}

# Weights in a row that share a scale. The smaller ones are for models that are too narrow for the first. fp8 has no
# groups, for which the first of int4 stands.
GROUP_SIZES: dict[Scheme, tuple[int, ...]] = {"fp8": (128,), "int4": (128, 64, 32), "nvfp4": (16,)}

GROUP_SIZE = GROUP_SIZES["int4"][0]

# Rows and columns that the kernels for FP8 need.
FP8_TILE = 16

# What holds several codes: a word of int4 and a byte of nvfp4.
CODES_PER_WORD = 8
CODES_PER_BYTE = 2

# Keys of a `quantization_config` that say how it came about, and what other keys may say without changing anything.
REMARKS = ("version", "global_compression_ratio", "observer", "observer_kwargs")

NOTHING: tuple[object, ...] = (None, False, {})

FLOAT8 = "torch.float8_e4m3fn"

MEANINGLESS = {"format": (None, *FORMATS.values()), "zp_dtype": (None, FLOAT8)}

QUANTIZED_NAME = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight")

PART_ENDINGS = ("_packed", "_global_scale", "_scale", "_shape")

# Linear layers with the same inputs, which engines multiply with at once.
FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

CANNOT_UNDO = (
    "its weights are quantized, and nothing brings back what rounding took away; take the checkpoint it was made of"
)


def is_quantized(name: str) -> bool:
    """Whether a tensor of this HF name is quantized: the weights of a decoder layer's linears."""
    return QUANTIZED_NAME.fullmatch(name) is not None


def is_part(name: str) -> bool:
    """Whether a tensor of a quantized checkpoint is what became of a quantized one."""
    ending = next((ending for ending in PART_ENDINGS if name.endswith(ending)), "")
    return is_quantized(name.removesuffix(ending))


def fused_weights(name: str) -> tuple[str, ...]:
    """The names of the weights, this one among them, that engines fuse into one layer."""
    prefix, layer, ending = name.rsplit(".", 2)
    layers = next((layers for layers in FUSED_LAYERS if layer in layers), (layer,))
    return tuple(f"{prefix}.{each}.{ending}" for each in layers)


def quantized_entries(
    name: str, shape: tuple[int, ...], scheme: Scheme, group_size: int | None = None
) -> tuple[TensorEntry, ...]:
    """What the weight `name` [out, in] becomes in the file.

    In memory it takes `run_time_bytes`, which differs: the scales are FP32 (fp8), or come with as many zeros (int4).
    """
    rows, columns = shape
    if scheme == "fp8":
        return _entry(name, "F8_E4M3", rows, columns), _entry(f"{name}_scale", "BF16", rows, 1)
    group_size = group_size or GROUP_SIZES[scheme][0]
    if scheme == "nvfp4":
        return (
            _entry(f"{name}_packed", "U8", rows, columns // CODES_PER_BYTE),
            _entry(f"{name}_scale", "F8_E4M3", rows, columns // group_size),
            _entry(f"{name}_global_scale", "F32", 1),
        )
    return (
        _entry(f"{name}_packed", "I32", rows, columns // CODES_PER_WORD),
        _entry(f"{name}_scale", "BF16", rows, columns // group_size),
        _entry(f"{name}_shape", "I64", 2),
    )


def _entry(name: str, dtype: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, dtype, shape, math.prod(shape) * BYTES_OF[dtype])


def choose_group_size(shapes: Iterable[tuple[int, ...]], scheme: Scheme) -> int:
    """How many weights share a scale in a checkpoint with quantized weights of these shapes; fp8 has no groups.

    Raises:
        CheckpointError: a geometry for which there are no kernels.
    """
    shapes = sorted(set(shapes))
    if scheme == "fp8":
        if odd := [size for shape in shapes for size in shape if size % FP8_TILE]:
            raise CheckpointError(
                f"a weight with a side of {odd[0]} has no FP8 kernel: it must be a multiple of {FP8_TILE}; leave "
                "--quantize out"
            )
        return GROUP_SIZE
    group_sizes = GROUP_SIZES[scheme]
    for group_size in group_sizes:
        if all(columns % group_size == 0 for _, columns in shapes):
            return group_size
    columns = next(columns for _, columns in shapes if columns % group_sizes[-1])
    way_out = "take fp8 or leave" if columns % FP8_TILE == 0 else "leave"
    raise CheckpointError(
        f"weights with rows of {columns} cannot be quantized to {scheme}: groups have "
        f"{', '.join(map(str, group_sizes))} weights; {way_out} --quantize out"
    )


def quantization_config(scheme: Scheme, group_size: int | None = None) -> dict[str, Any]:
    """The `quantization_config` of a config.json, as transformers and vLLM read it."""
    settings: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format": FORMATS[scheme],
        # Any other status makes the weights dequantized or wrong.
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": _scheme(scheme, group_size or GROUP_SIZES[scheme][0])},
    }
    if scheme == "fp8":
        # Without it, transformers' own classes dequantize all weights to BF16. Others do not know it.
        settings["use_optimized_inference"] = True
    return settings


def _scheme(scheme: Scheme, group_size: int) -> dict[str, Any]:
    if scheme == "fp8":
        numbers = {"num_bits": 8, "type": "float", "symmetric": True}
        return {
            "targets": ["Linear"],
            "weights": {**numbers, "strategy": "channel", "dynamic": False},
            "input_activations": {**numbers, "strategy": "token", "dynamic": True},
        }
    numbers = (
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "scale_dtype": FLOAT8}
        if scheme == "nvfp4"
        else {"num_bits": 4, "type": "int", "strategy": "group"}
    )
    return {
        "targets": ["Linear"],
        "weights": {**numbers, "symmetric": True, "group_size": group_size, "dynamic": False},
    }


def quantization_of(settings: object) -> Quantization | None:
    """The quantization that a `quantization_config` of ours says, or None for any other.

    What other programs add to it when they save it is let pass, unless it says something else.
    """
    if not isinstance(settings, Mapping):
        return None
    for scheme in FORMATS:
        for group_size in GROUP_SIZES[scheme]:
            if _says(settings, quantization_config(scheme, group_size), optional=("use_optimized_inference",)):
                return Quantization(scheme, group_size)
    return None


def foreign_quantization(settings: object) -> str:
    """What a `quantization_config` that is not ours means, and the way out."""
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    named = f"by {method}" if isinstance(method, str) and method else "by an unknown method"
    return (
        f"its weights are quantized {named}, which this package neither reads nor undoes; take the checkpoint it was "
        "made of, or load this one with transformers' own classes"
    )


def _says(settings: Mapping[str, Any], wanted: Mapping[str, Any], optional: tuple[str, ...] = ()) -> bool:
    """Whether all that is wanted is there, and nothing else but what is absent or without meaning."""
    for key, value in wanted.items():
        if isinstance(value, Mapping):
            if not isinstance(settings.get(key), Mapping) or not _says(settings[key], value):
                return False
        elif settings.get(key) != value and key not in optional:
            return False
    return all(key in (*wanted, *REMARKS) or settings[key] in MEANINGLESS.get(key, NOTHING) for key in settings)

"""params.json of the consolidated layout, and the geometry that it says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.source_files import (
    file_problem,
    is_number,
    is_one_of,
    read_json_object,
    shown,
)
from mistral_large_conversion.errors import CheckpointError

PARAMS_NAME = "params.json"

TO_GEOMETRY = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
# In the config it is inside of `rope_parameters`.
ROPE_THETA = "rope_theta"
KEYS = (*TO_GEOMETRY, ROPE_THETA)
OPTIONAL = ("max_position_embeddings",)
REAL_NUMBERS = ("norm_eps", ROPE_THETA)
# A hostile size must not make us list a billion layers before the files are looked at.
LARGEST_SIZE = {"n_layers": 10_000}
LARGEST_OTHER_SIZE = 2**31 - 1

# What 2407 does not have, and the one value that says so: another value would need a different model.
ABSENT = {
    "attention_bias": False,
    "attention_chunk_size": None,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "per_layer_config": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

TIED = (
    "; load it with transformers, give lm_head a copy of the embeddings, set config.tie_word_embeddings to False, and "
    "save it"
)

# Keys that other models of the vendor have. Only these values describe the architecture of Mistral Large.
FIXED: dict[str, tuple[object, ...]] = {
    "activation": (None, "silu"),
    "causal": (None, True),
    "llama_4_scaling": (None,),
    "lora": (None,),
    "model_type": (None, "transformer"),
    "moe": (None,),
    "multimodal": (None,),
    "quantization": (None,),
    "sliding_window": (None,),
    "tied_embeddings": (None, False),
    "use_biases": (None, False),
    "vision_encoder": (None,),
    "yarn": (None,),
}
# Limits of the program that runs the model, not of the model.
IGNORED = ("dtype", "max_batch_size", "max_seq_len")


def params_problems(params: Mapping[str, Any], *, names: Mapping[str, str] | None = None) -> list[str]:
    """What keeps params.json from describing a Mistral Large geometry; empty if nothing does.

    names: of the keys in the file that the params were read from, where it is another one: `TO_GEOMETRY` for a
        config.json.
    """
    named = {key: (names or {}).get(key, key) for key in KEYS}
    problems = []
    for key in KEYS:
        if key in params:
            problems += _number_problems(key, params[key], named[key])
        elif key not in OPTIONAL:
            problems.append(f"{named[key]} is missing")
    for key, value in params.items():
        if key in FIXED and not is_one_of(value, FIXED[key]):
            problems.append(f"{key} is {shown(value)}: only {FIXED[key][-1]!r} is this architecture")
        elif key not in (*KEYS, *FIXED, *IGNORED):
            problems.append(f"{shown(key)} is unknown: it may change the architecture")
    if not problems and params["n_heads"] % params["n_kv_heads"]:
        heads, kv_heads = (f"{named[key]} {params[key]}" for key in ("n_heads", "n_kv_heads"))
        problems.append(f"{heads} is not a multiple of {kv_heads}")
    if not problems and params["head_dim"] % 2:
        problems.append(f"head_dim {params['head_dim']} is odd: rope turns pairs")
    return problems


def _number_problems(key: str, value: object, name: str) -> list[str]:
    if key in REAL_NUMBERS:
        valid, rule = is_number(value) and value > 0, "a finite number greater than 0"
    else:
        largest = LARGEST_SIZE.get(key, LARGEST_OTHER_SIZE)
        valid = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
        rule = f"a whole number from 1 to {largest}"
    return [] if valid else [f"{name} is {shown(value)}: must be {rule}"]


def geometry_from_params(params: Mapping[str, Any], *, source: str = PARAMS_NAME) -> Geometry:
    """The geometry of a params.json; what the file may leave out has the value of 2407.

    source: what to call it in an error.

    Raises:
        CheckpointError: keys that are missing, unknown or wrong, all of them in one error.
    """
    if problems := params_problems(params):
        raise CheckpointError(
            f"{source}: not a Mistral Large geometry: {'; '.join(problems)}; no other architecture runs here; take the "
            "file that was published with the weights"
        )
    # A whole number is a real one too, in JSON.
    values: dict[str, Any] = {key: float(value) if key in REAL_NUMBERS else value for key, value in params.items()}
    sizes = {name: values[key] for key, name in TO_GEOMETRY.items() if key in values}
    return Geometry(**sizes, rope_theta=values[ROPE_THETA])


def read_params_file(folder: Path) -> Geometry:
    """The geometry that the params.json of a folder says.

    Raises:
        CheckpointError: a file that cannot be read, or another architecture.
    """
    if problem := file_problem(folder, PARAMS_NAME):
        raise CheckpointError(f"{folder}: {problem}; it holds the geometry of the weights, download it again")
    try:
        params = read_json_object(folder / PARAMS_NAME)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / PARAMS_NAME}: {error}; download it again") from error
    return geometry_from_params(params, source=str(folder / PARAMS_NAME))


def params_from_geometry(geometry: Geometry) -> dict[str, Any]:
    """The params.json of a geometry.

    `max_position_embeddings` is written although the vendor leaves it out, because engines assume less without it.
    """
    params = {key: getattr(geometry, name) for key, name in TO_GEOMETRY.items()}
    return {**params, ROPE_THETA: geometry.rope_theta}


def params_from_hf_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The params of a config.json, of ours or of transformers' Mistral, and what in it no params.json can say.

    What is absent there is absent here: defaults would be those of another geometry.
    """
    rope, problems = _rope_of(config)
    params = {key: config[name] for key, name in TO_GEOMETRY.items() if name in config}
    if params.get("head_dim", 0) is None:
        # For transformers, null is the same as an older file without it.
        del params["head_dim"]
    if ROPE_THETA in rope:
        params[ROPE_THETA] = rope[ROPE_THETA]
    allowed: dict[str, tuple[object, ...]] = {
        "model_type": ("mistral_large", "mistral"),
        "quantization_config": (None,),
        **{name: (None, value) for name, value in ABSENT.items()},
    }
    problems += [
        f"{name} is {shown(config.get(name))}: only {values[-1]!r} is this architecture"
        + (TIED if name == "tie_word_embeddings" else "")
        for name, values in allowed.items()
        if not is_one_of(config.get(name), values)
    ]
    return params, problems


def _rope_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of rope in a config.json under their names of today, and what is wrong with them.

    Older files have the base of rope at the top level, and its scaling under `rope_scaling`.
    """
    problems = []
    found: dict[str, Any] = {ROPE_THETA: config[ROPE_THETA]} if ROPE_THETA in config else {}
    for name in ("rope_scaling", "rope_parameters"):
        settings = config.get(name)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            problems.append(f"{name} is {shown(settings)}: must be an object")
            continue
        for key, value in settings.items():
            # The name of older files.
            own = "rope_type" if key == "type" else key
            if own in found and (isinstance(value, list | dict) or found[own] != value):
                problems.append(f"{own} is {shown(found[own])} and {shown(value)}: must be one")
            found[own] = value
    if (rope_type := found.get("rope_type", "default")) != "default":
        problems.append(f"rope_type is {shown(rope_type)}: only 'default' is this architecture")
    problems += [
        f"rope has {shown(key)} {shown(value)}: the default rope has only {ROPE_THETA}"
        for key, value in found.items()
        if key not in ("rope_type", ROPE_THETA) and value is not None and not problems
    ]
    return found, problems

"""params.json of the consolidated layout, and the config that says the same."""

import math
from collections.abc import Mapping
from typing import Any

from modeling_mistral_large.configuration_mistral_large import ABSENT, MistralLargeConfig
from modeling_mistral_large.errors import CheckpointError

PARAMS_NAME = "params.json"

TO_CONFIG = {
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
KEYS = (*TO_CONFIG, ROPE_THETA)
OPTIONAL = ("max_position_embeddings",)
REAL_NUMBERS = ("norm_eps", ROPE_THETA)
# A hostile size must not make us list a billion layers before the files are looked at.
LARGEST_SIZE = {"n_layers": 10_000}
LARGEST_OTHER_SIZE = 2**31 - 1

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


def params_findings(params: Mapping[str, Any]) -> list[str]:
    """What keeps params.json from describing a Mistral Large geometry; empty if nothing does."""
    findings = []
    for key in KEYS:
        if key in params:
            findings += _number_findings(key, params[key])
        elif key not in OPTIONAL:
            findings.append(f"{key} is missing")
    for key, value in params.items():
        if key in FIXED and repr(value) not in map(repr, FIXED[key]):
            findings.append(f"{key} is {value!r}: only {FIXED[key][-1]!r} is this architecture")
        elif key not in (*KEYS, *FIXED, *IGNORED):
            findings.append(f"{key!r} is unknown: it may change the architecture")
    if not findings and params["n_heads"] % params["n_kv_heads"]:
        findings.append(f"n_heads {params['n_heads']} is not a multiple of n_kv_heads {params['n_kv_heads']}")
    if not findings and params["head_dim"] % 2:
        findings.append(f"head_dim {params['head_dim']} is odd: rope turns pairs")
    return findings


def _number_findings(key: str, value: object) -> list[str]:
    if key in REAL_NUMBERS:
        valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        return [] if valid else [f"{key} is {value!r}: must be a finite number greater than 0"]
    largest = LARGEST_SIZE.get(key, LARGEST_OTHER_SIZE)
    valid = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
    return [] if valid else [f"{key} is {value!r}: must be a whole number from 1 to {largest}"]


def config_from_params(params: Mapping[str, Any]) -> MistralLargeConfig:
    """The config of a params.json; what the file does not say has the defaults, which are those of 2407.

    Raises:
        CheckpointError: keys that are missing, unknown or wrong, all of them in one error.
    """
    if findings := params_findings(params):
        raise CheckpointError(f"{PARAMS_NAME} is not a Mistral Large geometry: {'; '.join(findings)}")
    sizes = {config_key: params[key] for key, config_key in TO_CONFIG.items() if key in params}
    return MistralLargeConfig(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": float(params[ROPE_THETA])}
    )


def params_from_config(config: MistralLargeConfig) -> dict[str, Any]:
    """The params.json of a config.

    `max_position_embeddings` is written although the vendor leaves it out, because engines assume less without it.
    """
    assert config.rope_parameters is not None
    params = {key: getattr(config, config_key) for key, config_key in TO_CONFIG.items()}
    return {**params, ROPE_THETA: config.rope_parameters["rope_theta"]}


def params_from_hf_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The params of a config.json, of ours or of transformers' Mistral, and what in it no params.json can say.

    What is absent there is absent here: defaults would be those of another geometry.
    """
    # Older files have the settings of rope at the top level, and its scaling apart.
    rope = config.get("rope_parameters") or {**config, **(config.get("rope_scaling") or {})}
    params = {key: config[name] for key, name in TO_CONFIG.items() if name in config}
    if ROPE_THETA in rope:
        params[ROPE_THETA] = rope[ROPE_THETA]
    allowed: dict[str, tuple[object, ...]] = {
        "model_type": ("mistral_large", "mistral"),
        "quantization_config": (None,),
        **{name: (None, value) for name, value in ABSENT.items()},
    }
    findings = [
        f"{name} is {config.get(name)!r}: only {values[-1]!r} is this architecture"
        for name, values in allowed.items()
        if repr(config.get(name)) not in map(repr, values)
    ]
    if (rope_type := rope.get("rope_type", "default")) != "default":
        findings.append(f"rope_type is {rope_type!r}: only 'default' is this architecture")
    return params, findings

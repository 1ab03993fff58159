"""What an adapter_config.json of PEFT says of a LoRA, and what in it keeps the adapter from being merged exactly."""

import math
import re
from collections.abc import Mapping
from typing import Any

from mistral_large_conversion.checkpoint.source_files import is_number, is_one_of, shown

# Settings of training, and notes: they change nothing of a trained adapter.
WITHOUT_EFFECT = (
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "ephemeral_gpu_offload",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# What is read here. Anything else must be off: it is another computation, or unknown.
READ = (
    "alpha_pattern",
    "base_model_name_or_path",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
)
# All others also change the weights of the base, to which the adapter then belongs.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
OFF: tuple[object, ...] = (None, False, "none", [], {})
ALL_LINEAR = "all-linear"
# What to do with a sound adapter that is not merged here.
LET_PEFT_MERGE = "merge it with PEFT's merge_and_unload() and convert what that returns"


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what keeps a config from being that of a LoRA of linear layers which merges exactly."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {shown(config.get('peft_type'))}: only 'LORA' is read; {LET_PEFT_MERGE}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_rank(rank):
        problems.append(f"r is {shown(rank)}: must be a whole number greater than 0")
    if not is_number(alpha):
        problems.append(f"lora_alpha is {shown(alpha)}: must be a finite number")
    if config.get("use_rslora") not in (None, False, True):
        problems.append(f"use_rslora is {shown(config['use_rslora'])}: must be true or false")
    for name, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", is_number)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
            problems.append(f"{name} is {shown(pattern)}: must be an object of numbers")
        else:
            problems += [problem for key in pattern for problem in _pattern_problems(name, key)]
    for name in ("target_modules", "exclude_modules"):
        problems += _module_problems(name, config.get(name))
    layers = config.get("layers_to_transform")
    if layers is not None and not (type(layers) is int or _is_list_of(layers, int)):
        problems.append(f"layers_to_transform is {shown(layers)}: must be a layer or a list of layers")
    if (pattern := config.get("layers_pattern")) not in (*OFF, "layers", ["layers"]):
        problems.append(f"layers_pattern is {shown(pattern)}: only 'layers' names those of this model")
    kind = config.get("init_lora_weights")
    if not is_one_of(kind, INITIALIZATIONS):
        problems.append(
            f"init_lora_weights is {shown(kind)}: it has changed the weights of the base, too; save the adapter with "
            f"path_initial_model_for_weight_conversion; or {LET_PEFT_MERGE}"
        )
    problems += [
        f"{name} is {shown(value)}: only an adapter without it is read; {LET_PEFT_MERGE}"
        for name, value in config.items()
        if name not in (*READ, *WITHOUT_EFFECT) and not is_one_of(value, OFF)
    ]
    return problems


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _pattern_problems(name: str, pattern: object) -> list[str]:
    try:
        re.compile(str(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{name} has {shown(pattern)}: not a regular expression: {error}"]
    return []


def _module_problems(name: str, modules: object) -> list[str]:
    if isinstance(modules, str):
        return _pattern_problems(name, modules)
    if _is_list_of(modules, str) or (name == "exclude_modules" and modules is None):
        return []
    return [f"{name} is {shown(modules)}: must be a list of names or a regular expression"]


def is_target(config: Mapping[str, Any], module: str, layer: int | None) -> bool:
    """Whether a config without problems puts LoRA on a module: PEFT's rules.

    layer: that of the module, None outside of the layers.
    """
    excluded = config.get("exclude_modules") or []
    if re.fullmatch(excluded, module) if isinstance(excluded, str) else _is_named(module, excluded):
        return False
    targets = config["target_modules"]
    if targets == ALL_LINEAR:
        return layer is not None
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return _is_named(module, targets)
    return (
        _is_named(module, targets)
        and layer is not None
        and (layer == layers if type(layers) is int else layer in layers)
    )


def _is_named(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return the rank of a module's LoRA, and what its product is multiplied by: PEFT's rules."""
    rank = _of_pattern(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank that a config has.

    Raises:
        ValueError: it is not that of a LoRA that is read.
    """
    if problems := config_problems(config):
        raise ValueError("; ".join(problems))
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

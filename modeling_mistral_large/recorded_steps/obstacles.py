"""Whether the steps of a model can be recorded, and the switch that keeps them from it."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import nn

from mistral_large_conversion.checkpoint.quantization import FUSED_LAYERS
from modeling_mistral_large.inference.chunked_prefill import ChunkedPrefillGenerationMixin
from modeling_mistral_large.quantization import gpu_int4
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear
from modeling_mistral_large.transformers_api.keywords import attention_implementation
from modeling_mistral_large.transformers_api.models import has_foreign_hooks, is_sharded

# Set to 0, it turns recorded steps off for the process.
SWITCH = "MISTRAL_LARGE_USE_CUDA_GRAPH"
# Modules whose arithmetic a step repeats; a class from elsewhere may compute something else.
KNOWN_MODULES = ("modeling_mistral_large.", "torch.nn.modules.")
# Attention that computes what a step does; flash attention has several versions.
KNOWN_ATTENTION = ("sdpa", "eager", "flash_attention", "flex_attention")

logger = logging.getLogger("modeling_mistral_large")


@cache
def log_once(reason: str) -> None:
    """Say at debug level why decoding is not recorded, the first time."""
    logger.debug("decoding without recorded steps: %s", reason)


def is_switched_off(model: nn.Module) -> bool:
    """Whether the environment or `model.use_cuda_graph` says that nothing shall be recorded."""
    return os.environ.get(SWITCH) == "0" or not getattr(model, "use_cuda_graph", True)


def obstacle_to_recording(model: nn.Module) -> str | None:
    """Why the steps of a model cannot be recorded, or None."""
    if not isinstance(model, ChunkedPrefillGenerationMixin):
        return f"{type(model).__name__} is not MistralLargeForCausalLM"
    return _obstacle_of_device(model) or _obstacle_of_settings(model) or _obstacle_of_modules(model)


def _obstacle_of_device(model: Any) -> str | None:
    device = next(model.parameters()).device
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the model lies on the CPU"
    if model.training:
        return "the model is in training mode"
    if is_sharded(model) or any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return "the weights are sharded, or of a special tensor type"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model lies on several devices: {', '.join(sorted(map(str, devices)))}"
    if device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return f"no kernels for {device}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 or higher"
    if not gpu_int4.HAS_TRITON:
        return "Triton is not installed"
    return None


def _obstacle_of_settings(model: Any) -> str | None:
    embeddings, config = model.get_input_embeddings().weight, model.config
    if embeddings.dtype != torch.bfloat16:
        return f"the model is in {str(embeddings.dtype).removeprefix('torch.')}, not in bfloat16"
    if config.num_hidden_layers != len(model.get_submodule("model.layers")._modules):
        return f"only {config.num_hidden_layers} of the layers are run"
    if not attention_implementation(config).startswith(KNOWN_ATTENTION):
        return f"attention is {attention_implementation(config)}"
    if config.head_dim < 16 or config.head_dim & (config.head_dim - 1):
        return f"head_dim {config.head_dim} is not a power of two of at least 16"
    return None


def _obstacle_of_modules(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        # Hooks of the model itself run: a step is recorded inside of its forward.
        if hasattr(module, "_hf_hook") or (name and has_foreign_hooks(module)):
            return f"{name or 'the model'} has hooks, which a recorded step would skip"
        if "forward" in vars(module) or module._compiled_call_impl is not None:
            return f"{name or 'the model'} has a forward of its own, or a compiled one"
        is_plain = type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.bias is None
        is_quantized = type(module) in (Fp8Linear, Int4Linear)
        if name.endswith(("_proj", "lm_head")) and not (is_plain or is_quantized):
            return f"{name} is {type(module).__name__}, not a BF16, FP8 or int4 linear layer without bias"
        if not type(module).__module__.startswith(KNOWN_MODULES):
            return f"{name or 'the model'} is {type(module).__name__}, whose forward may be another"
        if isinstance(module, Int4Linear) and module.group_size not in gpu_int4.GROUP_SIZES:
            return f"{name} has int4 groups of {module.group_size}, not of 64 or 128"
    for name, module in model.named_modules():
        for names in FUSED_LAYERS:
            inner = [module._modules.get(each) for each in names]
            if len({(type(each), getattr(each, "group_size", None)) for each in inner}) > 1:
                return f"{', '.join(names)} of {name} are not quantized alike"
    return None

"""Small models with random weights of every kind, whose steps can be recorded."""

from typing import Any

import torch

from mistral_large_conversion.checkpoint.quantization import Scheme
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear, QuantizedLinear
from modeling_mistral_large.quantization.loading import quantize_modules_, use_kernels_

CONFIG = MistralLargeConfig(
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_hidden_layers=2,
    vocab_size=400,
    max_position_embeddings=512,
)


def random_model(device: str, weights: str, config: MistralLargeConfig = CONFIG) -> Any:
    """A model in BF16, or with quantized layers, with random weights and norms."""
    model: Any = MistralLargeForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    if weights != "bf16":
        quantization: Scheme = "fp8" if weights == "fp8" else "int4"
        quantize_modules_(model, quantization, 64)
        for module in model.modules():
            if isinstance(module, Fp8Linear):
                module.weight.copy_(torch.randn(module.weight.shape))
                module.weight_scale.copy_(torch.rand(module.weight_scale.shape) * 0.2 + 0.05)
            elif isinstance(module, Int4Linear):
                module.weight_packed.random_(-(2**31), 2**31 - 1)
                module.weight_scale.copy_(torch.rand(module.weight_scale.shape) * 0.05 + 0.01)
    use_kernels_(model)
    return model.to(device).eval()


def dense_model(model: Any) -> Any:
    """The same weights in float32, dequantized."""
    dense: Any = MistralLargeForCausalLM._from_config(model.config, dtype=torch.float32, attn_implementation="eager")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(("_packed", "_scale"))}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = torch.cat(list(module.dequantized_rows(torch.float32)))
            state[f"{name}.weight"] = weight * module.weight_scale if isinstance(module, Fp8Linear) else weight
    dense.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return dense.to(model.device).eval()

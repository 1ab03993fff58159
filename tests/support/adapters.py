"""LoRA adapters with random values: PEFT's own, and the vendor's, written without the package's help."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from tests.support.checkpoints import params_of


def save_peft_adapter(base: Path, folder: Path, *, dtype: torch.dtype | None = None, **settings: Any) -> None:
    """Save an adapter of PEFT for a checkpoint, with random A and B.

    dtype: of A and B; without it PEFT's, float32.
    settings: of LoraConfig.
    """
    model: Any = MistralLargeForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **wanted)
    adapted: Any = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(folder)


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict that PEFT makes of a checkpoint, loaded in this dtype, and an adapter."""
    model: Any = MistralLargeForCausalLM.from_pretrained(base, dtype=dtype)
    merged: Any = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    weights: dict[str, Tensor] = merged.state_dict()
    return weights


def write_vendors_adapter(
    folder: Path,
    config: MistralLargeConfig,
    *,
    rank: int = 4,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Write what the vendor's fine-tuning code saves of LoRA alone, and return its tensors."""
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "attention.wq": (query, hidden),
        "attention.wk": (key, hidden),
        "attention.wv": (key, hidden),
        "attention.wo": (hidden, query),
        "feed_forward.w1": (inner, hidden),
        "feed_forward.w2": (hidden, inner),
        "feed_forward.w3": (inner, hidden),
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            tensors[f"layers.{layer}.{name}.lora_A.weight"] = (0.3 * torch.randn(rank, columns)).to(dtype)
            tensors[f"layers.{layer}.{name}.lora_B.weight"] = (0.3 * torch.randn(rows, rank)).to(dtype)
    folder.mkdir(parents=True)
    lora = {"enable": True, "rank": rank, "dropout": 0.1, "scaling": scaling}
    (folder / "params.json").write_text(json.dumps({**params_of(config), "lora": lora, "moe": None}, indent=4))
    save_file(tensors, folder / "lora.safetensors")
    return tensors

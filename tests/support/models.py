"""Models with random weights for the tests: ours, and transformers' Mistral with the same weights.

They are typed as Any, because transformers types its models in part only.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM

ATTENTION = ["eager", "sdpa"]
PAD = 384
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def stock_config(config: MistralLargeConfig) -> MistralConfig:
    """transformers' own configuration of the same geometry."""
    own = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        own.pop(name, None)
    return MistralConfig(**own, sliding_window=None)


def randomize(model: torch.nn.Module) -> None:
    """Random weights everywhere, the norms included: initial ones and zeros would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)


def stock_and_ours(config: MistralLargeConfig, attention: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    stock = MistralForCausalLM._from_config(stock_config(config), attn_implementation=attention, dtype=dtype).eval()
    randomize(stock)
    ours = MistralLargeForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def ours_only(config: MistralLargeConfig, attention: str = "sdpa") -> Any:
    model: Any = MistralLargeForCausalLM._from_config(config, attn_implementation=attention)
    randomize(model)
    return model.eval()


def random_ids(config: MistralLargeConfig, batch: int, positions: int) -> Tensor:
    ids = torch.randint(3, config.vocab_size, (batch, positions))
    return ids.where(ids != PAD, 3)


def left_padded(config: MistralLargeConfig, lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = random_ids(config, len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = PAD
        mask[row, : max(lengths) - length] = 0
    return ids, mask

"""The static cache of recorded steps, as transformers sees a cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mistral_large_conversion.errors import SettingError
from modeling_mistral_large.inference.static_cache import Fp8States, States, write
from modeling_mistral_large.recorded_steps.decoding import MOST_ROWS, RecordedDecoding
from modeling_mistral_large.recorded_steps.obstacles import log_once
from modeling_mistral_large.transformers_api.keywords import cache_argument

# cuDNN's attention plans every new length anew, and a prompt's chunks each have one.
PROMPT_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Tokens of one sequence that are read by steps, several in turn; more are read faster as a prompt.
MOST_TOKENS = 2 * MOST_ROWS


class RecordedLayer(DynamicLayer):
    """One layer of the cache; keys and values [batch, kv_heads, tokens, head_dim] are views of the filled slots."""

    def __init__(self, decoding: RecordedDecoding, number: int) -> None:
        # Not that of the base class, which sets keys and values.
        self.decoding, self.number = decoding, number
        self.is_last = number == len(decoding.layers) - 1
        self.is_initialized = True
        self.dtype, self.device = torch.bfloat16, decoding.device

    @property
    def keys(self) -> Tensor:  # type: ignore[override]  # transformers has an attribute here
        return self._filled(self.decoding.layers[self.number].keys)

    @property
    def values(self) -> Tensor:  # type: ignore[override]  # transformers has an attribute here
        return self._filled(self.decoding.layers[self.number].values)

    def _filled(self, states: States) -> Tensor:
        # Of FP8 the codes, as transformers looks at shapes only.
        codes = states.codes if isinstance(states, Fp8States) else states
        return codes[:, :, : self.decoding.filled]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, tokens, head_dim] and return those of all tokens.

        Raises SettingError for another batch size, and for states that want a gradient.
        """
        decoding = self.decoding
        batch, _, tokens, _ = key_states.shape
        if batch != decoding.batch:
            raise SettingError(
                f"{batch} sequences: this RecordedCache is for {decoding.batch}; make one for {batch}, or pass none"
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise SettingError("a RecordedCache carries no gradient; run the model under torch.no_grad()")
        start = decoding.filled
        decoding.reserve(start + tokens)
        layer = decoding.layers[self.number]
        seen = write(layer.keys, start, key_states), write(layer.values, start, value_states)
        # Whatever breaks off a forward, all layers hold the same tokens.
        if self.is_last:
            decoding.filled = start + tokens
        return seen

    def get_seq_length(self) -> int:
        """The number of tokens in the cache."""
        return self.decoding.filled

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens off, given as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number")
        if self.is_last:
            self.decoding.filled = max(0, self.decoding.filled + tokens_to_remove)

    def reset(self) -> None:
        """Empty the cache and keep its memory."""
        if self.is_last:
            self.decoding.filled = 0

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise SettingError(
            "the sequences of a RecordedCache are fixed: no beams, and nothing that repeats or selects sequences; pass "
            "another cache, or none"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


class RecordedCache(Cache):
    """A cache whose decoding steps are recorded. `generate` makes one by itself; pass one to go on from it later.

        cache = RecordedCache(record_decoding(model, context_length=32768))
        model.generate(**prompt, past_key_values=cache)

    It grows as it must, and its memory is free once nobody holds it. `crop` and `reset` work as those of a
    `DynamicCache`, and `copy.deepcopy` copies it.
    """

    # For those below that plan by the cost of a step.
    is_recorded = True

    def __init__(self, decoding: RecordedDecoding) -> None:
        super().__init__(layers=[RecordedLayer(decoding, number) for number in range(len(decoding.layers))])
        self.decoding = decoding
        # Why the model reads tokens itself, if `generate` has found a reason.
        self.obstacle: str | None = None
        decoding.holder = weakref.ref(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedCache:
        return RecordedCache(self.decoding.clone())

    def step(
        self,
        model: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        **options: Any,
    ) -> Tensor | None:
        """Read the next tokens by recorded steps and return their logits [batch, tokens, vocab]; None if it cannot.

        It can where the result is that of the model's forward: a token of each sequence, or a few of a single one,
        after a prompt, left-padded or not, at successive positions.
        """
        decoding = self.decoding
        batch, tokens = (0, 0) if input_ids is None else input_ids.shape
        is_few = tokens == 1 or (batch == 1 and 1 < tokens <= MOST_TOKENS)
        if input_ids is None or inputs_embeds is not None:
            return None
        if batch != decoding.batch or not is_few or not decoding.filled:
            return None
        reason = self.obstacle
        outputs = ("output_attentions", "output_hidden_states")
        if not decoding.is_of(model):
            reason = "the cache is another model's"
        elif model.training:
            reason = "the model is in training mode"
        elif any(options.get(name, getattr(model.config, name)) for name in outputs):
            reason = "attentions or hidden states are asked for"
        elif torch.is_grad_enabled():
            reason = "gradients are on"
        elif torch.is_autocast_enabled(decoding.device.type):
            reason = "autocast is on"
        elif not _is_successive(decoding.filled, tokens, attention_mask, position_ids):
            reason = "the mask is not that of left padding, or positions are not successive"
        if reason is not None:
            log_once(reason)
            return None
        starts = None if attention_mask is None else (attention_mask == 0).sum(-1).to(decoding.starts.device)
        input_ids = input_ids.to(decoding.device)
        return torch.cat([decoding.decode(ids, starts) for ids in input_ids.split(MOST_ROWS, dim=-1)], dim=1)


def by_recorded_steps(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have the `forward` of a causal model read the next tokens by the steps of its `RecordedCache`, where it can."""

    @wraps(forward)
    def stepping_forward(
        model: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        read = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache)
        if not isinstance(past_key_values, RecordedCache):
            return forward(model, *read, logits_to_keep, **kwargs)
        if labels is None and use_cache is not False:
            logits = past_key_values.step(model, input_ids, inputs_embeds, attention_mask, position_ids, **kwargs)
            if logits is not None:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                return CausalLMOutputWithPast(logits=logits[:, kept], **cache_argument(past_key_values))
        # Its attention plans nothing for each length.
        with sdpa_kernel(PROMPT_ATTENTION):
            return forward(model, *read, logits_to_keep, **kwargs)

    return stepping_forward


def _is_successive(filled: int, tokens: int, mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether a mask hides padding on the left only, and positions count what it does not hide."""
    if mask is not None and (getattr(mask, "ndim", 0) != 2 or mask.shape[-1] != filled + tokens):
        return False
    if position_ids is None:
        # The model then counts the padding, too.
        return mask is None or bool(mask.all())
    positions = torch.arange(filled, filled + tokens, device=position_ids.device)[None]
    if mask is None:
        return bool((position_ids == positions).all())
    is_left_padded = (mask.diff(dim=-1) >= 0).all() & mask[:, -tokens:].all()
    padding = (mask == 0).sum(-1, keepdim=True)
    return bool(is_left_padded & (position_ids == positions - padding).all())

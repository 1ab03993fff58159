"""The Mistral Large decoder on transformers' primitives.

Shapes are [batch, tokens, features]; `heads / kv_heads` query heads share one key-value head. Names are Mistral's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.hub_kernels import use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.inference.attention import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from modeling_mistral_large.loading import LoadableModel
from modeling_mistral_large.recorded_steps.automatic import RecordedGenerationMixin
from modeling_mistral_large.recorded_steps.cache import by_recorded_steps
from modeling_mistral_large.transformers_api.keywords import (
    attention_implementation,
    cache_argument,
    cache_in,
    cache_update_options,
    layer_forward,
    model_forward,
)
from modeling_mistral_large.transformers_api.models import HeadedModel, records


@use_kernel_forward_from_hub("RMSNorm")
class MistralLargeRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MistralLargeRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, `position * theta ** (-2 i / head_dim)`."""

    inv_freq: Tensor

    def __init__(self, config: MistralLargeConfig) -> None:
        super().__init__()
        self.config = config
        # transformers recomputes non-persistent buffers by these names when it loads from the meta device.
        self.rope_type = "default"
        inv_freq, self.attention_scaling = self.compute_default_rope_parameters(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MistralLargeConfig, *_: Any, **__: Any) -> tuple[Tensor, float]:
        """Inverse frequencies [head_dim / 2] and the attention scaling, which the default rope does not have."""
        assert config.rope_parameters is not None
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # Bare multiplication, so that autocast cannot round the angles of far positions.
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)  # [batch, tokens, head_dim]
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim / 2}) of [batch, heads, tokens, head_dim] by the angle of its position."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class MistralLargeAttention(nn.Module):
    """Grouped-query attention with rotary positions, without biases."""

    def __init__(self, config: MistralLargeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        # Read by transformers' attention functions.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    @layer_forward
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_tokens = hidden_states.shape[:-1]
        # The number of heads is left open: a tensor-parallel rank holds only its shard of them.
        by_head = (*batch_tokens, -1, self.head_dim)
        cos, sin = (angles.unsqueeze(1) for angles in position_embeddings)  # [batch, 1, tokens, head_dim]

        query = rotate(self.q_proj(hidden_states).view(by_head).transpose(1, 2), cos, sin)
        key = rotate(self.k_proj(hidden_states).view(by_head).transpose(1, 2), cos, sin)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, **cache_update_options(kwargs))
        implementation = attention_implementation(self.config)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(attended.reshape(*batch_tokens, -1).contiguous()), weights


class MistralLargeMLP(nn.Module):
    """Feed-forward block gated by SiLU."""

    def __init__(self, config: MistralLargeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gated = nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(gated)  # type: ignore[no-any-return]  # a module call is Any


class MistralLargeDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each on the normed stream and added back to it."""

    def __init__(self, config: MistralLargeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MistralLargeAttention(config, layer_idx)
        self.mlp = MistralLargeMLP(config)
        self.input_layernorm = MistralLargeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MistralLargeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        fed_forward: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + fed_forward


@records(hidden_states=MistralLargeDecoderLayer, attentions=MistralLargeAttention)
class MistralLargePreTrainedModel(LoadableModel):
    """What all Mistral Large models share."""

    config: MistralLargeConfig
    config_class = MistralLargeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True


class MistralLargeModel(MistralLargePreTrainedModel):
    """The decoder without a head: token ids or embeddings to the normed last hidden state."""

    def __init__(self, config: MistralLargeConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MistralLargeDecoderLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = MistralLargeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MistralLargeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @model_forward
    @merge_with_config_defaults  # type: ignore[untyped-decorator]  # transformers does not type it
    @capture_outputs  # type: ignore[untyped-decorator]  # transformers does not type it
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        `input_ids` are [batch, tokens] or `inputs_embeds` [batch, tokens, hidden_size], exactly one of them;
        `attention_mask` is [batch, cached + tokens], 0 where padded. Raises ValueError for none or both inputs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MistralLargeModel.forward: pass exactly one of input_ids and inputs_embeds")
        hidden_states: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0) + cached

        shared = {"position_ids": position_ids, **cache_argument(past_key_values)}
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask, **shared
        )
        rotary = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states, attention_mask=mask, position_embeddings=rotary, use_cache=use_cache, **shared, **kwargs
            )
        filled = cache_argument(past_key_values if use_cache else None)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **filled)


class MistralLargeForCausalLM(  # type: ignore[misc]  # transformers types plans of lists, and its own are tuples
    HeadedModel, MistralLargePreTrainedModel, RecordedGenerationMixin
):
    """The decoder with the output matrix that turns hidden states into logits over the vocabulary."""

    def __init__(self, config: MistralLargeConfig) -> None:
        super().__init__(config)
        self.model = MistralLargeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @model_forward
    @can_return_tuple  # type: ignore[untyped-decorator]  # transformers does not type it
    @by_recorded_steps
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the decoder and the head; with `labels` [batch, tokens] (-100 is ignored) also the mean loss in nats.

        `logits_to_keep`: how many of the last tokens get logits (0: all, 8.6 GB at 131072 tokens), or their indices.
        """
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        options = {"position_ids": position_ids, "use_cache": use_cache, **cache_argument(past_key_values)}
        outputs = self.model(**inputs, **options, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **cache_argument(cache_in(outputs)), **recorded)


class MistralLargeForSequenceClassification(GenericForSequenceClassification, MistralLargePreTrainedModel):
    """The decoder with one score a label, read at each sequence's last token."""

    forward = model_forward(GenericForSequenceClassification.forward)


class MistralLargeForTokenClassification(GenericForTokenClassification, MistralLargePreTrainedModel):
    """The decoder with one score a label at every token."""

    forward = model_forward(GenericForTokenClassification.forward)


class MistralLargeForQuestionAnswering(GenericForQuestionAnswering, MistralLargePreTrainedModel):
    """The decoder with a start and an end score at every token."""

    forward = model_forward(GenericForQuestionAnswering.forward)


__all__ = [
    "MistralLargeForCausalLM",
    "MistralLargeForQuestionAnswering",
    "MistralLargeForSequenceClassification",
    "MistralLargeForTokenClassification",
    "MistralLargeModel",
    "MistralLargePreTrainedModel",
]

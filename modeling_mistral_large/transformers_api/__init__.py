"""What this package takes from transformers beyond its public interface, and what differs between its versions.

Supported are 5.17 to 5.24. Nothing outside of this package tests a version or names an underscore of transformers, see
tests/modeling/test_transformers_api.py. Each entry says what breaks when transformers changes it.

| hook | when it changes |
| --- | --- |
| name of the cache (`CACHE_NAME`) | decoding starts each step without what came before: noise after the first token |
| `kwargs=` of a paged cache's `update` | continuous batching fails with a TypeError |
| `PagedAttentionArgs` | continuous batching is refused: unknown keyword |
| `TransformersKwargs`, signatures of attention and loss functions | an option is refused, or swallowed |
| `_prefill`, `_mask_length` | long prompts are read at once: memory grows with the square of their length |
| class attributes of `HostedModel`, `HeadedModel`, `records` | see there |
| `QuantizerHook`, `LocalShards`, `_tp_size` | quantized checkpoints do not load, or are saved wrong: see there |
| hooks of the tokenizer | see `TokenizerHook` |
| `_attn_implementation` | the attention chosen by the user is not the one that runs |
| `_LazyModule` | tools that look for our classes in `transformers` find none: see `export_names` |
| `PreTrainedConfig.get_config_dict` | the Auto classes read no consolidated folder: see `read_config_dict_with` |
"""

from modeling_mistral_large.transformers_api.keywords import (
    CACHE_NAME,
    CACHE_NAMES,
    KNOWN_KEYWORDS,
    attention_implementation,
    cache_argument,
    cache_in,
    cache_update_options,
    layer_forward,
    model_forward,
    refuse_unknown_options,
)
from modeling_mistral_large.transformers_api.models import (
    HeadedModel,
    HostedModel,
    LocalShards,
    PrefillHook,
    QuantizerHook,
    ignore_unexpected_keys,
    is_sharded,
    mask_length,
    records,
)
from modeling_mistral_large.transformers_api.registration import (
    export_names,
    read_config_dict_with,
    register_pipeline,
    warn_outside_range,
)
from modeling_mistral_large.transformers_api.tokenizers import (
    HOST_CHAT_OPTIONS,
    TokenizerHook,
    render_chat_template,
)

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "HOST_CHAT_OPTIONS",
    "KNOWN_KEYWORDS",
    "HeadedModel",
    "HostedModel",
    "LocalShards",
    "PrefillHook",
    "QuantizerHook",
    "TokenizerHook",
    "attention_implementation",
    "cache_argument",
    "cache_in",
    "cache_update_options",
    "export_names",
    "ignore_unexpected_keys",
    "is_sharded",
    "layer_forward",
    "mask_length",
    "model_forward",
    "read_config_dict_with",
    "records",
    "refuse_unknown_options",
    "register_pipeline",
    "render_chat_template",
    "warn_outside_range",
]

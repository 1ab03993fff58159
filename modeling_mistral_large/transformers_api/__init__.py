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
| `_prepare_cache_for_generation` | decoding on a GPU is not recorded, and five times as slow |
| `_validate_generation_mode`, `_assisted_decoding` | drafts are decoded by transformers' own loop: see `AssistedHook` |
| class attributes of `HostedModel`, `HeadedModel`, `records` | see there |
| `_load_pretrained_model` | weights are loaded onto a GPU at the speed of transformers' own reading |
| `QuantizerHook`, `LocalShards`, `_tp_size` | quantized checkpoints do not load, or are saved wrong: see there |
| hooks of the tokenizer | see `TokenizerHook` |
| `_attn_implementation` | the attention chosen by the user is not the one that runs |
| `_LazyModule` | tools that look for our classes in `transformers` find none: see `export_names` |
| `PreTrainedConfig.get_config_dict` | the Auto classes read no consolidated folder: see `read_config_dict_with` |
| `MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS` | `AutoTokenizer` takes the Llama tokenizer: see `prefer_tokenizer` |
"""

from modeling_mistral_large.transformers_api.assisted import (
    UNSET_ASSISTANT_TOKENS,
    AssistedDecoding,
    AssistedHook,
    cached_tokens,
    can_take_back,
    draft_settings,
    take_back,
)
from modeling_mistral_large.transformers_api.caches import capacity, keep_first
from modeling_mistral_large.transformers_api.keywords import (
    CACHE_NAME,
    CACHE_NAMES,
    KNOWN_KEYWORDS,
    attention_implementation,
    cache_argument,
    cache_in,
    cache_update_options,
    declared_options,
    layer_forward,
    model_forward,
    refuse_unknown_options,
)
from modeling_mistral_large.transformers_api.models import (
    CacheHook,
    HeadedModel,
    HostedModel,
    LocalShards,
    PrefillHook,
    QuantizerHook,
    has_foreign_hooks,
    ignore_unexpected_keys,
    is_sharded,
    mask_length,
    records,
)
from modeling_mistral_large.transformers_api.registration import (
    export_names,
    prefer_tokenizer,
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
    "UNSET_ASSISTANT_TOKENS",
    "AssistedDecoding",
    "AssistedHook",
    "CacheHook",
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
    "cached_tokens",
    "can_take_back",
    "capacity",
    "declared_options",
    "draft_settings",
    "export_names",
    "has_foreign_hooks",
    "ignore_unexpected_keys",
    "is_sharded",
    "keep_first",
    "layer_forward",
    "mask_length",
    "model_forward",
    "prefer_tokenizer",
    "read_config_dict_with",
    "records",
    "refuse_unknown_options",
    "register_pipeline",
    "render_chat_template",
    "take_back",
    "warn_outside_range",
]

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

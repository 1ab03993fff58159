"""Chunked prefill, so that a prompt's activation memory does not grow with the square of its length."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from mistral_large_conversion.sharding.memory import PREFILL_CHUNK
from modeling_mistral_large.transformers_api.models import PrefillHook, mask_length


# transformers takes a class for one that generates by this end of its name.
class ChunkedPrefillGenerationMixin(PrefillHook):
    """`generate` that reads a prompt of more than `PREFILL_CHUNK` tokens in chunks of this size.

    `prefill_chunk_size` sets another size. A prompt whose attentions or hidden states are asked for is read at once.
    transformers' own chunks are not used: 5.17 reads them as if the cache was
    empty.
    """

    def read_prompt_start(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], cache: Cache
    ) -> Tensor:
        """Read all of a prompt but its last chunk into the cache, and return the ids that `super` goes on with.

        `input_ids` [batch, tokens] hold the cached tokens too, or only what comes after them; the mask and the
        position ids are of all tokens.
        """
        chunk = generation_config.prefill_chunk_size or PREFILL_CHUNK
        embeds = model_kwargs.get("inputs_embeds") if model_kwargs["is_first_iteration"] else None
        prompt = input_ids if embeds is None else embeds
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        length = prompt.shape[1]
        # transformers drops a mask that hides nothing and keeps its length.
        total = mask.shape[1] if mask is not None else mask_length(generation_config) or length
        cached = int(cache.get_seq_length())
        skipped = cached if length == total else 0
        starts = range(skipped, length - chunk, chunk)
        model: Any = self
        for start in starts:
            tokens = slice(start, start + chunk)
            seen = cached - skipped + tokens.stop
            inputs = model.prepare_inputs_for_generation(
                input_ids[:, tokens],
                **{
                    **model_kwargs,
                    "inputs_embeds": None if embeds is None else embeds[:, tokens],
                    "attention_mask": None if mask is None else mask[:, :seen],
                    "position_ids": None if positions is None else positions[..., seen - chunk : seen],
                },
            )
            model(**inputs, return_dict=True)
        return input_ids if skipped or not starts else input_ids[:, starts[-1] + chunk :]

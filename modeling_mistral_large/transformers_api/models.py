"""What transformers looks for in a model class, its quantizer and its `generate`."""

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.quantizers.base import HfQuantizer

from modeling_mistral_large.transformers_api.keywords import CACHE_NAME, CACHE_NAMES


class HostedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # transformers types no __init_subclass__
    """What transformers has to know of every Mistral Large model, by the underscored names it looks for."""

    # A device_map may not cut a layer: its residual connection would cross devices.
    _no_split_modules = ["MistralLargeDecoderLayer"]
    # accelerate would otherwise copy the cache to each layer's device, and drop what the layer writes.
    _skip_keys_device_placement = list(CACHE_NAMES)
    # Without these, `attn_implementation` is refused, and vLLM's and TGI's backends refuse the class.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Without it `generate` does not compile with a static cache.
    _can_compile_fullgraph = True


class HeadedModel:
    """How the output matrix `lm_head` is sharded over ranks; without it every rank computes all logits."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}


def records(**modules: type[nn.Module]) -> Callable[[type[HostedModel]], type[HostedModel]]:
    """Class decorator: which modules' outputs are the `hidden_states` and `attentions` that a caller may ask for."""

    def declare(model_class: Any) -> Any:
        model_class._can_record_outputs = modules
        return model_class

    return declare


class QuantizerHook(HfQuantizer):
    """A quantizer of ours: `prepare` replaces the modules of a model without weights, `finish` works on the loaded one.

    transformers calls the two underscored methods. If it no longer does, no linear layer is replaced, which
    `quantized.refuse_unquantized` says.
    """

    def prepare(self, model: PreTrainedModel) -> None:
        raise NotImplementedError

    def finish(self, model: PreTrainedModel) -> None:
        raise NotImplementedError

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.prepare(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.finish(model)


class LocalShards:
    """Of a module: tensor parallelism gives it a rank's shard as a plain tensor, not as a `DTensor`.

    Without it a rank multiplies with a tensor that has no product in FP8 or 4 bits.
    """

    _hf_quantized_needs_local_tp = True


def ignore_unexpected_keys(model: PreTrainedModel, pattern: str) -> None:
    """Have no warning about tensors of a checkpoint that the model needs none of; without it there is one for each."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {pattern}


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether tensor parallelism shards a model; if this is not seen, a rank's shard is saved as the whole tensor."""
    return model._tp_size is not None


class PrefillHook(GenerationMixin):
    """`generate` whose prompts are read in chunks: `read_prompt_start` reads the first ones, transformers the last.

    transformers calls `_prefill` once for each prompt. If it no longer does, prompts are read at once.
    """

    def read_prompt_start(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], cache: Cache
    ) -> Tensor:
        """Read the start of the prompt [batch, tokens] into the cache, and return the ids transformers goes on with."""
        raise NotImplementedError

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]  # wraps keeps the signature
        self, *args: Any, **keywords: Any
    ) -> Any:
        """Leave out the tokenizers that `generate` takes for `stop_strings` and hands on; no `forward` knows them."""
        for name in ("tokenizer", "assistant_tokenizer"):
            keywords.pop(name, None)
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]  # typed for whole models
        return prepare(*args, **keywords)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        cache = model_kwargs.get(CACHE_NAME)
        wants_all = generation_config.output_attentions or generation_config.output_hidden_states
        if cache is not None and not wants_all:
            input_ids = self.read_prompt_start(
                input_ids, generation_config, {**model_kwargs, "is_first_iteration": is_first_iteration}, cache
            )
            generation_config = copy(generation_config)
            generation_config.prefill_chunk_size = None
        read: Any = super()._prefill  # type: ignore[misc]  # typed for whole models
        return read(input_ids, generation_config, model_kwargs, is_first_iteration)


def mask_length(generation_config: GenerationConfig) -> int | None:
    """The length of a mask that hides nothing: `generate` drops such a mask from 5.18 on and keeps its length here."""
    return getattr(generation_config, "_mask_length", None)

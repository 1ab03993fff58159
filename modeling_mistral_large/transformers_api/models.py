"""What transformers looks for in a model class, its quantizer and its `generate`."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.quantizers.base import HfQuantizer
from transformers.utils.output_capturing import capture_outputs

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

    @classmethod
    def open_weights(
        cls, files: Sequence[str], devices: Collection[Any]
    ) -> AbstractContextManager[dict[str, Any] | None]:
        """What transformers is to read instead of safetensors files, by name; None: the files themselves.

        devices: those of the device_map, as transformers has them: names, indices, devices, "disk".
        """
        return nullcontext()

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **options: Any
    ) -> Any:
        """Load with what `open_weights` gives; if transformers no longer asks here, it reads the files itself."""
        read: Any = PreTrainedModel._load_pretrained_model
        files = checkpoint_files or []
        devices = set((load_config.device_map or {}).values())
        is_mappable = not load_config.disable_mmap and all(file.endswith(".safetensors") for file in files)
        if state_dict is not None or not files or not is_mappable:
            return read(model, state_dict, checkpoint_files, load_config, *args, **options)
        with model.open_weights(files, devices) as weights:
            return read(model, weights, checkpoint_files, load_config, *args, **options)


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


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks other than those that record its outputs.

    transformers leaves these in a model once hidden states were asked for; if they come from another module of it, such
    a model is no longer recorded.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(hook.__module__ != capture_outputs.__module__ for hook in hooks)


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
    def prepare_inputs_for_generation(  # type: ignore[override, unused-ignore]  # wraps keeps the signature
        self, *args: Any, **keywords: Any
    ) -> Any:
        """Leave out the tokenizers that `generate` takes for `stop_strings` and hands on; no `forward` knows them."""
        for name in ("tokenizer", "assistant_tokenizer"):
            keywords.pop(name, None)
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc, unused-ignore]  # typed for whole models
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
        read: Any = super()._prefill  # type: ignore[misc, unused-ignore]  # typed for whole models
        return read(input_ids, generation_config, model_kwargs, is_first_iteration)


class CacheHook(GenerationMixin):
    """`generate` that takes its cache from `own_cache`, and shows `use_given_cache` the one that a call brings.

    transformers calls `_prepare_cache_for_generation` once for each call. If it no longer does, nothing is recorded.
    """

    def own_cache(
        self, generation_config: GenerationConfig, mode: str, batch: int, prompt: int, context_length: int
    ) -> Cache | None:
        """Return the cache for a call that brings none, or None to leave it to transformers."""
        raise NotImplementedError

    def use_given_cache(self, cache: Any, generation_config: GenerationConfig, mode: str, batch: int) -> None:
        """Prepare the cache that a call brings."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        batch = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        call = (generation_config, str(getattr(generation_mode, "value", generation_mode)), batch)
        given = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
        if given is not None:
            self.use_given_cache(given, *call)
        else:
            # transformers counts the positions of every prompt, also of one that is given as embeddings.
            positions = model_kwargs.get("position_ids")
            prompt = max_cache_length if positions is None else positions.shape[-1]
            own = self.own_cache(*call, prompt, max_cache_length)
            if own is not None:
                model_kwargs[CACHE_NAME] = own
                return None
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc, unused-ignore]  # typed for whole models
        return prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def mask_length(generation_config: GenerationConfig) -> int | None:
    """The length of a mask that hides nothing: `generate` drops such a mask from 5.18 on and keeps its length here."""
    return getattr(generation_config, "_mask_length", None)

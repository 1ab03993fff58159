"""How transformers' `generate` decodes with a draft: a smaller model, or prompt lookup."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, cache_utils
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from modeling_mistral_large.transformers_api.keywords import CACHE_NAME, cache_argument

# The number of drafted tokens that a generation config has when nobody has set one.
UNSET_ASSISTANT_TOKENS = 20
# Their tokens cannot be taken back one by one, whatever the class says.
_QUANTIZED_LAYERS = tuple(
    getattr(cache_utils, name) for name in ("BaseQuantizedLayer", "QuantizedLayer") if hasattr(cache_utils, name)
)


class AssistedHook(GenerationMixin):
    """`generate` with a draft: `check_draft` refuses one, `decode_with_draft` decodes.

    transformers calls the two underscored methods. When it no longer does, drafts are decoded by its own loop, which
    reads long prompts at once, adapts to nothing and misses stop strings.
    """

    def check_draft(self, draft: Any, generation_config: GenerationConfig, options: dict[str, Any]) -> None:
        """Refuse a draft that cannot be used; `options` are those of `generate` that no model takes."""
        raise NotImplementedError

    def decode_with_draft(self, decoding: "AssistedDecoding", draft: Any) -> Any:
        """Decode one sequence; `draft` is a model, or None for prompt lookup."""
        raise NotImplementedError

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION and not _is_of_other_kind(generation_config):
            self.check_draft(generation_mode_kwargs.get("assistant_model"), generation_config, generation_mode_kwargs)
        validate: Any = super()._validate_generation_mode  # type: ignore[misc]  # typed for whole models
        validate(generation_mode, generation_config, generation_mode_kwargs)

    def _assisted_decoding(  # type: ignore[override]  # what it does not read is in options
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        wants_all = generation_config.output_attentions or generation_config.output_hidden_states
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config)
        if _is_of_other_kind(generation_config) or wants_all or options.get("synced_gpus"):
            decode: Any = super()._assisted_decoding  # type: ignore[misc]  # typed for whole models
            return decode(*prepared, **options)
        streamer, draft = options.pop("streamer", None), options.pop("assistant_model", None)
        for name in ("synced_gpus", "inputs_tensor", "assistant_tokenizer", "tokenizer"):
            options.pop(name, None)
        return self.decode_with_draft(AssistedDecoding(self, *prepared, streamer, options), draft)


@dataclass(eq=False)
class AssistedDecoding:
    """What `generate` has prepared for one sequence, and how the model reads tokens of it."""

    _model: Any
    input_ids: Tensor
    logits_processor: Any
    stopping_criteria: Any
    config: GenerationConfig
    streamer: Any
    _inputs: dict[str, Any]
    _outputs: Any = None

    @property
    def cache(self) -> Cache | None:
        return self._inputs.get(CACHE_NAME)

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask of all tokens [1, tokens], None where it hides nothing."""
        return self._inputs.get("attention_mask")

    @property
    def reads_embeddings(self) -> bool:
        return self._inputs.get("inputs_embeds") is not None

    def read_prompt(self) -> Tensor:
        """Read the prompt, without what is cached of it, and return the logits [1, vocab_size] after it."""
        self._outputs = self._model._prefill(self.input_ids, self.config, self._inputs)
        logits: Tensor = self._outputs.logits[:, -1]
        return logits

    def advance(self, tokens: int) -> None:
        """Say that the sequence has become longer."""
        self._inputs = self._longer(tokens)

    def _longer(self, tokens: int) -> dict[str, Any]:
        inputs: dict[str, Any] = self._model._update_model_kwargs_for_generation(
            self._outputs, {**self._inputs}, num_new_tokens=tokens
        )
        return inputs

    def read_candidates(self, ids: Tensor, count: int) -> Tensor:
        """Read the last token and the `count` drafted ones after it; return the logits [count + 1, vocab_size].

        ids: [1, tokens], the whole sequence with the drafted tokens at its end.
        """
        longer = self._longer(count) if count else self._inputs
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=count + 1, is_first_iteration=False, **longer
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count + 1
        self._outputs = self._model(**inputs, return_dict=True)
        logits: Tensor = self._outputs.logits[0, -count - 1 :]
        return logits

    def result(self, ids: Tensor, scores: list[Tensor], logits: list[Tensor]) -> Any:
        """Return what `generate` returns: the ids, or an output with what its config asks for."""
        if not self.config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,  # type: ignore[arg-type]  # typed for one kind of int tensor
            scores=tuple(scores) if self.config.output_scores else None,  # type: ignore[arg-type]  # as above, of floats
            logits=tuple(logits) if self.config.output_logits else None,  # type: ignore[arg-type]  # as above, of floats
            **cache_argument(self.cache),
        )


def _is_of_other_kind(generation_config: Any) -> bool:
    """Whether tokens are drafted by parts of the model itself, which transformers does alone."""
    names = ("assistant_early_exit", "use_mtp", "speculation_type")
    return any(getattr(generation_config, name, None) for name in names)


def can_take_back(cache: Cache) -> bool:
    """Whether the last tokens can be removed from a cache; from a quantized one they cannot, whatever it says."""
    return all(
        (layer.is_croppable or type(layer) is StaticLayer) and not isinstance(layer, _QUANTIZED_LAYERS)
        for layer in cache.layers
    )


def take_back(cache: Cache, tokens: int) -> None:
    """Remove the last tokens from a cache. Before 5.24 a static one has no method for it, and its count is all."""
    if not tokens:
        return
    layers: list[Any] = list(cache.layers)
    if all(layer.is_croppable for layer in layers):
        cache.crop(-tokens)
        return
    for layer in layers:
        layer.cumulative_length.sub_(tokens)


def draft_settings(draft: Any) -> tuple[int | None, bool, float]:
    """What a user has set on a draft's generation config: most tokens, whether always this number, least confidence."""
    config = draft.generation_config
    most = config.num_assistant_tokens
    is_constant = config.num_assistant_tokens_schedule == "constant"
    return most, is_constant, float(config.assistant_confidence_threshold or 0)

"""What this package takes from transformers beyond its public interface, and what differs between its versions.

Supported are 5.17 to 5.24. No other module of the package tests a version or names an underscore of transformers, which
tests/modeling/test_transformers_api.py counts. Each entry says what breaks when transformers changes it.

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

import inspect
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from packaging.version import Version
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel, TokenizersBackend
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pipelines import SUPPORTED_TASKS
from transformers.quantizers.base import HfQuantizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.generic import PaddingStrategy, TransformersKwargs
from transformers.utils.import_utils import _LazyModule

from mistral_large_conversion.errors import MistralLargeError
from modeling_mistral_large.errors import KeywordError
from modeling_mistral_large.supported import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS

# The cache

OLD_CACHE_NAME = "past_key_values"
# 5.24 renamed the cache in all arguments and outputs; its own classes go on taking the old name in arguments.
CACHE_NAME = "cache" if hasattr(BaseModelOutputWithPast, "cache") else OLD_CACHE_NAME
CACHE_NAMES = ("cache", OLD_CACHE_NAME)


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument by which `forward`, `generate`, masks, layers and output classes take a cache."""
    return {CACHE_NAME: cache}


def cache_in(outputs: Any) -> Any:
    """The cache of a model's outputs, None if it has none."""
    return getattr(outputs, CACHE_NAME)


def cache_update_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `Cache.update` takes besides keys, values and layer: from 5.24 on attention's options, which it changes.

    A paged cache is updated by the layer from 5.24 on, and before by the attention function.
    """
    return {"kwargs": options} if CACHE_NAME != OLD_CACHE_NAME else {}


def _rename_cache(function: str, own_name: str, keywords: dict[str, Any]) -> None:
    """Give the cache among `keywords`, under either name, the one of the function that is called."""
    given = [keywords.pop(name) for name in CACHE_NAMES if name in keywords]
    caches = [cache for cache in given if cache is not None]
    if len(caches) > 1:
        raise KeywordError(f"{function}() got both 'cache' and 'past_key_values', which are one argument; pass one")
    if given:
        keywords[own_name] = caches[0] if caches else None


def _own_cache_name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else OLD_CACHE_NAME


def _host_signature(forward: Callable[..., Any], own_name: str) -> inspect.Signature:
    """The signature by which tools see a forward: with the cache's name in the installed transformers."""
    signature = inspect.signature(forward)
    return signature.replace(
        parameters=[
            parameter.replace(name=CACHE_NAME) if name == own_name else parameter
            for name, parameter in signature.parameters.items()
        ]
    )


def layer_forward(forward: Any) -> Any:
    """Decorator: let the `forward` of a part of the model take the cache by the names transformers gives it."""
    own_name = _own_cache_name(forward)
    if CACHE_NAME == OLD_CACHE_NAME == own_name:
        return forward

    @wraps(forward)
    def by_host_name(*args: Any, **keywords: Any) -> Any:
        _rename_cache(forward.__qualname__, own_name, keywords)
        return forward(*args, **keywords)

    by_host_name.__signature__ = _host_signature(forward, own_name)  # type: ignore[attr-defined]  # inspect reads it
    return by_host_name


# Keywords of forward


def _options(function: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds)


# What a head hands to its loss function itself.
_LOSS_INPUTS = {"logits", "labels", "vocab_size"}
# Taken by transformers' decorators of forward, `can_return_tuple` and `merge_with_config_defaults`.
_OF_DECORATORS = {"return_dict", "use_cache", "debug_io", "debug_io_dir", "prune_layers"}
KNOWN_KEYWORDS = frozenset(
    {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__, *_OF_DECORATORS}
    | ({*_options(ForCausalLMLoss)} - _LOSS_INPUTS)
)
_PAGED_KEYWORDS = frozenset(PagedAttentionArgs.__annotations__)
# What a layer hands to its attention function itself.
_ATTENTION_INPUTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling"}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch does not type it
def _attention_options(implementation: str) -> tuple[str, ...]:
    """The options that an attention function declares, such as those of a registered one of the user or of vLLM."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return () if function is None else tuple(name for name in _options(function) if name not in _ATTENTION_INPUTS)


def _is_used(model: Any, keywords: dict[str, Any], name: str) -> bool:
    if isinstance(keywords.get("cache"), PagedAttentionCache) and name in _PAGED_KEYWORDS:
        return True
    return name not in CACHE_NAMES and name in _attention_options(attention_implementation(model.config))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch does not type it
def _refusal(model_class: str, name: str, known: frozenset[str]) -> str:
    close = get_close_matches(name, sorted(known), n=1)
    advice = f"did you mean {close[0]!r}?" if close else "it would have no effect; leave it out"
    if name in CACHE_NAMES:
        advice = f"transformers {transformers_version} calls the cache {CACHE_NAME!r}"
    return f"{model_class}.forward() got an unexpected keyword argument {name!r}; {advice}"


def model_forward(forward: Any) -> Any:
    """Decorator of a model's `forward`: take the cache by the names transformers gives it, and refuse unknown keywords.

    Known are what `forward` declares and what transformers declares: its `TransformersKwargs`, the options of the
    attention function in use and of its loss function, and those of continuous batching. Without it transformers'
    `**kwargs` swallow a misspelt name. It is the outermost decorator, as the others add keywords of their own.
    """
    own_name = _own_cache_name(forward)
    known = KNOWN_KEYWORDS | {*_options(forward)} - {"self", *CACHE_NAMES} | {CACHE_NAME, OLD_CACHE_NAME}
    takes_both = CACHE_NAME != OLD_CACHE_NAME or own_name != OLD_CACHE_NAME

    @wraps(forward)
    def checked(self: Any, *args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in known and not _is_used(self, keywords, name):
                raise KeywordError(_refusal(type(self).__name__, name, known))
        if takes_both:
            _rename_cache(f"{type(self).__name__}.forward", own_name, keywords)
        return forward(self, *args, **keywords)

    checked.__signature__ = _host_signature(forward, own_name)  # type: ignore[attr-defined]  # inspect reads it
    return checked


# What a model declares


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
    """How ranks share the output matrix `lm_head`; without it every rank computes all logits."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}


def records(**modules: type[nn.Module]) -> Callable[[type[HostedModel]], type[HostedModel]]:
    """Class decorator: which modules' outputs are the `hidden_states` and `attentions` that a caller may ask for."""

    def declare(model_class: Any) -> Any:
        model_class._can_record_outputs = modules
        return model_class

    return declare


def attention_implementation(config: Any) -> str:
    """The attention that a model is set to: `sdpa`, `eager`, `flash_attention_2` or a registered name."""
    implementation: str = config._attn_implementation
    return implementation


# Quantizers


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


# Prefill


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


# The range


def warn_outside_range(installed: str = transformers_version) -> None:
    """Warn when the installed transformers is older or newer than those that the test suite has passed on."""
    oldest, newest = Version(OLDEST_TRANSFORMERS).release, Version(NEWEST_TRANSFORMERS).release
    if not oldest <= Version(installed).release[:2] <= newest:
        warnings.warn(
            f"transformers {installed} is installed; modeling-mistral-large is tested with {OLDEST_TRANSFORMERS} to "
            f"{NEWEST_TRANSFORMERS}, and another version may give wrong results without an error: run "
            "`mistral-large doctor`, or install one of the range",
            UserWarning,
            stacklevel=2,
        )


# The names


def export_names(classes: Iterable[type]) -> None:
    """Make classes attributes of the module `transformers`, where pipelines, TRL, `serve` and vLLM look for them.

    When its class of modules changes, those tools find no class of that name. They are set on the class, since
    `import transformers.processing_utils` puts a new module in the place of the one that was imported before.
    """
    for each in classes:
        setattr(_LazyModule, each.__name__, _ExportedClass(each))


class _ExportedClass:
    """An attribute of the module `transformers`, and of none of the other modules of its class."""

    def __init__(self, exported: type) -> None:
        self._exported = exported

    def __get__(self, module: object, _: type | None = None) -> type:
        if getattr(module, "__name__", None) != "transformers":
            raise AttributeError(self._exported.__name__)
        return self._exported


# The files of a config


def read_config_dict_with(read: Callable[[Any, dict[str, Any]], dict[str, Any] | None]) -> None:
    """Let `read` say what the config is of a folder in which the Auto classes find none; may run any number of times.

    They ask `PreTrainedConfig.get_config_dict` for the model type before any class of ours is asked. When they ask
    something else, they find no model type in a consolidated folder, and say so.
    """
    original = PreTrainedConfig.__dict__["get_config_dict"].__func__
    original = getattr(original, "replaced", original)

    def get_config_dict(cls: Any, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        options = dict(kwargs)
        found, remaining = original(cls, source, **kwargs)
        if cls is PreTrainedConfig and not found.keys() - {"_commit_hash"}:
            found = read(source, options) or found
        return found, remaining

    get_config_dict.replaced = original  # type: ignore[attr-defined]  # a function takes any attribute
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[arg-type,assignment]  # mypy binds it


# Prompts


# Options that transformers' own callers hand to every `apply_chat_template`, with the value that means nothing: its
# server does so with the sound of videos.
HOST_CHAT_OPTIONS: dict[str, Any] = {"load_audio_from_video": False}
# transformers keeps the spans of a rendered prompt in the compiled template, which threads share.
_RENDERER = Lock()


def render_chat_template(conversations: list[Any], template: str, **options: Any) -> tuple[list[str], list[Any]]:
    """Return rendered prompts and, with `return_assistant_tokens_mask`, the spans inside of `generation` tags.

    When it changes, prompts of chat templates that are not ours fail.
    """
    with _RENDERER:
        rendered: Any = render_jinja_template(conversations=conversations, chat_template=template, **options)
    texts, spans = rendered
    return list(texts), list(spans) or [()] * len(texts)


# The tokenizer


_ENCODE_OPTIONS = frozenset({*_options(TokenizersBackend._encode_plus)} - {"self"})
# Options that mean nothing when they are false: of tokenizers that transformers once wrote in Python, and of its marks.
_OFF_OPTIONS = ("spaces_between_special_tokens", "use_source_tokenizer", "sanitize_control_tokens")


def refuse_unknown_options(function: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise KeywordError for the first option that would have no effect."""
    for name, value in options.items():
        if name in known or (name in _OFF_OPTIONS and not value):
            continue
        close = get_close_matches(name, sorted(known), n=1)
        advice = f"did you mean {close[0]!r}?" if close else "it would have no effect; leave it out"
        raise KeywordError(f"{function}() got an unexpected keyword argument {name!r}; {advice}")


class TokenizerHook(TokenizersBackend):
    """What transformers does with a tokenizer by underscored names, handed to methods with names of ours.

    | hook | when it changes |
    | --- | --- |
    | `_tokenizer` | no tokenizer is made |
    | `_from_pretrained` | the vendor's file is read by transformers' own reader: other ids |
    | `_save_pretrained` | tokenizer.model.v3 is not saved |
    | `_add_tokens` | `encode_texts` does not see tokens that were added |
    | `_encode_plus` | misspelt options are swallowed; calls of several threads change each other's ids |
    | `_decode`, `_convert_encoding` | cut characters and offsets are transformers' |
    | `_get_padding_truncation_strategies` | padding and truncation of prompts fail |
    """

    @classmethod
    def read_files(cls, files: dict[str, Any], name: Any) -> dict[str, Any]:
        """Take the vocabulary's files out of those transformers has found, and return arguments of `__init__`."""
        raise NotImplementedError

    def save_more_files(self, folder: Path, prefix: str) -> tuple[str, ...]:
        """Write what transformers does not, and return the paths."""
        raise NotImplementedError

    def forget_tokens(self) -> None:
        """Drop what is derived from the tokens."""
        raise NotImplementedError

    def own_backend(self) -> Tokenizer:
        """Return a backend of the running thread, whose settings may be changed."""
        raise NotImplementedError

    def decoded(self, text: str, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of ids, for which the backend gives `text`."""
        raise NotImplementedError

    def offsets(self, encoding: Encoding) -> list[tuple[int, int]]:
        """Return the offsets of an encoding."""
        raise NotImplementedError

    def set_backend(self, backend: Tokenizer) -> None:
        """Make a backend this tokenizer's, where the base class would copy one that is handed to it."""
        self._tokenizer = backend

    def strategies(
        self, padding: Any, truncation: Any, max_length: int | None, pad_to_multiple_of: int | None, verbose: bool
    ) -> tuple[PaddingStrategy, TruncationStrategy, Any]:
        """Return how to pad and to truncate, and to what length: an int, or None where neither is done."""
        read: Any = self._get_padding_truncation_strategies
        padding, truncation, max_length, _ = read(padding, truncation, max_length, pad_to_multiple_of, verbose)
        return padding, truncation, max_length

    def warn_of_length(self, ids: list[int], max_length: int | None, verbose: bool) -> None:
        """Say once that a sequence is longer than the model takes."""
        self._eventual_warn_about_too_long_sequence(ids, max_length, verbose)

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        read = cls.read_files(resolved_vocab_files, name)
        make: Any = super()._from_pretrained
        try:
            return make(resolved_vocab_files, name, *args, **kwargs, **read)
        except OSError as error:
            # The base class words errors of files anew.
            if isinstance(error.__context__, MistralLargeError):
                raise error.__context__ from None
            raise

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return (*files, *self.save_more_files(Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""))

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        self.forget_tokens()
        return super()._add_tokens(new_tokens, special_tokens)

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        refuse_unknown_options(type(self).__name__, kwargs, _ENCODE_OPTIONS)
        backend = self.backend_tokenizer
        splits = kwargs.get("split_special_tokens")
        if (
            kwargs.get("padding_strategy", PaddingStrategy.DO_NOT_PAD) == PaddingStrategy.DO_NOT_PAD
            and kwargs.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE)
            == TruncationStrategy.DO_NOT_TRUNCATE
            and backend.encode_special_tokens == (self.split_special_tokens if splits is None else splits)
        ):
            return super()._encode_plus(*args, **kwargs)
        # transformers would set these on the backend that all threads share, and leave them set: in the middle of
        # another thread's call, and in the tokenizer's hash and its files.
        own = object.__new__(type(self))
        own.__dict__.update(self.__dict__, _tokenizer=self.own_backend())
        return super(TokenizerHook, own)._encode_plus(*args, **kwargs)

    def _convert_encoding(self, *args: Any, **kwargs: Any) -> Any:
        fields, encodings = super()._convert_encoding(*args, **kwargs)
        if "offset_mapping" in fields:
            fields["offset_mapping"] = [self.offsets(encoding) for encoding in encodings]
        return fields, encodings

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        refuse_unknown_options("decode", kwargs, ("skip_special_tokens", "clean_up_tokenization_spaces"))
        ids: list[int] = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        text = super()._decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        return self.decoded(text, ids, skip_special_tokens)


# Pipelines


def register_pipeline(task: str, module: str, name: str) -> None:
    """Make `pipeline(task)` use a class of ours, without loading it where transformers itself loads classes by name.

    When it changes, the pipeline drops the space between a text and what the model goes on with.
    """
    entry: Any = SUPPORTED_TASKS[task]
    entry["impl"] = f"{module}.{name}" if isinstance(entry["impl"], str) else getattr(import_module(module), name)

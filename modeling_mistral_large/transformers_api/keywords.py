"""The names of the cache and the keywords of `forward` in every version of transformers."""

import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any

import torch
from transformers import __version__ as transformers_version
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import TransformersKwargs

from modeling_mistral_large.errors import KeywordError

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
    """Decorator: let the `forward` of a submodule take the cache by the names transformers gives it."""
    own_name = _own_cache_name(forward)
    if CACHE_NAME == OLD_CACHE_NAME == own_name:
        return forward

    @wraps(forward)
    def by_host_name(*args: Any, **keywords: Any) -> Any:
        _rename_cache(forward.__qualname__, own_name, keywords)
        return forward(*args, **keywords)

    by_host_name.__signature__ = _host_signature(forward, own_name)  # type: ignore[attr-defined]  # inspect reads it
    return by_host_name


def declared_options(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments that a function declares one by one."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds)


# What a head hands to its loss function itself.
_LOSS_INPUTS = {"logits", "labels", "vocab_size"}
# Taken by transformers' decorators of forward, `can_return_tuple` and `merge_with_config_defaults`.
_OF_DECORATORS = {"return_dict", "use_cache", "debug_io", "debug_io_dir", "prune_layers"}
KNOWN_KEYWORDS = frozenset(
    {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__, *_OF_DECORATORS}
    | ({*declared_options(ForCausalLMLoss)} - _LOSS_INPUTS)
)
_PAGED_KEYWORDS = frozenset(PagedAttentionArgs.__annotations__)
# What a layer hands to its attention function itself.
_ATTENTION_INPUTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling"}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch does not type it
def _attention_options(implementation: str) -> tuple[str, ...]:
    """The options that an attention function declares, such as those of a registered one of the user or of vLLM."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return (
        () if function is None else tuple(name for name in declared_options(function) if name not in _ATTENTION_INPUTS)
    )


def attention_implementation(config: Any) -> str:
    """The attention that a model is set to: `sdpa`, `eager`, `flash_attention_2` or a registered name."""
    implementation: str = config._attn_implementation
    return implementation


def _is_used(model: Any, keywords: dict[str, Any], name: str) -> bool:
    if isinstance(keywords.get("cache"), PagedAttentionCache) and name in _PAGED_KEYWORDS:
        return True
    return name not in CACHE_NAMES and name in _attention_options(attention_implementation(model.config))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch does not type it
def _refusal(model_class: str, name: str, known: frozenset[str]) -> str:
    advice = _advice(name, known)
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
    known = KNOWN_KEYWORDS | {*declared_options(forward)} - {"self", *CACHE_NAMES} | {CACHE_NAME, OLD_CACHE_NAME}
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


# Options that mean nothing when they are false: of tokenizers that transformers once wrote in Python, and of its marks.
_OFF_OPTIONS = ("spaces_between_special_tokens", "use_source_tokenizer", "sanitize_control_tokens")


def refuse_unknown_options(function: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise KeywordError for the first option that would have no effect."""
    for name, value in options.items():
        if name in known or (name in _OFF_OPTIONS and not value):
            continue
        raise KeywordError(f"{function}() got an unexpected keyword argument {name!r}; {_advice(name, known)}")


def _advice(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "it would have no effect; leave it out"

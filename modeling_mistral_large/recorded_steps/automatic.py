"""`generate` that decodes by recorded steps wherever it can, and stays transformers' own in all else."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache

from mistral_large_conversion.errors import SettingError
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.inference.speculative_decoding import SpeculativeGenerationMixin
from modeling_mistral_large.recorded_steps.cache import RecordedCache
from modeling_mistral_large.recorded_steps.decoding import MOST_ROWS, CacheDtype, RecordedDecoding, fingerprint_of
from modeling_mistral_large.recorded_steps.obstacles import is_switched_off, log_once, obstacle_to_recording
from modeling_mistral_large.transformers_api.models import CacheHook

# Tokens of a completion for which there is room from the start; the cache grows for more.
ROOM_AHEAD = 1024
# The modes of `generate` that take one token, or a draft's tokens, after another.
MODES = ("greedy_search", "sample", "assisted_generation")

logger = logging.getLogger("modeling_mistral_large")
# What each model keeps for its next call. Not in the model, which may be copied and pickled.
_kept: weakref.WeakKeyDictionary[nn.Module, RecordedDecoding] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def release_recording(model: nn.Module) -> None:
    """Free the memory of the steps and the cache that `generate` keeps for the next call of a model.

    They are freed with the model, too. `torch.cuda.empty_cache()` gives the memory to other programs.
    """
    with _lock:
        _kept.pop(model, None)


def session_cache(model: Any, dtype: CacheDtype = "bf16") -> Cache:
    """A cache for one sequence over many calls of `generate`: a `RecordedCache` where steps can be recorded."""
    reason = "switched off" if is_switched_off(model) else obstacle_to_recording(model)
    cache = _taken(model, 1, ROOM_AHEAD, dtype) if reason is None else None
    if reason is not None:
        log_once(reason)
    if cache is None:
        return Fp8Cache(model.config) if dtype == "fp8" else DynamicCache(config=model.config)
    with _lock:
        # The session's own: `generate` without a cache has another.
        _kept.pop(model, None)
    return cache


def _taken(model: nn.Module, batch: int, context_length: int, dtype: CacheDtype = "bf16") -> RecordedCache | None:
    """An empty cache over what the model has kept, or over a new recording; None if there is no memory for it."""
    with _lock:
        decoding = _kept.pop(model, None)
        if decoding is not None and _is_held(decoding):
            gc.collect()
        # A cache that somebody holds goes with its recording.
        if decoding is not None and (_is_held(decoding) or (decoding.batch, decoding.cache_dtype) != (batch, dtype)):
            decoding = None
        try:
            if decoding is None:
                decoding = RecordedDecoding(model, context_length, batch, dtype)
            else:
                decoding.filled = 0
                if decoding.fingerprint != fingerprint_of(model):
                    decoding.read_weights(model)
                decoding.reserve(context_length)
            # Before the prompt, as what cannot be recorded is then decoded without.
            decoding.record()
        except torch.OutOfMemoryError:
            log_once("no memory for its cache")
            return None
        except Exception as error:
            # Of Triton and of the compiler that it calls: a computer where they do not work decodes as before.
            logger.warning("decoding steps cannot be recorded (%s); decoding without, which is slower", error)
            return None
        _kept[model] = decoding
        return RecordedCache(decoding)


def _is_held(decoding: RecordedDecoding) -> bool:
    return decoding.holder is not None and decoding.holder() is not None


class RecordedGenerationMixin(SpeculativeGenerationMixin, CacheHook):
    """`generate` whose decoding steps are replayed, on one GPU, from a recording that is made in the first call.

    `use_cuda_graph = False` on a model turns that off, and MISTRAL_LARGE_USE_CUDA_GRAPH=0 for a process; one call does
    without if it names a cache (`cache_implementation="dynamic"`).
    """

    use_cuda_graph: bool = True

    def session_cache(self, dtype: CacheDtype = "bf16") -> Cache:
        """A cache for one sequence over many calls: a `RecordedCache` where steps can be recorded."""
        return session_cache(self, dtype)

    def own_cache(
        self, generation_config: GenerationConfig, mode: str, batch: int, prompt: int, context_length: int
    ) -> Cache | None:
        """The cache for a call that brings none, of `prompt` tokens and at most `context_length` with the completion.

        None leaves it to transformers.
        """
        model: Any = self
        reason = self._reason_against(generation_config, mode, batch)
        if reason is None:
            return _taken(model, batch, min(context_length, prompt + ROOM_AHEAD))
        log_once(reason)
        # transformers' cache needs the memory.
        release_recording(model)
        return None

    def use_given_cache(self, cache: Any, generation_config: GenerationConfig, mode: str, batch: int) -> None:
        """Prepare the cache that a call brings, if it is of recorded steps.

        Raises SettingError for one of another model or batch size, and for beams.
        """
        if not isinstance(cache, RecordedCache):
            log_once("the call brings a cache of its own")
            return
        model: Any = self
        decoding = cache.decoding
        if mode not in MODES:
            raise SettingError(f"a RecordedCache with {mode}: its sequences are fixed; pass another cache, or none")
        if decoding.batch != batch:
            raise SettingError(
                f"{batch} sequences: this RecordedCache is for {decoding.batch}; make one for {batch}, or pass none"
            )
        if not decoding.is_of(model):
            raise SettingError("this RecordedCache is another model's; make one of this model, or pass none")
        cache.obstacle = self._reason_against(generation_config, mode, batch)
        if cache.obstacle is None and decoding.fingerprint != fingerprint_of(model):
            decoding.read_weights(model)

    def _reason_against(self, generation_config: GenerationConfig, mode: str, batch: int) -> str | None:
        model: Any = self
        if is_switched_off(model):
            return "switched off"
        if mode not in MODES:
            return f"{mode} is asked for"
        if generation_config.cache_implementation is not None:
            return f"cache_implementation is {generation_config.cache_implementation}"
        if generation_config.use_cache is False:
            return "use_cache is off"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "attentions or hidden states are asked for"
        if batch > MOST_ROWS:
            return f"more than {MOST_ROWS} sequences"
        return obstacle_to_recording(model)

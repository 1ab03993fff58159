"""The engine that serves one request after another by `generate`: with drafts, and with recorded steps on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from modeling_mistral_large.errors import SettingError
from modeling_mistral_large.inference.common_prefix import common_length
from modeling_mistral_large.recorded_steps.automatic import session_cache
from modeling_mistral_large.serving.batching import end_ids
from modeling_mistral_large.serving.engine_thread import EngineThread, Job
from modeling_mistral_large.serving.requests import TokenChoice
from modeling_mistral_large.serving.token_choice import described, is_greedy, no_choice
from modeling_mistral_large.transformers_api.keywords import cache_argument

# With one of these, `generate` drafts tokens.
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens")


class OneByOne(EngineThread):
    """An `Engine` that calls `generate` for each request in turn.

    generate_options: of each call, such as `assistant_model`, `prompt_lookup_num_tokens` or `prefill_chunk_size`.

    The cache of the last response is the prefix of the next prompt.
    """

    def __init__(self, model: Any, **generate_options: Any) -> None:
        self._options = generate_options
        self._job: Job | None = None
        self._cache: Any = None
        self._cached: list[int] = []
        super().__init__(model)

    def check(self, job: Job) -> None:
        """Raise SettingError for log probabilities of drafted tokens, which `generate` does not show."""
        if job.request.top_logprobs is not None and any(self._options.get(name) for name in DRAFTS):
            raise SettingError("top_logprobs: not available with drafts; leave it out, or serve without drafts")

    def jobs(self) -> list[Job]:
        """The job that runs."""
        return [] if self._job is None else [self._job]

    def fail_all(self, error: Exception) -> None:
        """End the job by an error, and free its memory."""
        for job in self.jobs():
            self.outbox.put(job.stream, error.with_traceback(None))
        self._job, self._cache, self._cached = None, None, []

    def step(self) -> None:
        """Generate one response."""
        self.drop_cancelled()
        if not self.waiting:
            return
        self._job = job = self.waiting.popleft()
        prompt = job.request.prompt
        if self._cache is None:
            self._cache = session_cache(self.model)
        common = common_length(self._cached, list(prompt[:-1]))
        if excess := self._cache.get_seq_length() - common:
            self._cache.crop(-excess)
        job.stream.cached_tokens = common
        seed = job.request.choice.seed
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        hook = self.model.register_forward_pre_hook(self._stop_if_cancelled)
        try:
            self._generate(job)
        except _CancelledError:
            pass
        finally:
            hook.remove()
        # The last token has not been read, and a response that was stopped may have more of these.
        self._cached = job.tokens[: self._cache.get_seq_length()]
        self._job = None
        if not job.stream.is_cancelled and not self.is_closed:
            is_ended = job.tokens[-1] in end_ids(self.model)
            self.outbox.put(job.stream, "stop" if is_ended else "length")
        elif self.is_closed:
            self.outbox.put(job.stream, None)

    def _generate(self, job: Job) -> None:
        input_ids = torch.tensor([job.request.prompt], device=self.model.device)
        first = _FirstProcessor()
        self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=job.request.max_new_tokens,
            streamer=_Streamer(self, job, first),
            logits_processor=[first, *job.chooser.processors, _LastProcessor()],
            **_sampling(job.request.choice),
            **cache_argument(self._cache),
            **self._options,
        )

    def _stop_if_cancelled(self, *_: Any) -> None:
        # Before a forward, also of a prompt's chunk, all layers have cached the same tokens.
        if self.is_closed or (self._job is not None and self._job.stream.is_cancelled):
            raise _CancelledError


def _sampling(choice: TokenChoice) -> dict[str, Any]:
    """The options of `generate` for what is not done by a processor; the model's own settings have no effect."""
    options: dict[str, Any]
    if is_greedy(choice):
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    else:
        options = {
            "do_sample": True,
            "temperature": float(choice.temperature),
            "top_p": float(choice.top_p),
            "top_k": choice.top_k,
            "min_p": float(choice.min_p) or None,
        }
    return {**options, "repetition_penalty": 1.0}


class _CancelledError(Exception):
    """Nobody waits for the response any more."""


class _FirstProcessor(LogitsProcessor):
    """Keeps the model's own logits [1, vocabulary]."""

    logits: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override, unused-ignore]
        self.logits = scores.clone()
        return scores


class _LastProcessor(LogitsProcessor):
    """Refuses scores that no token can be drawn by, before a GPU does so by ending the process's use of it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override, unused-ignore]
        if not scores.max(dim=-1).values.isfinite().all():
            raise no_choice()
        return scores


class _Streamer(BaseStreamer):
    """Hands the tokens over as they come."""

    def __init__(self, engine: OneByOne, job: Job, first: _FirstProcessor) -> None:
        self.engine, self.job, self.first = engine, job, first
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then the new tokens of each step."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in value.flatten().tolist():
            self.job.tokens.append(token)
            self.engine.outbox.put(self.job.stream, described(token, self.first.logits[-1], self.job.chooser))
        self.engine.outbox.send()

    def end(self) -> None:
        """Do nothing: the engine says why a response ended."""

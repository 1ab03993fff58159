"""The engine that serves one request after another by `generate`: with drafts, and with recorded steps on a GPU."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from modeling_mistral_large.errors import SettingError
from modeling_mistral_large.generation import ChatSession
from modeling_mistral_large.serving.batching import end_ids
from modeling_mistral_large.serving.engine_thread import EngineThread, Job
from modeling_mistral_large.serving.requests import TokenChoice
from modeling_mistral_large.serving.token_choice import described, is_greedy, no_choice

# With one of these, `generate` drafts tokens.
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens")


class OneByOne(EngineThread):
    """An engine that calls `generate` for each request in turn.

    generate_options: of each call, such as `assistant_model`, `prompt_lookup_num_tokens` or `prefill_chunk_size`.

    The cache of the last response is the prefix of the next prompt.
    """

    def __init__(self, model: Any, **generate_options: Any) -> None:
        self._options = generate_options
        self._job: Job | None = None
        self._session: ChatSession | None = None
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
        self._job = self._session = None

    def step(self) -> None:
        """Generate one response."""
        self.drop_cancelled()
        if not self.waiting:
            return
        self._job = job = self.waiting.popleft()
        if self._session is None:
            # Prompts come as ids, which need no tokenizer.
            self._session = ChatSession(self.model, None)
        seed = job.request.choice.seed
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        with suppress(_CancelledError):
            self._generate(job, self._session)
        self._job = None
        if self.is_closed:
            self.outbox.put(job.stream, None)
        elif not job.stream.is_cancelled:
            self.outbox.put(job.stream, "stop" if job.tokens[-1] in end_ids(self.model) else "length")

    def _generate(self, job: Job, session: ChatSession) -> None:
        first = _FirstProcessor()

        def go_on() -> None:
            if self.is_closed or job.stream.is_cancelled:
                raise _CancelledError

        def note_prefix(*_: int) -> None:
            job.stream.cached_tokens = session.reused_tokens
            go_on()

        def take(ids: list[int]) -> None:
            job.tokens += ids
            self.outbox.put(job.stream, *(described(token, first.logits[-1], job.chooser) for token in ids))
            self.outbox.send()
            go_on()

        session.generate(
            job.request.prompt,
            on_tokens=take,
            on_prefill=note_prefix,
            max_new_tokens=job.request.max_new_tokens,
            logits_processor=[first, *job.chooser.processors, _LastProcessor()],
            **_sampling(job.request.choice),
            **self._options,
        )


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

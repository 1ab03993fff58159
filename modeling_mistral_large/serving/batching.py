"""The batching engine: one thread reads prompts in chunks and decodes all responses together, a token of each a step.

A step is at most a chunk's worth of prompts, then one forward with the last token of every response. Linear layers see
all rows at once; attention runs row by row over the row's own cache, so nothing is padded. A prompt is read as
`generate` reads it, by itself and with the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from modeling_mistral_large.errors import GenerationError, SettingError
from modeling_mistral_large.inference.batch_products import is_bf16_slow, use_blocked_products_
from modeling_mistral_large.inference.growing_cache import RaggedCache
from modeling_mistral_large.serving.engine_thread import EngineThread, Job
from modeling_mistral_large.serving.requests import GeneratedToken
from modeling_mistral_large.serving.slots import Slot, SlotPool
from modeling_mistral_large.serving.token_choice import choose_tokens
from modeling_mistral_large.transformers_api.keywords import attention_implementation, cache_argument

# A forward of few tokens takes as long as one of a sixteenth of a chunk: the time goes into reading the weights.
LEAST_COST = 16
ATTENTION = ("sdpa", "eager")


class ContinuousBatching(EngineThread):
    """An engine that generates many responses at once with a model in this process.

    max_batch: the most responses at once; more wait.
    prefill_chunk: the most tokens of prompts that are read between two tokens of the other responses.
    kv: `fp8` keeps the caches in 8 bits, as `Fp8Cache` does.
    max_cached_tokens: of all caches together; a response needs as many as its prompt and `max_new_tokens`.

    Raises SettingError for a number below 1, and for an attention function that needs caches of one length.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int = 32,
        prefill_chunk: int = 512,
        kv: Literal["auto", "fp8"] = "auto",
        max_cached_tokens: int | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise SettingError(f"{name} {value}: at least 1; pass a larger number")
        attention = attention_implementation(model.config)
        if attention not in ATTENTION:
            raise SettingError(
                f"attention {attention!r}: rows of a batch have caches of their own lengths here, which sdpa and eager "
                "take; load the model with attn_implementation='sdpa'"
            )
        if is_bf16_slow():
            use_blocked_products_(model)
        self._prefill_chunk = prefill_chunk
        self._pool = SlotPool(model.config, max_batch, fp8=kv == "fp8", max_cached_tokens=max_cached_tokens)
        self._end_ids = end_ids(model)
        self._steps = 0
        super().__init__(model)

    def check(self, job: Job) -> None:
        """Raise SettingError for a request that the caches never have room for."""
        limit = self._pool.max_cached_tokens
        if limit is not None and job.reserved_tokens > limit:
            raise SettingError(
                f"a request of {len(job.request.prompt)} tokens and {job.request.max_new_tokens} new ones: the caches "
                f"hold {limit}; shorten the prompt, ask for fewer tokens, or give the caches more"
            )

    def jobs(self) -> list[Job]:
        """The jobs in the batch."""
        return [slot.job for slot in self._pool if slot.job is not None]

    def fail_all(self, error: Exception) -> None:
        """End all jobs in the batch by an error."""
        for slot in self._pool.busy:
            self._fail(slot, error)

    def step(self) -> None:
        """Let go of cancelled jobs, place new ones, read at most a chunk of prompts, and then a token of each job."""
        self._steps += 1
        for slot in self._pool.busy:
            if slot.job is not None and slot.job.stream.is_cancelled:
                self._pool.release(slot)
        self.drop_cancelled()
        self._place_waiting()
        self._read_prompts()
        self._decode_rows()

    def _place_waiting(self) -> None:
        while self.waiting:
            job = self.waiting.popleft()
            job.begun = self._steps
            try:
                slot = self._pool.place(job)
            except Exception as error:
                slot = next(slot for slot in self._pool.busy if slot.job is job)
                self._fail(slot, error)
            if slot is None:
                self.waiting.appendleft(job)
                return

    def _read_prompts(self) -> None:
        """Read a chunk of the prompt that has least to read, and more prompts while all is no more than one chunk.

        A prompt that waits counts as one that is read, so that shorter ones do not keep a long one waiting for good.
        """
        chunk = self._prefill_chunk
        pending = [(chunk * slot.job.begun + slot.unread, slot) for slot in self._pool if slot.job and slot.unread > 1]
        left = chunk
        for _, slot in sorted(pending, key=lambda entry: entry[0]):
            cost = max(min(slot.unread, chunk), chunk // LEAST_COST)
            if cost > left:
                continue
            logits = self._read_safely([slot], self._read_chunk)
            if logits is not None:
                left -= cost
                if not slot.unread:
                    self._choose([slot], logits)

    def _read_chunk(self, slots: Sequence[Slot]) -> Tensor | None:
        """Read the next chunk of a prompt; None if only its last token is left, which the next decoding step reads."""
        (slot,) = slots
        # By now another slot may have read the same tokens.
        self._pool.share_prefix(slot)
        if slot.unread == 1:
            return None
        tokens = slot.next_tokens(self._prefill_chunk)
        slot.cache.reserve(len(slot.ids) + slot.unread)
        logits = self._logits([tokens], slot.cache)
        slot.ids.extend(tokens)
        return logits

    def _decode_rows(self) -> None:
        rows = [slot for slot in self._pool.busy if slot.unread == 1]
        if rows:
            logits = self._read_safely(rows, self._read_tokens)
            if logits is not None:
                self._choose(rows, logits)

    def _read_tokens(self, slots: Sequence[Slot]) -> Tensor:
        tokens = [slot.next_tokens(1) for slot in slots]
        if len(slots) == 1:
            logits = self._logits(tokens, slots[0].cache)
        else:
            positions = torch.tensor([[len(slot.ids)] for slot in slots], device=self.model.device)
            logits = self._logits(tokens, RaggedCache([slot.cache for slot in slots]), position_ids=positions)
        for slot, (token,) in zip(slots, tokens, strict=True):
            slot.ids.append(token)
        return logits

    def _logits(self, tokens: list[list[int]], cache: Any, **options: Any) -> Tensor:
        """Read tokens [rows, tokens] and return the logits [rows, vocabulary] after the last one of each row."""
        input_ids = torch.tensor(tokens, device=self.model.device)
        outputs = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **options, **cache_argument(cache))
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _read_safely(self, slots: Sequence[Slot], read: Callable[[Sequence[Slot]], Tensor | None]) -> Tensor | None:
        """Read with some slots; None where it fails, which ends their jobs, or for lack of memory the largest one."""
        while True:
            try:
                return read(slots)
            except Exception as error:
                for slot in slots:
                    slot.cache.crop_to(len(slot.ids))
                if not is_out_of_memory(error):
                    for slot in slots:
                        self._fail(slot, error)
                    return None
            # Outside of the handler, whose traceback holds the tensors of the forward.
            if not self._pool.drop_idle():
                largest = max(slots, key=lambda slot: len(slot.ids))
                self._fail(largest, _no_memory(len(largest.ids)))
                _release_memory()
                return None
            _release_memory()

    def _choose(self, slots: Sequence[Slot], logits: Tensor) -> None:
        """Choose the next token of each slot's job, and end the jobs that are done."""
        jobs = [slot.job for slot in slots if slot.job is not None]
        try:
            choices = choose_tokens(logits, [job.chooser for job in jobs])
        except Exception as error:
            choices = [error] * len(jobs)
        for slot, job, choice in zip(slots, jobs, choices, strict=True):
            if isinstance(choice, GeneratedToken):
                self._take(slot, job, choice)
            else:
                self._fail(slot, choice)

    def _take(self, slot: Slot, job: Job, token: GeneratedToken) -> None:
        job.tokens.append(token.id)
        if token.id in self._end_ids:
            self.outbox.put(job.stream, token, "stop")
        elif len(job.tokens) == job.reserved_tokens:
            self.outbox.put(job.stream, token, "length")
        else:
            self.outbox.put(job.stream, token)
            return
        self._pool.release(slot)

    def _fail(self, slot: Slot, error: Exception) -> None:
        """End a job by an error, and free its memory."""
        assert slot.job is not None
        # A traceback holds the tensors of the forward.
        self.outbox.put(slot.job.stream, error.with_traceback(None))
        slot.crop(0)
        self._pool.release(slot)


def end_ids(model: Any) -> frozenset[int]:
    """The tokens that end a response."""
    ids = model.generation_config.eos_token_id
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is that memory was asked for and not given, on any device."""
    is_of_cpu = isinstance(error, RuntimeError) and "not enough memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_of_cpu


def _no_memory(tokens: int) -> GenerationError:
    return GenerationError(
        f"the response, after {tokens} tokens: no memory for more; other responses need it; ask again later, or start "
        "the server with a smaller max_batch, or with kv='fp8'"
    )


def _release_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""An engine for tests of the routes: `generate` for one request after the other, in a thread."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modeling_mistral_large.serving.requests import FinishReason, GeneratedToken, GenerationRequest


class _Step(LogitsProcessor):
    """Biases and penalties of a request, and the log probabilities before them."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override, unused-ignore]
        self.logprobs.append(scores[0].float().log_softmax(-1))
        choice = self._request.choice
        scores = scores.clone()
        for token, bias in choice.logit_bias.items():
            scores[0, token] += bias
        written = input_ids[0, len(self._request.prompt) :].tolist()
        for token in {*written}:
            scores[0, token] -= choice.frequency_penalty * written.count(token) + choice.presence_penalty
        return scores


class StandInGeneration:
    """A response of the stand-in engine."""

    def __init__(self) -> None:
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.is_cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[GeneratedToken | Exception | None] = asyncio.Queue()

    def put(self, item: GeneratedToken | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._tokens.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[GeneratedToken]:
        while (item := await self._tokens.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        self.is_cancelled.set()
        self.put(None)


class StandInEngine:
    """Generates with `generate`, in the order of the requests.

    busy: how many responses are queued or being generated.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1)
        self.busy = 0

    def submit(self, request: GenerationRequest) -> StandInGeneration:
        generation = StandInGeneration()
        self.busy += 1
        self._thread.submit(self._run, request, generation)
        return generation

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _run(self, request: GenerationRequest, generation: StandInGeneration) -> None:
        try:
            self._generate(request, generation)
        except Exception as error:
            generation.put(error)
        finally:
            self.busy -= 1

    def _generate(self, request: GenerationRequest, generation: StandInGeneration) -> None:
        if generation.is_cancelled.is_set():
            return
        choice, step = request.choice, _Step(request)
        if choice.seed is not None:
            torch.manual_seed(choice.seed)

        class Streamer(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
                token = int(input_ids[0, -1])
                top: tuple[tuple[int, float], ...] = ()
                logprobs = step.logprobs.pop()
                if request.top_logprobs:
                    values, ids = logprobs.topk(request.top_logprobs)
                    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
                generation.put(GeneratedToken(token, float(logprobs[token]), top))
                return torch.tensor([generation.is_cancelled.is_set()])

        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if choice.temperature:
            sampling = {"do_sample": True, "temperature": choice.temperature, "top_p": choice.top_p}
            sampling |= {"top_k": choice.top_k, "min_p": choice.min_p or None}
        ids = torch.tensor([request.prompt], device=self._model.device)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            logits_processor=LogitsProcessorList([step, *(request.constraint or ())]),
            stopping_criteria=StoppingCriteriaList([Streamer()]),
            repetition_penalty=choice.repetition_penalty,
            **sampling,
        )
        generation.finish_reason = "stop" if int(output[0, -1]) == self._model.config.eos_token_id else "length"
        generation.put(None)

"""Requests for the engines of the server, and what they do for them."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.serving.engine_thread import EngineThread
from modeling_mistral_large.serving.requests import FinishReason, GeneratedToken, GenerationRequest, TokenChoice
from modeling_mistral_large.serving.token_stream import TokenStream
from tests.support.models import ours_only, random_ids

GREEDY_CHOICE = TokenChoice(temperature=0)


@dataclass(frozen=True)
class Response:
    """A whole response; `error` ended it, if any."""

    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None
    cached_tokens: int
    error: Exception | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def endless(config: MistralLargeConfig, attention: str = "sdpa") -> Any:
    """A model with random weights whose responses end by their length."""
    model = ours_only(config, attention)
    model.generation_config.eos_token_id = None
    return model


def prompts_of(config: MistralLargeConfig, lengths: Sequence[int]) -> list[list[int]]:
    return [random_ids(config, 1, length)[0].tolist() for length in lengths]


def greedy(prompt: Sequence[int], tokens: int = 12, **options: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), tokens, GREEDY_CHOICE, **options)


def generated(model: Any, prompt: Sequence[int], tokens: int = 12, **options: Any) -> list[int]:
    """What `generate` responds, greedily unless the options say otherwise."""
    settings = {"do_sample": False, "pad_token_id": 0, **options}
    output = model.generate(torch.tensor([list(prompt)]), max_new_tokens=tokens, **settings)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


async def respond(engine: EngineThread, request: GenerationRequest) -> Response:
    """Follow a response to its end."""
    return await followed(engine.submit(request))


async def followed(generation: TokenStream) -> Response:
    """What a generation ends as."""
    tokens = []
    error = None
    try:
        async for token in generation:
            tokens.append(token)
    except Exception as raised:
        error = raised
    return Response(tuple(tokens), generation.finish_reason, generation.cached_tokens, error)


def at_once(engine: EngineThread, requests: Sequence[GenerationRequest]) -> list[Response]:
    """The responses to requests that come at once: the engine begins with none of them before it has all."""

    async def run() -> list[Response]:
        with engine._changed:
            generations = [engine.submit(request) for request in requests]
        return await asyncio.gather(*map(followed, generations))

    return asyncio.run(run())


def one_by_one(engine: EngineThread, requests: Sequence[GenerationRequest]) -> list[Response]:
    """The responses to requests each of which comes after the response to the one before."""
    return [response for request in requests for response in at_once(engine, [request])]


@contextmanager
def running(engine: Any) -> Iterator[Any]:
    """An engine that is closed at the end."""
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def watched(model: Any, act: Callable[[int], None] | None = None) -> Iterator[list[tuple[int, int]]]:
    """The forwards of a model as they come, (rows, tokens) of each; `act` is called with the number of each of them."""
    forwards: list[tuple[int, int]] = []

    def note(_: Any, __: Any, options: dict[str, Any]) -> None:
        rows, tokens = options["input_ids"].shape
        forwards.append((rows, tokens))
        if act is not None:
            act(len(forwards))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield forwards
    finally:
        hook.remove()

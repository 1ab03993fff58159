"""The engine that calls `generate` for one request after another."""

import asyncio
from typing import Any

import pytest
import torch

from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.errors import GenerationError, SettingError
from modeling_mistral_large.generation import Speculation
from modeling_mistral_large.serving.batching import ContinuousBatching
from modeling_mistral_large.serving.one_by_one import OneByOne
from modeling_mistral_large.serving.requests import GenerationRequest, TokenChoice
from tests.modeling.serving.test_token_choice import CHOICES
from tests.support.errors import raises_exactly
from tests.support.serving import at_once, endless, generated, greedy, one_by_one, prompts_of, respond, running, watched


@pytest.mark.slow
def test_responses_are_those_of_the_batching_engine(tiny_config: MistralLargeConfig) -> None:
    """In all settings, and with log probabilities."""
    model = endless(tiny_config)
    # A model's own settings are not a client's.
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=2.0)
    choices = [choice for choice, _ in CHOICES.values()]
    choices += [TokenChoice(temperature=0), TokenChoice(frequency_penalty=0.5, presence_penalty=0.5, seed=1)]
    prompts = prompts_of(tiny_config, range(10, 10 + len(choices)))
    requests = [
        GenerationRequest(tuple(prompt), 8, choice, top_logprobs=2)
        for prompt, choice in zip(prompts, choices, strict=True)
    ]
    with running(ContinuousBatching(model)) as batching, running(OneByOne(model)) as engine:
        expected, responses = at_once(batching, requests), at_once(engine, requests)
    assert [response.ids for response in responses] == [response.ids for response in expected]
    for mine, other in zip(responses, expected, strict=True):
        for token, wanted in zip(mine.tokens, other.tokens, strict=True):
            assert token.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [index for index, _ in token.top_logprobs] == [index for index, _ in wanted.top_logprobs]
    assert {response.finish_reason for response in responses} == {"length"}


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(TokenChoice(temperature=0), marks=pytest.mark.slow),
        TokenChoice(temperature=0.8, top_p=0.9, seed=5),
    ],
)
def test_drafts_change_no_response(tiny_config: MistralLargeConfig, choice: TokenChoice) -> None:
    model = endless(tiny_config)
    prompt = (5, 6, 7, 8) * 6
    request = GenerationRequest(prompt, 20, choice)
    with running(OneByOne(model)) as plain, running(OneByOne(model, prompt_lookup_num_tokens=4)) as drafting:
        (expected,) = at_once(plain, [request])
        with Speculation() as speculation:
            (response,) = at_once(drafting, [request])
        assert response.ids == expected.ids
        assert len(response.ids) == 20
        # Counts are of the thread that asks.
        assert speculation.written == 0
        with raises_exactly(
            SettingError, "top_logprobs: not available with drafts; leave it out, or serve without drafts"
        ):
            at_once_or_raise(drafting, GenerationRequest(prompt, 4, choice, top_logprobs=1))


def at_once_or_raise(engine: Any, request: GenerationRequest) -> None:
    async def run() -> None:
        engine.submit(request)

    asyncio.run(run())


@pytest.mark.slow
def test_the_last_cache_is_the_next_prefix(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    model.generation_config.eos_token_id = [2]
    (prompt,) = prompts_of(tiny_config, [30])
    answer = generated(model, prompt)
    turns = [prompt, [*prompt, *answer, 5, 6], prompt[:10], prompt]
    with running(OneByOne(model)) as engine:
        responses = one_by_one(engine, [greedy(turn) for turn in turns])
    assert [response.ids for response in responses] == [generated(model, turn) for turn in turns]
    assert [response.cached_tokens for response in responses] == [0, 30 + len(answer) - 1, 9, 10]


def test_a_cancelled_response_ends_before_the_next_forward(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    first, second, third = prompts_of(tiny_config, [10, 11, 12])

    async def run() -> None:
        generation = engine.submit(greedy(first, 400))
        queued = engine.submit(greedy(second))
        last = asyncio.ensure_future(respond(engine, greedy(third, 3)))
        ids = [(await anext(generation)).id, (await anext(generation)).id]
        queued.cancel()
        generation.cancel()
        ids += [token.id async for token in generation]
        assert [token async for token in queued] == []
        assert generation.finish_reason is None
        assert generated(model, first, len(ids)) == ids
        assert len(ids) < 400
        assert (await last).ids == expected

    expected = generated(model, third, 3)
    with running(OneByOne(model)) as engine, watched(model) as forwards:
        asyncio.run(run())
    assert (1, 11) not in forwards


def test_an_error_is_that_of_its_request(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    first, second = prompts_of(tiny_config, [10, 11])

    def never(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)

    constraint: Any = [never]
    with running(OneByOne(model)) as engine:
        broken, whole = at_once(engine, [greedy(first, constraint=constraint), greedy(second)])
    assert isinstance(broken.error, GenerationError)
    assert str(broken.error).startswith("the response: no token can be chosen")
    assert (whole.ids, whole.error) == (generated(model, second), None)


def test_close_ends_the_response(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [10])

    async def run() -> None:
        task = asyncio.ensure_future(respond(engine, greedy(prompt, 400)))
        await asyncio.sleep(0.05)
        engine.close()
        response = await task
        assert (response.finish_reason, response.error) == (None, None)
        assert len(response.ids) < 400

    engine = OneByOne(model)
    asyncio.run(run())

"""The choice of tokens: that of `generate` with the same settings, row by row."""

import math
from typing import Any

import pytest
import torch

from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.errors import GenerationError
from modeling_mistral_large.serving.batching import ContinuousBatching
from modeling_mistral_large.serving.requests import GenerationRequest, TokenChoice
from modeling_mistral_large.serving.token_choice import TokenChooser, choose_tokens
from tests.support.serving import at_once, endless, generated, one_by_one, prompts_of, running

CPU = torch.device("cpu")
# Settings, and what `generate` calls them.
CHOICES: dict[str, tuple[TokenChoice, dict[str, Any]]] = {
    "all": (TokenChoice(seed=3), {}),
    "temperature": (TokenChoice(temperature=0.7, seed=3), {"temperature": 0.7}),
    "top_k": (TokenChoice(top_k=5, seed=3), {"top_k": 5}),
    "top_p": (TokenChoice(top_p=0.6, seed=3), {"top_p": 0.6}),
    "min_p": (TokenChoice(min_p=0.05, seed=3), {"min_p": 0.05}),
    "repetition": (TokenChoice(repetition_penalty=1.4, seed=3), {"repetition_penalty": 1.4}),
    "bias": (TokenChoice(logit_bias={5: 4.0, 6: -100}, seed=3), {"sequence_bias": {(5,): 4.0, (6,): -100.0}}),
    "together": (
        TokenChoice(1.3, 0.9, 40, 0.01, repetition_penalty=1.2, logit_bias={7: 2.0}, seed=3),
        {
            "temperature": 1.3,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "sequence_bias": {(7,): 2.0},
        },
    ),
}


# One of all settings, for every edit.
EACH_CHOICE = [pytest.param(name, marks=[pytest.mark.slow] * (name != "together")) for name in CHOICES]


@pytest.mark.parametrize("name", EACH_CHOICE)
def test_scores_are_those_of_generate(tiny_config: MistralLargeConfig, name: str) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [20])
    choice, options = CHOICES[name]
    outputs = model.generate(
        torch.tensor([prompt]),
        **{"do_sample": True, "top_k": 0, **options},
        max_new_tokens=6,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chooser = TokenChooser(GenerationRequest(tuple(prompt), 6, choice), CPU)
    for logits, expected, token in zip(outputs.logits, outputs.scores, outputs.sequences[0, 20:], strict=True):
        scores = chooser.process(logits)
        for warper in chooser.warpers:
            scores = warper(torch.empty(1, 0), scores)
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)
        chooser.append(int(token))


@pytest.mark.parametrize("name", EACH_CHOICE)
def test_a_seed_gives_the_response_of_generate(tiny_config: MistralLargeConfig, name: str) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [20])
    choice, options = CHOICES[name]
    torch.manual_seed(3)
    expected = generated(model, prompt, **{"do_sample": True, "top_k": 0, **options})
    with running(ContinuousBatching(model)) as engine:
        (response,) = at_once(engine, [GenerationRequest(tuple(prompt), 12, choice)])
    assert response.ids == expected


@pytest.mark.slow
def test_a_seed_gives_the_same_response_at_any_load(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    choices = [
        *(choice for choice, _ in CHOICES.values()),
        TokenChoice(temperature=0),
        TokenChoice(temperature=0, frequency_penalty=0.5),
        TokenChoice(temperature=0.7, presence_penalty=1.5, seed=4),
    ]
    prompts = prompts_of(tiny_config, [10 + number for number in range(len(choices))])
    requests = [
        GenerationRequest(tuple(prompt), 10, choice, top_logprobs=2 if number % 2 else None)
        for number, (prompt, choice) in enumerate(zip(prompts, choices, strict=True))
    ]
    with running(ContinuousBatching(model)) as engine:
        alone = one_by_one(engine, requests)
        together = at_once(engine, requests[::-1])[::-1]
    assert [response.ids for response in together] == [response.ids for response in alone]


def test_without_a_seed_responses_differ(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [10])
    with running(ContinuousBatching(model)) as engine:
        responses = at_once(engine, [GenerationRequest(tuple(prompt), 12, TokenChoice(temperature=2.0))] * 3)
    assert len({tuple(response.ids) for response in responses}) == 3


@pytest.mark.slow
def test_drawn_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    rows = 4000
    request = GenerationRequest((1,), 1, TokenChoice(temperature=0.5, top_k=3))
    choosers = [TokenChooser(request, CPU) for _ in range(rows)]
    for number, chooser in enumerate(choosers):
        assert chooser.generator is not None
        chooser.generator.manual_seed(number)
    chosen: list[Any] = choose_tokens(logits.expand(rows, -1), choosers)
    counts = [sum(token.id == index for token in chosen) for index in range(5)]
    weights = [math.exp(value / 0.5) for value in (2.0, 1.0, 0.0)]
    expected = [rows * weight / sum(weights) for weight in weights]
    # Three standard deviations.
    for count, mean in zip(counts, expected, strict=False):
        assert abs(count - mean) < 3 * math.sqrt(mean)
    assert counts[3:] == [0, 0]


def penalized(logits: list[float], written: list[int], frequency: float, presence: float) -> list[float]:
    """OpenAI's formula, as its documentation has it."""
    return [
        value - written.count(token) * frequency - float(token in written) * presence
        for token, value in enumerate(logits)
    ]


def test_penalties_are_those_of_the_api() -> None:
    generator = torch.Generator().manual_seed(0)
    choice = TokenChoice(temperature=0, frequency_penalty=0.25, presence_penalty=0.5)
    # Tokens of the prompt do not count.
    chooser = TokenChooser(GenerationRequest((1, 1, 2, 3), 20, choice), CPU)
    written: list[int] = []
    for _ in range(20):
        logits = torch.randn(1, 6, generator=generator)
        expected = penalized(logits[0].tolist(), written, 0.25, 0.5)
        torch.testing.assert_close(chooser.process(logits)[0], torch.tensor(expected))
        (token,) = choose_tokens(logits, [chooser])
        assert not isinstance(token, Exception)
        assert token.id == max(range(6), key=expected.__getitem__)
        written.append(token.id)
    assert len(set(written)) < len(written)


def test_log_probabilities_are_the_models_own(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [20])
    choice = TokenChoice(temperature=0.3, top_k=2, logit_bias={5: 20.0}, seed=1)
    with running(ContinuousBatching(model)) as engine:
        requests = [GenerationRequest(tuple(prompt), 6, choice, top_logprobs=most) for most in (3, 0, None)]
        responses = at_once(engine, requests)
    ids = responses[0].ids
    assert [response.ids for response in responses[1:]] == [ids, ids]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, 19:-1]
    expected = logits.log_softmax(-1)
    for token, own, (probabilities, most) in zip(
        responses[0].tokens, expected, zip(*expected.topk(3), strict=True), strict=True
    ):
        assert token.logprob == pytest.approx(float(own[token.id]), abs=1e-4)
        assert [index for index, _ in token.top_logprobs] == most.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(probabilities.tolist(), abs=1e-4)
    assert [token.top_logprobs for token in responses[1].tokens] == [()] * 6
    for token, other in zip(responses[1].tokens, responses[0].tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert {(token.logprob, token.top_logprobs) for token in responses[2].tokens} == {(None, ())}


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("processed", [False, True])
def test_a_row_without_a_choice_is_an_error_of_its_own(temperature: float, broken: float, processed: bool) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, -9.0]] * 3)
    logits[1] = torch.tensor([broken] * 4) if broken == -math.inf else torch.tensor([0.0, broken, 1.0, 2.0])
    bias = {3: 100.0} if processed else {}
    request = GenerationRequest((1,), 3, TokenChoice(temperature=temperature, top_k=1, logit_bias=bias, seed=0))
    first, second, third = choose_tokens(logits, [TokenChooser(request, CPU) for _ in range(3)])
    assert first == third
    assert not isinstance(first, Exception)
    assert first.id == (3 if processed else 1)
    assert isinstance(second, GenerationError)
    assert str(second) == (
        "the response: no token can be chosen, as all scores are -inf, or some are NaN or infinite; check the weights, "
        "and loosen logit_bias and constraints"
    )


def test_a_temperature_near_0_is_greedy() -> None:
    logits = torch.tensor([[1.0, 1.001, 0.0]])
    request = GenerationRequest((1,), 1, TokenChoice(temperature=1e-30))
    (token,) = choose_tokens(logits, [TokenChooser(request, CPU)])
    assert not isinstance(token, Exception)
    assert token.id == 1

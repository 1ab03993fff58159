"""The batching engine: what it responds is what `generate` does, whoever else is in the batch."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mistral_large_cli.demo import golden_conversations, wrong_answer
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.errors import GenerationError, SettingError
from modeling_mistral_large.generation import constrain
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.serving import slots
from modeling_mistral_large.serving.batching import ContinuousBatching
from modeling_mistral_large.serving.requests import GenerationRequest, TokenChoice
from modeling_mistral_large.transformers_api.keywords import cache_argument
from tests.conftest import TINY
from tests.support.errors import raises_exactly
from tests.support.serving import (
    at_once,
    endless,
    generated,
    greedy,
    one_by_one,
    prompts_of,
    respond,
    running,
    watched,
)

# Two of them come twice.
LENGTHS = (1, 2, 5, 17, 40, 100, 33, 64, 5, 40)


@pytest.fixture(scope="module", params=["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def expected_of_generate(request: pytest.FixtureRequest) -> tuple[Any, list[list[int]], list[list[int]]]:
    """A model, prompts and what `generate` responds to them, for engines of all settings."""
    torch.manual_seed(20240724)
    config = MistralLargeConfig(**TINY)
    model = endless(config, request.param)
    prompts = prompts_of(config, LENGTHS)
    return model, prompts, [generated(model, prompt, 4 + number % 4) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk": 16}, pytest.param({"max_batch": 3}, marks=pytest.mark.slow)], ids=str
)
def test_responses_are_those_of_generate(
    expected_of_generate: tuple[Any, list[list[int]], list[list[int]]], options: dict[str, Any]
) -> None:
    model, prompts, expected = expected_of_generate
    with running(ContinuousBatching(model, **options)) as engine:
        responses = at_once(engine, [greedy(prompt, 4 + number % 4) for number, prompt in enumerate(prompts)])
    assert [response.ids for response in responses] == expected
    assert {response.finish_reason for response in responses} == {"length"}
    assert {response.cached_tokens for response in responses} == {0}


@pytest.mark.slow
def test_responses_end_where_those_of_generate_do(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, LENGTHS)
    # Tokens that some of the responses contain.
    ends = [generated(model, prompt)[4] for prompt in prompts[:3]]
    model.generation_config.eos_token_id = ends
    with running(ContinuousBatching(model)) as engine:
        responses = at_once(engine, [greedy(prompt) for prompt in prompts])
    assert [response.ids for response in responses] == [generated(model, prompt) for prompt in prompts]
    reasons = ["stop" if response.ids[-1] in ends else "length" for response in responses]
    assert [response.finish_reason for response in responses] == reasons
    assert set(reasons) == {"stop", "length"}


@pytest.mark.slow
def test_the_demo_gives_its_golden_answers_at_once(demo_folder: Path) -> None:
    tokenizer: Any = MistralLargeTokenizer.from_pretrained(demo_folder)
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=torch.bfloat16).eval()
    golden = list(golden_conversations().values())
    prompts = [tokenizer.apply_chat_template(each.messages, tools=each.tools, return_dict=False) for each in golden]
    with running(ContinuousBatching(model)) as engine:
        responses = at_once(engine, [greedy(prompt, 128) for prompt in prompts])
    wrong = [
        wrong_answer(tokenizer, response.ids, each.answer) for each, response in zip(golden, responses, strict=True)
    ]
    assert wrong == [None] * len(golden)
    assert {response.finish_reason for response in responses} == {"stop"}


@pytest.mark.parametrize("length", [17, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 16, 40))])
def test_a_lone_request_has_the_very_logits_of_generate(tiny_config: MistralLargeConfig, length: int) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [length])
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "prefill_chunk_size": 16}
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, pad_token_id=0, **options).logits
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _, __, outputs: seen.append(outputs.logits[:, -1]))
    with running(ContinuousBatching(model, prefill_chunk=16)) as engine:
        at_once(engine, [greedy(prompt, 8)])
    hook.remove()
    # Those of the chunks before the last one are nobody's.
    torch.testing.assert_close(torch.cat(seen[-8:]), torch.cat(expected), rtol=0, atol=0)


@pytest.mark.slow
def test_an_8_bit_cache_is_that_of_generate(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, LENGTHS)
    expected = [generated(model, prompt, **cache_argument(Fp8Cache(tiny_config))) for prompt in prompts]
    assert expected != [generated(model, prompt) for prompt in prompts]
    with running(ContinuousBatching(model, kv="fp8")) as engine:
        first, again = (at_once(engine, [greedy(prompt) for prompt in prompts]) for _ in range(2))
    assert [response.ids for response in first] == expected
    assert [response.ids for response in again] == expected
    assert [response.cached_tokens for response in again] == [length - 1 for length in LENGTHS]


@pytest.mark.slow
def test_only_what_the_caches_do_not_hold_is_read(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [50])
    answer = generated(model, prompt)
    turns = [
        prompt,
        # The next turn of a conversation, of which the last token of the answer was not read.
        [*prompt, *answer, 5, 6, 7],
        # Another last message.
        [*prompt[:40], 9, 8, 7],
        # A part of what is in the cache, and the same again: the last token is always read.
        prompt[:20],
        prompt[:20],
    ]
    with running(ContinuousBatching(model, max_batch=1)) as engine, watched(model) as forwards:
        responses = one_by_one(engine, [greedy(turn) for turn in turns])
    assert [response.ids for response in responses] == [generated(model, turn) for turn in turns]
    assert [response.cached_tokens for response in responses] == [0, 50 + 11, 40, 19, 19]
    read = [tokens for _, tokens in forwards if tokens > 1]
    assert read == [50, 4, 3]


def test_responses_to_one_prompt_read_it_once(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [70])
    with running(ContinuousBatching(model, prefill_chunk=32)) as engine, watched(model) as forwards:
        responses = at_once(engine, [greedy(prompt)] * 4)
    assert [response.ids for response in responses] == [generated(model, prompt)] * 4
    assert sorted(response.cached_tokens for response in responses) == [0, 69, 69, 69]
    assert sum(tokens for _, tokens in forwards if tokens > 1) == 70


def test_a_shared_prefix_is_copied_from_a_busy_slot(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    system, *rest = prompts_of(tiny_config, [40, 10, 12])
    first, second = ([*system, *end] for end in rest)

    async def run() -> Any:
        generation = engine.submit(greedy(first, 30))
        ids = [(await anext(generation)).id]
        other = await respond(engine, greedy(second))
        # It was still busy.
        assert generation.finish_reason is None
        return ids + [token.id async for token in generation], other

    with running(ContinuousBatching(model)) as engine:
        ids, other = asyncio.run(run())
    assert ids == generated(model, first, 30)
    assert (other.ids, other.cached_tokens) == (generated(model, second), 40)


def test_a_short_prefix_costs_no_long_conversation(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    long, short = prompts_of(tiny_config, [60, 5])
    other = [*long[:10], *short]
    with running(ContinuousBatching(model, max_batch=2)) as engine:
        responses = one_by_one(engine, [greedy(long), greedy(other), greedy([*long, 5, 6])])
    assert [response.cached_tokens for response in responses] == [0, 10, 60]


@pytest.mark.slow
def test_the_least_recently_used_prefix_makes_room(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    first, second, third = prompts_of(tiny_config, [30, 30, 30])
    with running(ContinuousBatching(model, max_batch=2)) as engine:
        responses = one_by_one(engine, [greedy(each) for each in (first, second, first, third, first, second)])
    assert [response.cached_tokens for response in responses] == [0, 0, 29, 0, 29, 0]


@pytest.mark.slow
def test_a_long_prompt_delays_others_by_one_chunk(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    long, *short = prompts_of(tiny_config, [400, 6, 7, 8])
    counts = [(long, 2), (short[0], 60), (short[1], 60), (short[2], 3)]
    expected = [generated(model, prompt, count) for prompt, count in counts]

    async def run() -> None:
        others = [asyncio.ensure_future(respond(engine, greedy(prompt, 60))) for prompt in short[:2]]
        while not forwards:
            await asyncio.sleep(0.001)
        slow = asyncio.ensure_future(respond(engine, greedy(long, 2)))
        while not any(tokens == 16 for _, tokens in forwards):
            await asyncio.sleep(0.001)
        late = await respond(engine, greedy(short[2], 3))
        # It came after the long prompt, and had its response before.
        assert not slow.done()
        assert late.ids == expected[3]
        assert [(await other).ids for other in others] == expected[1:3]
        assert (await slow).ids == expected[0]

    with running(ContinuousBatching(model, prefill_chunk=16)) as engine, watched(model) as forwards:
        asyncio.run(run())
    # Between two tokens of the others, at most one chunk of prompts is read; and there is one, 25 times.
    between = [0]
    for _, tokens in forwards:
        if tokens > 1:
            between[-1] += tokens
        else:
            between.append(0)
    assert max(between) == 16
    assert between.count(16) == 400 // 16


def test_a_long_prompt_does_not_wait_for_good(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    long, *short = prompts_of(tiny_config, [100, *[12] * 60])

    async def run() -> int:
        slow = asyncio.ensure_future(respond(engine, greedy(long, 1)))
        for number, prompt in enumerate(short):
            await respond(engine, greedy(prompt, 1))
            if slow.done():
                return number
        raise AssertionError("the long prompt was not read")

    with running(ContinuousBatching(model, prefill_chunk=16)) as engine:
        assert asyncio.run(run()) <= 100 // 16 + 2


def cancelling(generation: list[Any], loop: list[Any]) -> Any:
    """Cancel a generation in the thread of the event loop, and wait for that."""

    def cancel() -> None:
        done = threading.Event()

        def act() -> None:
            generation[0].cancel()
            done.set()

        loop[0].call_soon_threadsafe(act)
        assert done.wait(10)

    return cancel


@pytest.mark.parametrize(
    ("length", "cancelled_in", "expected"),
    [(100, 3, [(1, 16)] * 3), (10, 5, [(1, 10), *[(1, 1)] * 4])],
    ids=["prompt", "response"],
)
def test_a_cancelled_response_is_gone_after_the_forward(
    tiny_config: MistralLargeConfig, length: int, cancelled_in: int, expected: list[tuple[int, int]]
) -> None:
    model = endless(tiny_config)
    prompt, other = prompts_of(tiny_config, [length, 8])
    generation: list[Any] = []
    loop: list[Any] = []
    cancel = cancelling(generation, loop)

    async def run() -> None:
        loop.append(asyncio.get_running_loop())
        generation.append(engine.submit(greedy(prompt, 40)))
        # Its place is the only one.
        waiting = asyncio.ensure_future(respond(engine, greedy(other, 2)))
        async for _ in generation[0]:
            pass
        assert generation[0].finish_reason is None
        assert (await waiting).ids == generated(model, other, 2)

    act = lambda number: cancel() if number == cancelled_in else None  # noqa: E731
    with running(ContinuousBatching(model, max_batch=1, prefill_chunk=16)) as engine, watched(model, act) as forwards:
        asyncio.run(run())
        assert forwards[: len(expected) + 2] == [*expected, (1, 8), (1, 1)]
        # What was read stays there for the next.
        assert at_once(engine, [greedy(other, 2)])[0].cached_tokens == 7


@pytest.mark.slow
def test_a_cancelled_request_in_the_queue_is_never_read(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    first, second, third = prompts_of(tiny_config, [10, 11, 12])

    async def run() -> None:
        running_one = asyncio.ensure_future(respond(engine, greedy(first, 40)))
        await asyncio.sleep(0)
        gone = engine.submit(greedy(second))
        last = asyncio.ensure_future(respond(engine, greedy(third, 2)))
        await asyncio.sleep(0)
        gone.cancel()
        assert [token async for token in gone] == []
        assert (await running_one).ids == generated(model, first, 40)
        assert (await last).ids == generated(model, third, 2)

    with running(ContinuousBatching(model, max_batch=1)) as engine, watched(model) as forwards:
        asyncio.run(run())
        assert {tokens for _, tokens in forwards} == {10, 12, 1}


class Broken:
    """A constraint that breaks at its third token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("no such grammar")
        return scores


@pytest.mark.slow
def test_an_error_of_one_request_is_its_own(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [10, 20, 30])
    constraint: Any = [Broken()]
    with running(ContinuousBatching(model)) as engine:
        responses = at_once(engine, [greedy(prompts[0]), greedy(prompts[1], constraint=constraint), greedy(prompts[2])])
    assert [repr(response.error) for response in responses] == ["None", "ValueError('no such grammar')", "None"]
    expected = [generated(model, prompt) for prompt in prompts]
    assert [response.ids for response in responses] == [expected[0], expected[1][:2], expected[2]]


def failing_at(number: int, error: Exception) -> Any:
    def act(current: int) -> None:
        if current == number:
            raise error

    return act


@pytest.mark.slow
def test_an_error_of_a_shared_forward_ends_those_in_it(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [10, 20, 30])
    requests = [greedy(prompt) for prompt in prompts]
    with running(ContinuousBatching(model, max_batch=2)) as engine:
        with watched(model, failing_at(5, RuntimeError("broken"))):
            responses = at_once(engine, requests)
        assert [repr(response.error) for response in responses] == ["RuntimeError('broken')"] * 2 + ["None"]
        assert [len(response.ids) for response in responses] == [3, 3, 12]
        assert [response.ids for response in at_once(engine, requests)] == [
            generated(model, prompt) for prompt in prompts
        ]


def test_an_error_of_a_prompt_is_that_of_its_request(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [10, 20, 30])
    with (
        running(ContinuousBatching(model)) as engine,
        watched(model, failing_at(2, RuntimeError("broken"))),
    ):
        responses = at_once(engine, [greedy(prompt) for prompt in prompts])
    expected = [generated(model, prompt) for prompt in prompts]
    assert [response.ids for response in responses] == [expected[0], [], expected[2]]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), id="GPU"),
        pytest.param(MemoryError(), id="CPU", marks=pytest.mark.slow),
    ],
)
def test_lack_of_memory_ends_the_largest_response(tiny_config: MistralLargeConfig, error: Exception) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [10, 50, 30])
    with (
        running(ContinuousBatching(model)) as engine,
        watched(model, failing_at(7, error)),
    ):
        responses = at_once(engine, [greedy(prompt) for prompt in prompts])
    expected = [generated(model, prompt) for prompt in prompts]
    assert [response.ids for response in responses] == [expected[0], expected[1][:4], expected[2]]
    assert isinstance(responses[1].error, GenerationError)
    assert str(responses[1].error).startswith("the response, after 53 tokens: no memory for more;")


@pytest.mark.slow
def test_lack_of_memory_drops_idle_prefixes_first(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [10, 50])
    with running(ContinuousBatching(model)) as engine:
        at_once(engine, [greedy(prompts[0])])
        with watched(model, failing_at(3, torch.OutOfMemoryError("CUDA out of memory"))):
            (response,) = at_once(engine, [greedy(prompts[1])])
        assert (response.ids, response.error) == (generated(model, prompts[1]), None)
        assert at_once(engine, [greedy(prompts[0])])[0].cached_tokens == 0


def cached_elements(engine: ContinuousBatching) -> list[int]:
    caches = [slot.cache for slot in engine._pool]
    return [cache.bytes_by_device().total() // torch.float32.itemsize for cache in caches]


def test_no_slot_has_memory_for_the_tokens_of_another(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [400, 20, 40])
    of_token = 2 * tiny_config.num_hidden_layers * tiny_config.num_key_value_heads * tiny_config.head_dim
    with running(ContinuousBatching(model, max_batch=4)) as engine:
        at_once(engine, [greedy(prompt, 10) for prompt in prompts])
        elements = sorted(cached_elements(engine))
    assert elements[0] == 0
    for held, prompt in zip(elements[1:], sorted(prompts, key=len), strict=True):
        tokens = len(prompt) + 9
        assert tokens * of_token <= held <= (tokens + max(32, tokens // 8)) * of_token


@pytest.mark.parametrize(
    ("free_tokens", "kept"),
    [
        pytest.param(0, [], marks=pytest.mark.slow),
        (300, [0]),
        (480, [0, 2]),
        pytest.param(10_000, [0, 1, 2], marks=pytest.mark.slow),
    ],
)
def test_idle_prefixes_take_no_more_memory_than_is_free(
    tiny_config: MistralLargeConfig, monkeypatch: pytest.MonkeyPatch, free_tokens: int, kept: list[int]
) -> None:
    """Free are, without any cache, `free_tokens`; the prefixes are 69, 79 and 109 tokens, with room to grow."""
    model = endless(tiny_config)
    of_token = 8 * tiny_config.num_hidden_layers * tiny_config.num_key_value_heads * tiny_config.head_dim
    prompts = prompts_of(tiny_config, [60, 70, 100])
    with running(ContinuousBatching(model)) as engine:

        def free(_: torch.device) -> float:
            return free_tokens * of_token - 4 * sum(cached_elements(engine))

        monkeypatch.setattr(slots, "free_memory", free)
        one_by_one(engine, [greedy(prompts[number], 10) for number in (1, 2, 0)])
        held = [slot.ids for slot in engine._pool if slot.ids]
    assert sorted(prompts.index(ids[:-9]) for ids in held) == kept


def test_the_free_memory_of_a_device() -> None:
    assert 0 < slots.free_memory(torch.device("cpu")) < psutil.virtual_memory().total
    assert slots.free_memory(torch.device("meta")) == float("inf")


@pytest.mark.slow
def test_idle_prefixes_are_dropped_for_room(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [40, 40, 40])
    with running(ContinuousBatching(model, max_cached_tokens=110)) as engine:
        responses = one_by_one(engine, [greedy(prompts[number], 10) for number in (0, 1, 0, 2, 0, 1)])
        assert sum(len(slot.ids) for slot in engine._pool) <= 110
    assert [response.cached_tokens for response in responses] == [0, 0, 39, 0, 39, 0]
    assert [response.ids for response in responses] == [generated(model, prompts[n], 10) for n in (0, 1, 0, 2, 0, 1)]


@pytest.mark.slow
def test_requests_wait_for_room(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [40, 41, 42, 43])
    with running(ContinuousBatching(model, max_cached_tokens=110)) as engine, watched(model) as forwards:
        responses = at_once(engine, [greedy(prompt, 10) for prompt in prompts])
        assert max(rows for rows, _ in forwards) == 2
    assert [response.ids for response in responses] == [generated(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            greedy(range(3, 103), 20),
            "a request of 100 tokens and 20 new ones: the caches hold 110; shorten the prompt, ask for fewer tokens, "
            "or give the caches more",
        ),
        (
            greedy(range(3, 503), 20),
            "a request of 500 tokens and 20 new ones: the model's context is 512; shorten the prompt or ask for fewer "
            "tokens",
        ),
        (greedy([]), "a request: a prompt has at least one token, and a response too; add what is missing"),
        (greedy([5], 0), "a request: a prompt has at least one token, and a response too; add what is missing"),
        (
            greedy([5, 768]),
            "prompt: token ids from 5 to 768; the model's are 0 to 767; use the tokenizer of the model",
        ),
        (
            GenerationRequest((5,), 3, TokenChoice(logit_bias={-1: 1.0})),
            "logit_bias: token ids from -1 to -1; the model's are 0 to 767; use the tokenizer of the model",
        ),
        (greedy([5], top_logprobs=769), "top_logprobs 769: from 0 to 768; choose one of these"),
    ],
    ids=str,
)
def test_what_no_forward_takes_is_refused(
    tiny_config: MistralLargeConfig, request_: GenerationRequest, message: str
) -> None:
    async def run() -> None:
        engine.submit(request_)

    with (
        running(ContinuousBatching(endless(tiny_config), max_cached_tokens=110)) as engine,
        raises_exactly(SettingError, message),
    ):
        asyncio.run(run())


def test_settings_without_meaning_are_refused(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    with raises_exactly(SettingError, "max_batch 0: at least 1; pass a larger number"):
        ContinuousBatching(model, max_batch=0)
    with raises_exactly(SettingError, "prefill_chunk 0: at least 1; pass a larger number"):
        ContinuousBatching(model, prefill_chunk=0)
    model.config._attn_implementation = "flex_attention"
    with raises_exactly(
        SettingError,
        "attention 'flex_attention': rows of a batch have caches of their own lengths here, which sdpa and eager take; "
        "load the model with attn_implementation='sdpa'",
    ):
        ContinuousBatching(model)


@pytest.mark.slow
def test_each_row_keeps_to_its_own_constraint(demo_folder: Path) -> None:
    pytest.importorskip("llguidance")
    tokenizer: Any = MistralLargeTokenizer.from_pretrained(demo_folder)
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], return_dict=False)

    def constraint(word: str) -> Any:
        schema = {"type": "object", "properties": {word: {"enum": [word]}}, "required": [word]}
        return constrain(
            tokenizer,
            response_format={
                "type": "json_schema",
                "json_schema": {"schema": {**schema, "additionalProperties": False}},
            },
        )

    words = ["yes", "no", "perhaps"]
    with running(ContinuousBatching(model)) as engine:
        *responses, free = at_once(
            engine, [*(greedy(prompt, 40, constraint=constraint(word)) for word in words), greedy(prompt, 40)]
        )
    texts = [tokenizer.decode(response.ids) for response in responses]
    assert texts == [f'{{"{word}": "{word}"}}</s>' for word in words]
    assert free.ids == generated(model, prompt, 40)


def test_close_ends_all_responses(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    prompts = prompts_of(tiny_config, [10, 20, 30])

    async def run() -> None:
        tasks = [asyncio.ensure_future(respond(engine, greedy(prompt, 400))) for prompt in prompts]
        await asyncio.sleep(0.05)
        engine.close()
        for task in tasks:
            response = await task
            assert (response.finish_reason, response.error) == (None, None)
            assert len(response.ids) < 400
        with raises_exactly(GenerationError, "the engine is closed; it takes no requests any more; start another one"):
            engine.submit(greedy(prompts[0]))

    engine = ContinuousBatching(model, max_batch=2)
    asyncio.run(run())


def test_a_closed_event_loop_leaves_its_responses(tiny_config: MistralLargeConfig) -> None:
    model = endless(tiny_config)
    (prompt,) = prompts_of(tiny_config, [10])

    async def leave() -> None:
        engine.submit(greedy(prompt, 400))

    with running(ContinuousBatching(model, max_batch=1)) as engine, watched(model) as forwards:
        asyncio.run(leave())
        (response,) = at_once(engine, [greedy(prompt)])
        assert response.ids == generated(model, prompt)
        assert len(forwards) < 100

"""Drafts and prompt lookup: the tokens of plain `generate`, greedy and sampled, with every cache and constraint."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from mistral_large_cli.demo import get_current_weather, golden_conversations
from mistral_large_conversion.errors import SettingError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.generation import Speculation, constrain, generate_with, run_tool_loop
from modeling_mistral_large.inference.drafting import DraftPolicy, PromptLookup, policy_for
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.transformers_api.keywords import CACHE_NAME, cache_argument
from tests.support.errors import raises_exactly
from tests.support.models import GREEDY, ours_only, random_ids, stock_config

LONG: dict[str, Any] = {**GREEDY, "max_new_tokens": 24}
SAMPLED: dict[str, Any] = {**LONG, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
RULE = "a draft must have the vocabulary of the model"


def noisy(model: Any, std: float) -> Any:
    """A copy that often chooses the same tokens."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return other


def always(draft: Any, count: int = 4) -> Any:
    """Let a draft propose this number of tokens each time, whether they pay or not."""
    draft.generation_config.num_assistant_tokens = count
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    return draft


def unlike(model: Any) -> dict[str, Any]:
    config = MistralLargeConfig(**{**model.config.to_dict(), "num_hidden_layers": 1})
    return {"assistant_model": always(ours_only(config))}


def alike(model: Any) -> dict[str, Any]:
    return {"assistant_model": always(noisy(model, 0.01))}


def stock(model: Any) -> dict[str, Any]:
    other: Any = MistralForCausalLM._from_config(stock_config(model.config)).eval()
    other.load_state_dict(noisy(model, 0.01).state_dict())
    return {"assistant_model": always(other)}


def lookup(_: Any) -> dict[str, Any]:
    return {"prompt_lookup_num_tokens": 4}


def seeded(model: Any, ids: Any, seed: int, **options: Any) -> list[int]:
    torch.manual_seed(seed)
    tokens: list[int] = model.generate(ids, **options)[0].tolist()
    return tokens


@pytest.mark.parametrize(
    "draft", [alike, *(pytest.param(draft, marks=pytest.mark.slow) for draft in (unlike, stock, lookup))]
)
@pytest.mark.parametrize(
    "options", [pytest.param(LONG, id="greedy", marks=pytest.mark.slow), pytest.param(SAMPLED, id="sampled")]
)
def test_the_response_is_that_of_no_draft(
    tiny_config: MistralLargeConfig, draft: Callable[[Any], dict[str, Any]], options: dict[str, Any]
) -> None:
    """Sampled with the same seed, too: each place of a response has its own random numbers."""
    model = ours_only(tiny_config)
    given = draft(model)
    with Speculation() as speculation:
        for seed in range(2):
            ids = random_ids(tiny_config, 1, 17)
            assert seeded(model, ids, seed, **options, **given) == seeded(model, ids, seed, **options)
    assert speculation.written == 2 * 24
    # The first token of each response is of the prompt's forward.
    assert speculation.forwards + 2 + speculation.accepted == speculation.written
    if draft in (alike, stock):
        assert 0.2 < (speculation.acceptance or 0) < 1


@torch.no_grad()
def top_three(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The exact probability of each next token under the settings of the test below."""
    scores: torch.Tensor = model(ids).logits[0, -1].double() / SAMPLED["temperature"]
    return scores.where(scores >= scores.topk(3).values[-1], -torch.inf).softmax(-1)


@pytest.mark.slow
def test_sampled_tokens_are_distributed_as_without_a_draft(tiny_config: MistralLargeConfig) -> None:
    """A chi-square test of what comes third, with 1 % of all runs beyond the bound."""
    config = MistralLargeConfig(**{**tiny_config.to_dict(), "num_hidden_layers": 1, "vocab_size": 400})
    model = ours_only(config)
    draft = always(noisy(model, 0.05), 3)
    ids = random_ids(config, 1, 5)
    options = {**SAMPLED, "max_new_tokens": 3, "top_k": 3, "top_p": 1.0}
    runs = 200
    with Speculation() as speculation:
        drafted = Counter(seeded(model, ids, seed, **options, assistant_model=draft)[-1] for seed in range(runs))
    assert 0.1 < (speculation.acceptance or 0) < 0.99
    begun = [(ids, 1.0)]
    for _ in range(2):
        begun = [
            (torch.cat((before, torch.tensor([[token]])), 1), share * chance)
            for before, share in begun
            for token, chance in enumerate(top_three(model, before).tolist())
            if chance
        ]
    exact = runs * torch.stack([share * top_three(model, before) for before, share in begun]).sum(0)
    # Tokens that are seldom are counted together.
    often = exact >= 5
    counts = torch.tensor([drafted[token] for token in range(400)]).double()
    counts, expected = (torch.cat((each[often], each[~often].sum()[None])) for each in (counts, exact))
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
    degrees = int(possible.sum()) - 1
    # Wilson and Hilferty: the 99th percentile of chi-square.
    bound = degrees * (1 - 2 / (9 * degrees) + 2.326 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert degrees >= 3
    assert statistic < bound


@pytest.mark.parametrize(
    "cache",
    [
        "default",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("fp8", "static", "static given", "chunks", "padding")
        ),
    ],
)
@pytest.mark.parametrize("draft", [pytest.param(alike, marks=pytest.mark.slow), lookup])
def test_every_cache_and_prompt_gives_the_same(
    tiny_config: MistralLargeConfig, draft: Callable[[Any], dict[str, Any]], cache: str
) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 33)
    given = draft(model)

    def options() -> dict[str, Any]:
        if cache == "fp8":
            return cache_argument(Fp8Cache(tiny_config))
        if cache == "static":
            return {"cache_implementation": "static", "disable_compile": True}
        if cache == "static given":
            return {**cache_argument(StaticCache(tiny_config, max_cache_len=80)), "disable_compile": True}
        if cache == "padding":
            mask = torch.ones_like(ids)
            mask[:, :6] = 0
            return {"attention_mask": mask}
        return {"prefill_chunk_size": 4} if cache == "chunks" else {}

    with Speculation() as speculation:
        found = model.generate(ids, **LONG, **options(), **given)
    assert found.tolist() == model.generate(ids, **LONG, **options()).tolist()
    assert speculation.accepted


@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 2, 4, 5))])
def test_the_cache_is_left_as_without_a_draft(tiny_config: MistralLargeConfig, stop: int) -> None:
    """So that the next turn goes on from it, wherever a response ends among accepted tokens."""
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 17)
    written = model.generate(ids, **LONG)[0, 17:].tolist()

    def is_over(tokens: Any, scores: Any, **_: Any) -> Any:
        return torch.tensor([tokens.shape[1] > 17 + stop])

    assert len(written) > stop
    options = {**LONG, "stopping_criteria": [is_over], "return_dict_in_generate": True}
    caches: list[Any] = [DynamicCache(config=tiny_config), DynamicCache(config=tiny_config)]
    drafts: list[dict[str, Any]] = [{}, {"assistant_model": always(model)}]
    turns = []
    for cache, draft in zip(caches, drafts, strict=True):
        first = model.generate(ids, **cache_argument(cache), **options, **draft).sequences
        assert cache.get_seq_length() == first.shape[1] - 1
        turns.append(model.generate(torch.cat((first, ids), 1), **cache_argument(cache), **LONG, **draft).tolist())
    assert turns[0] == turns[1]
    whole = torch.tensor([turns[0][0][:-24]])
    assert model.generate(whole, **LONG).tolist() == turns[0]


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Any:
    return MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="float32")


@pytest.fixture(scope="module")
def demo_tokenizer(demo_folder: Path) -> MistralLargeTokenizer:
    found: MistralLargeTokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    return found


@pytest.mark.slow
def test_stopping_criteria_are_asked_after_every_token(demo: Any, demo_tokenizer: MistralLargeTokenizer) -> None:
    """A stop string that ends among accepted tokens is not passed over."""
    tokenizer, model = demo_tokenizer, demo
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 30, "stop_strings": ["tiny"], "tokenizer": tokenizer}
    drafted = model.generate(**prompt, **options, assistant_model=always(copy.deepcopy(model), 20))
    assert drafted.tolist() == model.generate(**prompt, **options).tolist()


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.heard.append([])


@pytest.mark.slow
def test_scores_logits_and_streams_are_those_of_plain_generate(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 17)
    options = {**LONG, "repetition_penalty": 1.3, "return_dict_in_generate": True, "output_scores": True}
    outputs, heard = [], []
    for draft in ({}, {"assistant_model": always(model)}):
        listener = Listener()
        outputs.append(model.generate(ids, **options, output_logits=True, streamer=listener, **draft))
        heard.append(listener.heard)
    assert heard[0] == heard[1]
    assert outputs[0].keys() == outputs[1].keys()
    assert CACHE_NAME in outputs[1]
    for name in ("scores", "logits"):
        plain, drafted = (torch.cat(output[name]) for output in outputs)
        torch.testing.assert_close(drafted, plain, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_under_a_constraint(demo: Any, demo_tokenizer: MistralLargeTokenizer) -> None:
    tokenizer, model = demo_tokenizer, demo
    golden = golden_conversations()["weather_call"]
    prompt = tokenizer.apply_chat_template(golden.messages, tools=golden.tools, return_tensors="pt")
    options = {"max_new_tokens": 64, "do_sample": False}
    draft = always(noisy(model, 0.02))

    def respond(**given: Any) -> list[int]:
        processors = constrain(tokenizer, tools=golden.tools, tool_choice="required")
        tokens: list[int] = model.generate(**prompt, logits_processor=processors, **options, **given)[0].tolist()
        return tokens

    plain = respond()
    assert json.loads(str(tokenizer.decode(plain[prompt["input_ids"].shape[1] + 1 : -1])))[0]["name"]
    with Speculation() as speculation:
        assert respond(assistant_model=draft) == plain
        assert respond(prompt_lookup_num_tokens=6) == plain
    assert speculation.accepted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_in_the_tool_loop(demo: Any, demo_tokenizer: MistralLargeTokenizer, kind: str) -> None:
    tokenizer, model = demo_tokenizer, demo
    golden = golden_conversations()["weather_call"]
    options: dict[str, Any] = {
        "draft": {"assistant_model": always(noisy(model, 0.005))},
        "lookup": {"prompt_lookup_num_tokens": 6},
    }[kind]

    def messages(**given: Any) -> list[Any]:
        generate = generate_with(model, tokenizer, max_new_tokens=64, do_sample=False, **given)
        done: list[Any] = run_tool_loop(generate, golden.messages, [get_current_weather])
        return done

    plain = messages()
    assert [message["role"] for message in plain[-3:]] == ["assistant", "tool", "assistant"]
    with Speculation() as speculation:
        drafted = messages(**options)
    assert without_ids(drafted) == without_ids(plain)
    assert speculation.accepted


def without_ids(messages: Sequence[Any]) -> str:
    """The messages as JSON without the ids of calls, which are drawn anew where the model writes none."""
    ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    text = json.dumps(messages)
    for index, each in enumerate(ids):
        text = text.replace(each, f"call {index}")
    return text


@pytest.mark.slow
def test_a_draft_reads_only_what_is_new_to_it(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    draft = always(noisy(model, 0.01))
    ids = random_ids(tiny_config, 1, 65)
    read: list[int] = []
    draft.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0].shape[1]), with_kwargs=True)
    with Speculation():
        first = model.generate(ids, **LONG, assistant_model=draft)
        assert read[0] == 66
        del read[:]
        model.generate(torch.cat((first, ids[:, :9]), 1), **LONG, assistant_model=draft)
    assert 9 < max(read) < 20
    del read[:]
    model.generate(first, **LONG, assistant_model=draft)
    assert read[0] == first.shape[1] + 1


# What is refused


@pytest.mark.parametrize("size", [767, 800])
def test_another_number_of_tokens_is_refused(tiny_config: MistralLargeConfig, size: int) -> None:
    model = ours_only(tiny_config)
    draft = ours_only(MistralLargeConfig(**{**tiny_config.to_dict(), "vocab_size": size}))
    message = (
        f"the draft has {size} tokens, and the model 768: {RULE}; take another draft, such as Mistral-7B-Instruct-v0.3"
    )
    # Nor are tokens translated.
    for tokenizers in ({}, {"tokenizer": object(), "assistant_tokenizer": object()}):
        with raises_exactly(SettingError, message):
            model.generate(random_ids(tiny_config, 1, 5), **GREEDY, assistant_model=draft, **tokenizers)


@pytest.mark.slow
def test_a_draft_of_another_vocabulary_is_refused(demo_folder: Path, demo_folder_of_v7: Path) -> None:
    models: list[Any] = [MistralLargeForCausalLM.from_pretrained(each) for each in (demo_folder, demo_folder_of_v7)]
    message = (
        f"the draft has the vocabulary of v7, and the model the vocabulary of v3: {RULE}; take another draft, for 2407 "
        "such as Mistral-7B-Instruct-v0.3"
    )
    with raises_exactly(SettingError, message):
        models[0].generate(torch.tensor([[1, 3]]), **GREEDY, assistant_model=models[1])


def test_what_cannot_be_drafted_for_is_refused(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 5)
    cases: dict[str, dict[str, Any]] = {
        "prompt_lookup_num_tokens with assistant_model: tokens are drafted by the one or by the other; leave one of "
        "the two out": {"input_ids": ids, "assistant_model": model, "prompt_lookup_num_tokens": 3},
        "assistant_tokenizer: has no effect: a draft has the tokens of the model, and none are translated; leave it "
        "out": {"input_ids": ids, "assistant_model": model, "tokenizer": object(), "assistant_tokenizer": object()},
        "2 sequences with a draft: drafts are of one sequence; pass them one by one, or leave the draft out": {
            "input_ids": ids.repeat(2, 1),
            "assistant_model": model,
        },
        "inputs_embeds with a draft: drafts are made of token ids; pass input_ids": {
            "inputs_embeds": torch.zeros(1, 5, 80),
            "prompt_lookup_num_tokens": 3,
        },
        "no cache with a draft: tokens that were drafted wrong have to be removed from the cache, which this one "
        "cannot; leave use_cache, cache_implementation and the cache out, or "
        "pass Fp8Cache": {"input_ids": ids, "assistant_model": model, "use_cache": False},
    }
    for message, options in cases.items():
        with raises_exactly(SettingError, message):
            model.generate(**options, **GREEDY)


# How many tokens are drafted


def run(policy: DraftPolicy, accepts: Sequence[bool]) -> tuple[list[int], float]:
    """Decode with a draft that is right or wrong at each place; return the counts, and steps for each token."""
    counts, written, cost = [], 0, 0.0
    while written < len(accepts):
        count = policy.count()
        accepted = 0
        while accepted < count and accepts[(written + accepted) % len(accepts)]:
            accepted += 1
        policy.update(count, accepted)
        written += accepted + 1
        cost += 1 + count * (1 / 16 + 0.05)
        counts.append(count)
    return counts, cost / written


def test_a_draft_that_is_always_wrong_costs_next_to_nothing() -> None:
    for tokens in (32, 128, 1024):
        _, cost = run(DraftPolicy(8, draft_cost=1 / 16, row_cost=0.05), [False] * tokens)
        assert cost < 1.03


def test_drafting_resumes_when_it_pays_again() -> None:
    counts, _ = run(DraftPolicy(8, draft_cost=1 / 16, row_cost=0.05), [False] * 300 + [True] * 300)
    assert max(counts[10:240]) == 1
    assert counts[-1] == 8


@pytest.mark.parametrize(("rate", "least"), [(0.3, 1.03), (0.5, 1.2), (0.7, 1.55), (0.9, 2.4)])
def test_the_policy_gains_what_the_acceptance_allows(rate: float, least: float) -> None:
    accepts = (torch.rand(4000) < rate).tolist()
    _, cost = run(DraftPolicy(8, draft_cost=1 / 16, row_cost=0.05), accepts)
    assert 1 / cost > least


def test_a_constant_number_is_kept() -> None:
    counts, _ = run(DraftPolicy(3, draft_cost=2, row_cost=2, is_constant=True), [False] * 20)
    assert set(counts) == {3}


def test_a_draft_as_large_as_the_model_does_not_pay(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    assert run(policy_for(model, model, 8, is_constant=False), [True] * 8)[0][0] == 0
    assert run(policy_for(model, None, 8, is_constant=False), [True] * 8)[0][0] > 0


def test_on_a_gpu_a_draft_costs_its_layers_unless_steps_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the layers of the model with a sixtieth of its weights: launches take half the time, and reading none."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    with torch.device("meta"):
        model, draft = (
            MistralLargeForCausalLM(
                MistralLargeConfig(**sizes, num_hidden_layers=layers, hidden_size=size, intermediate_size=size)
            )
            for layers, size in ((2, 512), (1, 8))
        )
    monkeypatch.setattr(MistralLargeForCausalLM, "device", torch.device("cuda"))
    counts = {
        is_recorded: policy_for(model, draft, 8, is_constant=False, is_recorded=is_recorded).count()
        for is_recorded in (False, True)
    }
    assert counts[False] == 0
    assert counts[True] > 0


def test_prompt_lookup_takes_the_longest_match_and_the_last_of_them() -> None:
    lookup = PromptLookup(3)
    ids = [1, 2, 3, 9, 1, 2, 3, 8, 7, 3, 6, 2, 3]

    def propose(count: int, ends: list[int]) -> list[int]:
        return lookup.propose(ids, count, None, ends)  # type: ignore[arg-type]  # it asks for no choice

    assert propose(3, []) == [8, 7, 3]
    assert propose(3, [7]) == [8, 7]
    ids += [5]
    assert propose(3, []) == []
    ids += [9, 1]
    assert propose(2, []) == [2, 3]

"""`ChatSession` against a fresh `generate` on the whole prompt: the same tokens, whatever happened before."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from mistral_large_cli.demo import golden_conversations
from mistral_large_conversion.errors import ConversationError, SettingError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.generation import ChatSession, RecordedCache, Speculation, run_tool_loop
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.instruct import TextEvent
from modeling_mistral_large.transformers_api.keywords import cache_argument
from tests.conftest import TINY
from tests.support import torch_kernels
from tests.support.errors import raises_exactly
from tests.support.models import ours_only

GOLDEN = golden_conversations()
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
# Chunks that end in the middle of everything.
CHUNKED: dict[str, Any] = {**GREEDY, "prefill_chunk_size": 23}
TOOLS = GOLDEN["weather_call"].tools
SYSTEM = {"role": "system", "content": "Be brief, be kind and never say what you were told here."}


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights in fp32, whose every token depends on all before it; responses of any length."""
    torch.manual_seed(1)
    made = ours_only(MistralLargeConfig(**{**TINY, "vocab_size": 32768, "max_position_embeddings": 2048}))
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Any:
    return MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()


def fresh(session: ChatSession, prompt: list[int], cache: Any = None, **options: Any) -> list[int]:
    """The ids that `generate` writes after a prompt that it reads whole."""
    ids = torch.tensor([prompt])
    given = {} if cache is None else cache_argument(cache)
    out: Tensor = session.model.generate(ids, attention_mask=torch.ones_like(ids), **options, **given)
    written: list[int] = out[0, len(prompt) :].tolist()
    return written


def common_length(first: list[int], second: list[int]) -> int:
    both = [index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other]
    return both[0] if both else min(len(first), len(second))


def turns(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """A conversation as it grows by questions, calls and results, is edited and loses its beginning or system text."""
    rng = random.Random(seed)
    words = [
        "window",
        "cleaner",
        "weather",
        "Paris",
        "boots",
        "rain",
        "Monday",
        "[INST]",
        "é",
        "🎉",
        "42",
        "{}",
        "</s>",
    ]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 12)))

    seen: list[list[dict[str, Any]]] = []
    messages: list[dict[str, Any]] = [SYSTEM, {"role": "user", "content": text()}]
    for _ in range(count):
        seen.append(copy.deepcopy(messages))
        action = rng.choice(["talk", "talk", "call", "edit", "forget", "drop"])
        if action in ("talk", "edit"):
            messages += [{"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
        if action == "call":
            function = {"name": "get_current_weather", "arguments": {"location": text()}}
            call = {"id": "abcdefgh1", "type": "function", "function": function}
            result = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_current_weather", "content": "22"}
            response: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
            messages += [response, result]
        if action == "edit":
            rng.choice([each for each in messages if each["role"] == "user"])["content"] = text()
        if action == "forget" and messages[0]["role"] == "system":
            messages = messages[1:]
        if action == "drop":
            messages = [SYSTEM, {"role": "user", "content": text()}]
    return seen


def cache_of(kind: str, model: Any) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "own": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "fp8": lambda: Fp8Cache(model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=2048),
    }
    return made[kind]()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tools"),
    [("own", TOOLS), ("dynamic", None), ("fp8", TOOLS), ("static", None)],
    ids=["own", "dynamic", "fp8", "static"],
)
def test_every_turn_is_that_of_a_fresh_call(
    model: Any, tokenizer: MistralLargeTokenizer, kind: str, tools: Any
) -> None:
    session = ChatSession(model, tokenizer, cache_of(kind, model))
    known: list[int] = []
    reused = 0
    for messages in turns(7):
        prompt = session.prompt(messages, tools)
        assert prompt == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
        written = session.generate(prompt, **CHUNKED)
        # In FP8 what is rounded differs by the chunks, so that the reference reads in the same ones.
        expected = (
            fresh(session, prompt, Fp8Cache(model.config), **CHUNKED)
            if kind == "fp8"
            else fresh(session, prompt, **GREEDY)
        )
        assert written == expected
        assert session.reused_tokens == min(common_length(known, prompt), len(prompt) - 1)
        assert (session.prompt_tokens, session.response_tokens) == (len(prompt), 10)
        reused += session.reused_tokens
        known = [*prompt, *written[:-1]]
        assert session.cached_tokens == len(known) == int(session.cache.get_seq_length())
    assert reused > 100


@pytest.mark.slow
def test_sampled_responses_are_those_of_the_same_seed(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(model, tokenizer)
    for seed, messages in enumerate(turns(4)):
        found = []
        for generate in (session.generate, lambda prompt, **options: fresh(session, prompt, **options)):
            torch.manual_seed(seed)
            found.append(generate(session.prompt(messages), max_new_tokens=10, do_sample=True, top_k=0, top_p=0.9))
        assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_recorded_steps(
    demo_folder: Path, tokenizer: MistralLargeTokenizer, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    steps = torch_kernels.use(monkeypatch)
    model = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=torch.bfloat16).eval()
    session = ChatSession(model, tokenizer, model.session_cache(cache))
    assert isinstance(session.cache, RecordedCache)
    for name in ("window_cleaner", "window_cleaner_follow_up", "weather_call", "window_cleaner", "weather_answer"):
        golden = GOLDEN[name]
        written = session.generate(session.prompt(golden.messages, golden.tools), do_sample=False)
        assert tokenizer.decode(written) == f"{golden.answer}</s>"
        assert session.cached_tokens == int(session.cache.get_seq_length())
    assert steps


class BrokenError(Exception):
    """Something went wrong in the middle."""


def fail_in_layer(model: Any, number: int, after_passes: int, kind: type[BaseException]) -> Callable[[], None]:
    """Let the forward pass after some others fail behind a layer, when the layers below have cached its tokens."""
    passes = [0]

    def fail(*_: Any) -> None:
        passes[0] += 1
        if passes[0] > after_passes:
            raise kind

    handle = model.model.layers[number].register_forward_hook(fail)
    return lambda: handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "fp8", "static"])
@pytest.mark.parametrize("layer", [0, 2])
def test_after_an_error_inside_of_a_forward_pass(
    model: Any, tokenizer: MistralLargeTokenizer, kind: str, layer: int
) -> None:
    session = ChatSession(model, tokenizer, cache_of(kind, model))
    first, second, third = turns(3, seed=3)
    session.respond(first, **CHUNKED)
    # While the prompt is read, at its end and in the response.
    for passes in (1, 8):
        undo = fail_in_layer(model, layer, passes, KeyboardInterrupt if passes == 1 else BrokenError)
        with pytest.raises((BrokenError, KeyboardInterrupt)):
            session.respond(second, TOOLS, **CHUNKED)
        undo()
        layers: list[Any] = list(session.cache.layers)
        assert {int(each.get_seq_length()) for each in layers} == {session.cached_tokens}
        reference = Fp8Cache(model.config) if kind == "fp8" else None
        prompt = session.prompt(third, TOOLS)
        assert session.generate(prompt, **CHUNKED) == fresh(session, prompt, reference, **CHUNKED)


@pytest.mark.slow
def test_keys_without_their_values_are_dropped(
    model: Any, tokenizer: MistralLargeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt may come between the two."""
    session = ChatSession(model, tokenizer)
    messages = turns(1)[0]
    session.respond(messages, **GREEDY)
    layer: Any = session.cache.layers[1]
    update = type(layer).update

    def interrupted(self: Any, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> Any:
        if self is layer:
            self.keys = torch.cat((self.keys, keys), dim=-2)
            raise KeyboardInterrupt
        return update(self, keys, values, *args, **options)

    longer = [*messages, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "No, I said."}]
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.respond(longer, **GREEDY)
    assert session.generate(session.prompt(longer), **GREEDY) == fresh(session, session.prompt(longer), **GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["model", "lookup"])
@pytest.mark.parametrize("fails_at", [1, 2, 6])
def test_after_an_error_between_tokens_with_drafts(
    model: Any, tokenizer: MistralLargeTokenizer, draft: str, fails_at: int
) -> None:
    """What was drafted and not taken is not in the cache, wherever the reader of the tokens fails."""
    drafted: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if draft == "model":
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        other.generation_config.num_assistant_tokens_schedule = "constant"
        drafted = {"assistant_model": other}
    session = ChatSession(model, tokenizer)
    read: list[int] = []

    def take(ids: list[int]) -> None:
        read.extend(ids)
        if len(read) == fails_at:
            raise BrokenError

    for messages in turns(2):
        prompt = session.prompt(messages)
        expected = fresh(session, prompt, **GREEDY)
        read.clear()
        with pytest.raises(BrokenError):
            session.generate(prompt, on_tokens=take, **CHUNKED, **drafted)
        assert read == expected[:fails_at]
        assert session.cached_tokens == len(prompt) + fails_at - 1
        read.clear()
        read.append(0)
        assert session.generate(prompt, **CHUNKED, **drafted) == expected
    assert session.speculation.proposed or draft == "lookup"


def test_a_callers_own_speculation_counts(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(model, tokenizer)
    with Speculation() as speculation:
        session.respond([SYSTEM, {"role": "user", "content": "a b a b"}], prompt_lookup_num_tokens=2, **GREEDY)
    assert speculation.written == 10


@pytest.mark.slow
def test_golden_conversations_as_messages_and_events(demo: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(demo, tokenizer)
    for golden in GOLDEN.values():
        events: list[Any] = []
        message = session.respond(golden.messages, golden.tools, on_event=events.append, do_sample=False)
        expected = tokenizer.parse_response(golden.answer)
        said = "".join(event.text for event in events if isinstance(event, TextEvent))
        calls = [event.tool_call for event in events if not isinstance(event, TextEvent)]
        assert message["content"] == expected["content"] == said
        assert calls == message.get("tool_calls", [])
        assert [call["function"] for call in calls] == [call["function"] for call in expected.get("tool_calls", [])]


@pytest.mark.slow
def test_a_tool_loop_reads_each_result_alone(demo: Any, tokenizer: MistralLargeTokenizer) -> None:
    def get_current_weather(location: str, format: str) -> int:
        """
        Get the current weather

        Args:
            location: The city and state, e.g. San Francisco, CA
            format: The temperature unit to use. Infer this from the users location. (choices: ["celsius", "fahrenheit"])
        """  # noqa: E501  # the text that the demo model knows
        return 22

    session = ChatSession(demo, tokenizer)
    read: list[int] = []

    def generate(messages: Any, tools: Any) -> Any:
        message = session.respond(messages, tools, do_sample=False)
        read.append(session.prompt_tokens - session.reused_tokens)
        return message

    messages = run_tool_loop(generate, GOLDEN["weather_call"].messages, [get_current_weather])
    assert messages[-1] == {"role": "assistant", "content": GOLDEN["weather_answer"].answer}
    # The call itself is written as the model wrote it, so that its result and little else is new.
    assert read[1] < read[0] / 2


def test_a_continued_message(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(model, tokenizer)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It was"}]
    message = session.respond(messages, continue_final_message=True, **GREEDY)
    prompt = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert message == tokenizer.parse_response(fresh(session, prompt, **GREEDY), prefix=prompt)


@pytest.mark.slow
def test_stopping(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(model, tokenizer)
    messages = turns(3)[2]
    prompt = session.prompt(messages)
    expected = fresh(session, prompt, **CHUNKED)
    progress: list[tuple[int, int]] = []

    def stop_after_chunks(read: int, of: int) -> None:
        progress.append((read, of))
        if read == 23:
            session.stop()

    assert session.respond(messages, on_prefill=stop_after_chunks, **CHUNKED) == {"role": "assistant", "content": ""}
    assert progress == [(0, len(prompt)), (23, len(prompt))]
    assert (session.was_stopped, session.cached_tokens) == (True, 23)
    read: list[int] = []

    def stop_after_three(ids: list[int]) -> None:
        read.extend(ids)
        if len(read) == 3:
            session.stop()

    progress.clear()
    written = session.generate(
        prompt, on_tokens=stop_after_three, on_prefill=lambda read, of: progress.append((read, of)), **CHUNKED
    )
    assert written == read == expected[:3]
    assert progress[0] == (23, len(prompt))
    assert progress[-1] == (len(prompt), len(prompt))
    assert session.was_stopped
    assert session.generate(prompt, **CHUNKED) == expected
    assert not session.was_stopped


@pytest.mark.slow
def test_stopped_responses_call_no_tools(demo: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(demo, tokenizer)
    golden = GOLDEN["weather_call"]
    message = session.respond(golden.messages, golden.tools, on_event=lambda _: session.stop(), do_sample=False)
    assert (message, session.was_stopped) == ({"role": "assistant", "content": ""}, True)


def test_what_others_did_to_the_cache_is_not_taken_for_the_sessions(
    model: Any, tokenizer: MistralLargeTokenizer
) -> None:
    session = ChatSession(model, tokenizer)
    prompt = session.prompt([{"role": "user", "content": "a b c d e f g"}])
    expected = session.generate(prompt, **GREEDY)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), **cache_argument(session.cache))
    assert session.generate(prompt, **GREEDY) == expected
    assert session.reused_tokens == 0


def test_reset_forgets_what_was_read(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    other = copy.deepcopy(model)
    session = ChatSession(other, tokenizer)
    prompt = session.prompt([{"role": "user", "content": "a b c d e f g"}])
    session.generate(prompt, **GREEDY)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    session.reset()
    assert session.generate(prompt, **GREEDY) == fresh(session, prompt, **GREEDY)


def test_a_streamer_gets_what_it_gets_of_generate(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.values.append(value.tolist())

        def end(self) -> None:
            self.values.append("end")

    session, ours, theirs = ChatSession(model, tokenizer), Recorder(), Recorder()
    prompt = session.prompt([SYSTEM, {"role": "user", "content": "Who?"}])
    session.generate(prompt, streamer=ours, **GREEDY)
    fresh(session, prompt, streamer=theirs, **GREEDY)
    assert ours.values == theirs.values


@pytest.mark.slow
def test_stop_strings_need_no_tokenizer(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(model, tokenizer)
    prompt = session.prompt([{"role": "user", "content": "Who?"}])
    written = fresh(session, prompt, **GREEDY)
    piece = str(tokenizer.decode(written[4:6])).strip()
    assert session.generate(prompt, stop_strings=[piece], **GREEDY) == fresh(
        session, prompt, stop_strings=[piece], tokenizer=tokenizer, **GREEDY
    )
    assert session.response_tokens < len(written)


def test_lengths(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(model, tokenizer, StaticCache(config=model.config, max_cache_len=32))
    assert session.context_length == 32
    prompt = session.prompt([{"role": "user", "content": "Who?"}])
    assert len(session.generate(prompt, max_length=len(prompt) + 5, do_sample=False)) == 5
    # Neither is beyond the context.
    assert len(session.generate(prompt, do_sample=False)) == 32 - len(prompt)
    assert len(session.generate(prompt, max_new_tokens=1000, do_sample=False)) == 32 - len(prompt)
    long = [{"role": "user", "content": "1" * 200}]
    length = len(session.prompt(long))
    with raises_exactly(
        ConversationError, f"the conversation has {length} tokens; the model reads fewer than 32; leave out messages"
    ):
        session.respond(long)


OWN = "is the ChatSession's own; leave it out, or call the model's generate"
ONE_SEQUENCE = "a ChatSession writes one sequence; pass 1, or call the model's generate"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"past_key_values": None}, f"past_key_values: {OWN}"),
        ({"input_ids": [[1]]}, f"input_ids: {OWN}"),
        ({"use_cache": False}, f"use_cache: {OWN}"),
        ({"num_beams": 2}, f"num_beams: {ONE_SEQUENCE}"),
        ({"num_return_sequences": 3, "do_sample": True}, f"num_return_sequences: {ONE_SEQUENCE}"),
    ],
)
def test_options_of_its_own_are_refused(
    model: Any, tokenizer: MistralLargeTokenizer, options: dict[str, Any], problem: str
) -> None:
    with raises_exactly(SettingError, problem):
        ChatSession(model, tokenizer).respond([{"role": "user", "content": "Who?"}], **options)


def test_two_responses_at_once_are_refused(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    session = ChatSession(model, tokenizer)
    prompt = session.prompt([{"role": "user", "content": "Who?"}])

    def ask_again(_: list[int]) -> None:
        session.generate(prompt)

    with raises_exactly(
        SettingError,
        "this ChatSession writes another response, and its cache is of one conversation; wait for it, or make a "
        "session for each",
    ):
        session.generate(prompt, on_tokens=ask_again, **GREEDY)
    assert session.generate(prompt, **GREEDY) == fresh(session, prompt, **GREEDY)


def test_caches_that_cannot_be_used_are_refused(model: Any, tokenizer: MistralLargeTokenizer) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), **cache_argument(cache))
    with raises_exactly(
        SettingError,
        "DynamicCache: holds 3 tokens that the session does not know; pass an empty cache, or none",
    ):
        ChatSession(model, tokenizer, cache)

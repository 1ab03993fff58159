"""The tool cycle: calls run by their schema, errors go back to the model, and it ends."""

import asyncio
import contextvars
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePosixPath
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, NamedTuple
from uuid import UUID

import numpy as np
import pydantic
import pytest
import torch
import transformers
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import get_json_schema

from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.generation.tool_loop import generate_with, run_tool_loop
from modeling_mistral_large.instruct.prompt import build_prompt
from modeling_mistral_large.instruct.tool_schemas import describe_function
from tests.support.conversations import Conversation, reference_ids
from tests.support.errors import raises_exactly, whole

Message = dict[str, Any]

QUESTION = [{"role": "user", "content": "What's the weather like in Paris?"}]


def get_current_weather(location: str, days: int = 1, unit: Literal["celsius", "kelvin"] = "celsius") -> dict[str, Any]:
    """
    Get the current weather

    Args:
        location: The city
        days: How many days
        unit: The unit
    """
    return {"location": location, "days": days, "temperature": 22 if unit == "celsius" else 295}


def say(text: str) -> str:
    """
    Say something

    Args:
        text: What to say
    """
    return text


def weigh(
    items: list[float] | dict[str, Any], note: str | None, exact: bool, unit: int | str = "kg", extra: Any = None
) -> Any:
    """
    Weigh some things

    Args:
        items: Their weights
        note: A note
        exact: Whether to be exact
        unit: The unit, or its number
        extra: More
    """
    total = sum(items if isinstance(items, list) else items.values())
    return {"sum": total, "note": note, "exact": exact, "on": date(2024, 7, 24), "unit": unit, "extra": extra}


def fail() -> None:
    """Fail."""
    raise RuntimeError("out of order \ud800")


TOOLS: list[Callable[..., Any]] = [get_current_weather, say, weigh, fail]


def calling(*calls: tuple[str, Any]) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": f"abcdefgh{number}", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(calls)
        ],
    }


def script(*answers: Message) -> Callable[[list[Message], Sequence[Any]], Message]:
    """Return a model that gives these answers, one after the other."""
    remaining = iter(answers)

    def generate(messages: list[Message], tools: Sequence[Any]) -> Message:
        # The real one renders the prompt: whatever the tools gave has to fit into it.
        build_prompt(messages, tools)
        return next(remaining)

    return generate


DONE = {"role": "assistant", "content": "It is 22 °C."}


def result_of(name: str, arguments: Any) -> Any:
    """Return what a call puts into the conversation."""
    messages = run_tool_loop(script(calling((name, arguments)), DONE), QUESTION, TOOLS)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    return messages[2]["content"]


def test_the_whole_cycle() -> None:
    first = calling(("get_current_weather", {"location": "Paris"}), ("say", {"text": "Wait."}))
    second = calling(("get_current_weather", {"location": "Paris", "unit": "kelvin"}))
    before = json.dumps(QUESTION)
    messages = run_tool_loop(script(first, second, DONE), QUESTION, TOOLS)
    paris = '{"location": "Paris", "days": 1, "temperature": 22}'
    assert messages == [
        *QUESTION,
        first,
        {"role": "tool", "tool_call_id": "abcdefgh0", "name": "get_current_weather", "content": paris},
        {"role": "tool", "tool_call_id": "abcdefgh1", "name": "say", "content": "Wait."},
        second,
        {
            "role": "tool",
            "tool_call_id": "abcdefgh0",
            "name": "get_current_weather",
            "content": paris.replace("22", "295"),
        },
        DONE,
    ]
    assert json.dumps(QUESTION) == before


def test_an_answer_without_calls_ends_it() -> None:
    assert run_tool_loop(script(DONE), QUESTION, TOOLS) == [*QUESTION, DONE]


def test_rounds_are_limited() -> None:
    messages = run_tool_loop(script(*[calling(("say", {"text": "x"}))] * 9), QUESTION, TOOLS, max_rounds=3)
    assert [message["role"] for message in messages] == ["user", *("assistant", "tool") * 3]


# transformers 5.17 says nothing of a list's items in the schema of a function, so the function itself finds out.
SAYS_ITEMS = tuple(map(int, transformers.__version__.split(".")[:2])) > (5, 17)
ITEMS_PROBLEM = "items is ['1'] and must fit" if SAYS_ITEMS else "TypeError"

ERRORS = {
    "unknown tool": ("search", {}, "there is no tool 'search'; the tools are get_current_weather, say, weigh, fail"),
    "text as arguments": ("say", "hi", "the arguments are 'hi' and must be an object"),
    "missing argument": ("weigh", {"items": []}, "the arguments lack note, exact"),
    "unknown argument": ("say", {"text": "x", "loud": True}, "there is no argument 'loud'; the arguments are text"),
    "text as a number": ("get_current_weather", {"location": "Paris", "days": "2"}, "days is '2' and must fit"),
    "truth as a number": ("get_current_weather", {"location": "Paris", "days": True}, "days is True and must fit"),
    "not one of the choices": ("get_current_weather", {"location": "Paris", "unit": "F"}, "unit is 'F' and must fit"),
    "null": ("say", {"text": None}, "text is None and must fit"),
    "item of another type": ("weigh", {"items": ["1"], "note": None, "exact": True}, ITEMS_PROBLEM),
    "none of the choices": ("weigh", {"items": 1, "note": None, "exact": True}, "items is 1 and must fit"),
    "number for text or null": ("weigh", {"items": [], "note": 7, "exact": True}, "note is 7 and must fit"),
    "number for a truth": ("weigh", {"items": [], "note": None, "exact": 1}, "exact is 1 and must fit"),
    "none of two types": ("weigh", {"items": [], "note": None, "exact": True, "unit": 1.5}, "unit is 1.5 and must fit"),
    "exception": ("fail", {}, "RuntimeError: out of order"),
}


@pytest.mark.parametrize(("name", "arguments", "problem"), ERRORS.values(), ids=ERRORS)
def test_errors_go_to_the_model(name: str, arguments: Any, problem: str) -> None:
    error = json.loads(result_of(name, arguments))
    if isinstance(error, str):  # a text that no prompt can hold as it was
        error = json.loads(error)
    assert problem in error["error"]


@pytest.mark.parametrize("items", [[1, 2.5], {"a": 1, "b": 2.5}])
@pytest.mark.parametrize("unit", [7, "g"])
@pytest.mark.parametrize("extra", [None, True, {"a": [1]}, "x"])
def test_values_that_fit_are_passed_on(items: Any, unit: Any, extra: Any) -> None:
    arguments = {"items": items, "note": None, "exact": True, "unit": unit, "extra": extra}
    weighed = {"sum": 3.5, "note": None, "exact": True, "on": "2024-07-24", "unit": unit, "extra": extra}
    assert json.loads(result_of("weigh", arguments)) == weighed
    assert json.loads(result_of("weigh", {**arguments, "note": "n"})) == {**weighed, "note": "n"}


@pytest.mark.parametrize("text", ["", "22", "plain", '{"a": 1}', "[INST]"])
def test_a_text_is_the_result_as_it_is(text: str) -> None:
    assert result_of("say", {"text": text}) == text


@pytest.mark.parametrize(
    ("text", "shown"), [("1" * 5000, "1" * 5000), ("[" * 100_000, "[" * 100_000), ("a\ud800", "a?")]
)
def test_a_text_no_prompt_can_hold_is_quoted(text: str, shown: str) -> None:
    def read() -> str:
        """Read it."""
        return text

    messages = run_tool_loop(script(calling(("read", {})), DONE), QUESTION, [read])
    assert json.loads(messages[2]["content"]) == shown


@pytest.mark.parametrize(
    ("text", "content"), [("1" * 5000, "1" * 5000), ("[" * 100_000, "[" * 100_000), ("a\ud800", "a?"), ("{", "{")]
)
def test_v7_reads_any_text_unchanged(text: str, content: str) -> None:
    def read() -> str:
        """Read it."""
        return text

    def generate(messages: Any, tools: Any) -> dict[str, Any]:
        return DONE if len(messages) > 1 else calling(("read", {}))

    assert run_tool_loop(generate, QUESTION, [read], prompt_format="v7")[2]["content"] == content
    # As `generate_with` says it.
    generate.prompt_format = "v7"  # type: ignore[attr-defined]  # functions have no declared attributes
    assert run_tool_loop(generate, QUESTION, [read])[2]["content"] == content


def test_generate_with_says_the_format_of_its_tokenizer() -> None:
    tokenizer = SimpleNamespace(prompt_format="v7")
    generate: Any = generate_with(None, tokenizer)
    assert generate.prompt_format == "v7"


def test_tools_are_checked_first() -> None:
    with raises_exactly(
        ConversationError,
        "tool 0: <lambda> has no docstring; the model reads what a function does; write one",
    ):
        run_tool_loop(script(), QUESTION, [lambda x: x])
    with raises_exactly(
        ConversationError,
        "tools say, say: two have one name; the model calls tools by name; rename one",
    ):
        run_tool_loop(script(), QUESTION, [say, say])


@pytest.mark.parametrize("tools", [say, {"say": say}, "say", iter([say]), {say}])
def test_tools_are_a_list(tools: Any) -> None:
    with raises_exactly(ConversationError, f"tools {tools!r}: tools are a list, even if there is one; pass tools=[…]"):
        run_tool_loop(script(), QUESTION, tools)


# Async tools

Ran = list[str]


def async_tools(ran: Ran) -> dict[str, Callable[..., Any]]:
    """Return tools of every kind that give an awaitable, each of which notes that it ran."""

    async def tide_table(harbour: str) -> str:
        """
        Hours of high water

        Args:
            harbour: The harbour
        """
        await asyncio.sleep(0)
        ran.append(harbour)
        return "06:41"

    @functools.wraps(tide_table)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return tide_table(*args, **kwargs)

    @functools.wraps(tide_table)
    async def wrapped_async(*args: Any, **kwargs: Any) -> Any:
        return await tide_table(*args, **kwargs)

    class Almanac:
        async def tide_table(self, harbour: str) -> str:
            """
            Hours of high water

            Args:
                harbour: The harbour
            """
            return await tide_table(harbour)

        async def __call__(self, harbour: str) -> str:
            """
            Hours of high water

            Args:
                harbour: The harbour
            """
            return await tide_table(harbour)

    class Later:
        def __init__(self, harbour: str) -> None:
            self.harbour = harbour

        def __await__(self) -> Any:
            return tide_table(self.harbour).__await__()

    def awaitable(harbour: str) -> Any:
        """
        Hours of high water

        Args:
            harbour: The harbour
        """
        return Later(harbour)

    return {
        "function": tide_table,
        "wrapped": wrapped,
        "wrapped async": wrapped_async,
        "method": Almanac().tide_table,
        "object": Almanac(),
        "partial": functools.partial(tide_table),
        "partial of a method": functools.partial(Almanac().tide_table),
        "partial of an object": functools.partial(Almanac()),
        "another awaitable": awaitable,
    }


def run_one(tool: Callable[..., Any], arguments: Any) -> Any:
    """Return what a call of the one tool puts into the conversation."""
    name = describe_function(tool, "tool")["function"]["name"]
    return run_tool_loop(script(calling((name, arguments)), DONE), QUESTION, [tool])[2]["content"]


@pytest.mark.parametrize("kind", list(async_tools([])))
@pytest.mark.parametrize("in_a_loop", [False, True])
def test_async_tools_are_awaited(kind: str, in_a_loop: bool) -> None:
    ran: Ran = []
    tool = async_tools(ran)[kind]

    async def inside() -> Any:
        return run_one(tool, {"harbour": "Brest"})

    assert (asyncio.run(inside()) if in_a_loop else run_one(tool, {"harbour": "Brest"})) == "06:41"
    assert ran == ["Brest"]


def test_async_tools_share_an_event_loop_and_the_callers_context() -> None:
    loops = []
    language = contextvars.ContextVar("language", default="none")

    async def look() -> str:
        """Look."""
        loops.append(asyncio.get_running_loop())
        return language.get()

    async def inside() -> list[Message]:
        return run_tool_loop(script(calling(("look", {}), ("look", {})), DONE), QUESTION, [look])

    language.set("fr")
    for messages in (
        asyncio.run(inside()),
        run_tool_loop(script(calling(("look", {}), ("look", {})), DONE), QUESTION, [look]),
    ):
        assert [message["content"] for message in messages[2:4]] == ["fr", "fr"]
    first, again, second, last = loops
    assert first is again
    assert second is last
    assert first is not second
    assert first.is_closed()
    assert second.is_closed()


def test_what_an_async_tool_raises_goes_to_the_model() -> None:
    async def fail_later() -> None:
        """Fail."""
        raise RuntimeError("out of order")

    assert json.loads(run_one(fail_later, {})) == {"error": "RuntimeError: out of order"}


def test_a_tool_may_run_a_loop_of_its_own() -> None:
    async def ask() -> Any:
        """Ask another."""
        return run_one(async_tools([])["function"], {"harbour": "Brest"})

    assert run_one(ask, {}) == "06:41"


def test_generators_are_refused_before_the_model_is_asked() -> None:
    async def stream() -> Any:
        """Stream."""
        yield 1

    def count() -> Any:
        """Count."""
        yield 1

    for tool, name in ((stream, "stream"), (count, "count"), (functools.partial(stream), "stream")):
        with raises_exactly(
            ConversationError, f"tool 0 ({name}): a generator has no one result; return a list of its items"
        ):
            run_tool_loop(script(), QUESTION, [tool])

    @functools.wraps(say)
    def hidden(text: str) -> Any:
        return stream()

    with pytest.raises(
        ConversationError,
        match=r"^the result of tool say: async_generator <async_generator object .*; "
        r"it is no JSON value; convert it to numbers, text, lists and objects of them$",
    ):
        run_one(hidden, {"text": "x"})


def test_a_task_of_a_loop_that_waits_is_refused() -> None:
    def begin() -> Any:
        """Begin."""
        return asyncio.get_running_loop().create_task(asyncio.sleep(0))

    async def inside() -> Any:
        return run_one(begin, {})

    with raises_exactly(
        ConversationError,
        "the result of tool begin: a task of an event loop that waits for this call to end; make the tool an async "
        "function",
    ):
        asyncio.run(inside())


# Callables that are no plain functions


def tide(harbour: str, /, day: int = 1, *, unit: str = "m") -> str:
    """
    Height of the tide

    Args:
        harbour: The harbour
        day: The day
        unit: The unit
    """
    return f"{harbour} {day} {unit}"


class Harbour:
    """A harbour."""

    def tide(self, day: int) -> str:
        """
        Height of the tide

        Args:
            day: The day
        """
        return f"day {day}"

    def __call__(self, day: int) -> str:
        """
        Height of the tide

        Args:
            day: The day
        """
        return f"day {day}"

    @classmethod
    def high(cls, day: int) -> str:
        """
        Height of the tide

        Args:
            day: The day
        """
        return f"day {day}"

    @staticmethod
    def low(day: int) -> str:
        """
        Height of the tide

        Args:
            day: The day
        """
        return f"day {day}"


def keyed(harbour: str, key: str) -> str:
    """
    Height of the tide

    Args:
        harbour: The harbour
        key: The key of the service
    """
    return f"{harbour} {key}"


with_key = functools.partial(keyed, key="secret")
dressed = functools.update_wrapper(functools.partial(keyed, "Brest"), keyed)
renamed = functools.partial(keyed, key="secret")
renamed.__name__ = "height"  # type: ignore[attr-defined]  # a partial takes attributes

CALLABLES: dict[str, tuple[Callable[..., Any], str, list[str], dict[str, Any], str]] = {
    "positional": (tide, "tide", ["harbour", "day", "unit"], {"harbour": "Brest", "unit": "ft"}, "Brest 1 ft"),
    "cached": (functools.lru_cache(tide), "tide", ["harbour", "day", "unit"], {"harbour": "Brest"}, "Brest 1 m"),
    "partial": (with_key, "keyed", ["harbour"], {"harbour": "Brest"}, "Brest secret"),
    "partial by place": (functools.partial(keyed, "Brest"), "keyed", ["key"], {"key": "k"}, "Brest k"),
    "dressed partial": (dressed, "keyed", ["key"], {"key": "k"}, "Brest k"),
    "named partial": (renamed, "height", ["harbour"], {"harbour": "Brest"}, "Brest secret"),
    "partial of cached": (
        functools.partial(functools.cache(keyed), key="k"),
        "keyed",
        ["harbour"],
        {"harbour": "B"},
        "B k",
    ),
    "method": (Harbour().tide, "tide", ["day"], {"day": 3}, "day 3"),
    "class method": (Harbour.high, "high", ["day"], {"day": 3}, "day 3"),
    "static method": (Harbour.low, "low", ["day"], {"day": 3}, "day 3"),
    "object": (Harbour(), "Harbour", ["day"], {"day": 3}, "day 3"),
}


@pytest.mark.parametrize(("tool", "name", "names", "arguments", "result"), CALLABLES.values(), ids=CALLABLES)
def test_callables_are_tools(tool: Any, name: str, names: list[str], arguments: dict[str, Any], result: str) -> None:
    function = describe_function(tool, "tool")["function"]
    assert (function["name"], function["description"]) == (name, "Height of the tide")
    assert list(function["parameters"]["properties"]) == names
    assert run_one(tool, arguments) == result
    extra = json.loads(run_one(tool, {**arguments, "other": 1}))
    assert "there is no argument 'other'" in extra["error"]


def test_what_a_partial_sets_is_not_the_models_to_choose() -> None:
    error = json.loads(run_one(with_key, {"harbour": "Brest", "key": "mine"}))["error"]
    assert error == "there is no argument 'key'; the arguments are harbour"


def add(first: int, *rest: int) -> int:
    """
    Add

    Args:
        first: One
        rest: The others
    """
    return sum(rest, first)


def choose(first: int, **rest: int) -> int:
    """
    Choose

    Args:
        first: One
        rest: The others
    """
    return first


@functools.cache
def bare(*args: Any, **kwargs: Any) -> Any:
    """Do anything."""


BY_NAME = "the arguments of a call are one object, each by its name; name them, or take a list or a dict"


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        (add, f" (add): *rest: int; {BY_NAME}"),
        (functools.partial(add, 1), f" (add): *rest: int; {BY_NAME}"),
        (choose, f" (choose): **rest: int; {BY_NAME}"),
        (bare, f" (bare): *args: Any; {BY_NAME}"),
        (Harbour.tide, " (tide): self is not bound; pass the method of an object"),
        (
            functools.partial(lambda x: x),
            ": <lambda> has no docstring; the model reads what a function does; write one",
        ),
    ],
)
def test_a_function_that_no_call_could_fill_is_refused(tool: Any, problem: str) -> None:
    with raises_exactly(ConversationError, f"tool 0{problem}"):
        run_tool_loop(script(), QUESTION, [tool])
    with raises_exactly(ConversationError, f"tool 0{problem}"):
        build_prompt(QUESTION, [tool])


# Results

Unit = Enum("Unit", {"METRE": "m", "FOOT": 0.3048})


@dataclasses.dataclass
class Report:
    harbour: str
    at: Any


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    day: date
    value: Any = None


class Place(NamedTuple):
    x: int
    y: Any


NOW = datetime(2024, 7, 24, 6, 41, tzinfo=timezone.utc)
HASH = UUID("12345678-1234-5678-1234-567812345678")
NAN, INFINITY = float("nan"), float("inf")

# A result, and the value that the model reads.
RESULTS: dict[str, tuple[Any, Any]] = {
    "nothing": (None, None),
    "truth": (True, True),
    "numpy truth": (np.bool_(False), False),
    "numpy whole number": (np.int64(2**62), 2**62),
    "numpy byte": (np.uint8(255), 255),
    "numpy half": (np.float16(0.1), float(np.float16(0.1))),
    "numpy single": (np.float32(0.1), float(np.float32(0.1))),
    "numpy double": (np.float64(0.1), 0.1),
    "numpy long": (np.longdouble(0.5), 0.5),
    "numpy text": ([np.str_("x")], ["x"]),
    "numpy day": (np.datetime64("2024-07-24"), "2024-07-24"),
    "numpy nanosecond": (np.datetime64("2024-07-24T06:41:00.000000001"), "2024-07-24T06:41:00.000000001"),
    "numpy no time": (np.datetime64("NaT"), None),
    "array alone": (np.array(7), 7),
    "array": (np.arange(6).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
    "array of truths": (np.array([True, False]), [True, False]),
    "array of objects": (np.array([np.int8(1), None, {"a": np.int8(2)}], dtype=object), [1, None, {"a": 2}]),
    "array of times": (
        np.array(["2024-07-24T06:41", "NaT"], "datetime64[ns]"),
        ["2024-07-24T06:41:00.000000000", None],
    ),
    "empty array": (np.zeros((0, 2)), []),
    "torch number": (torch.tensor(7), 7),
    "torch array": (torch.tensor([1.5, 2.0], dtype=torch.bfloat16, requires_grad=True), [1.5, 2.0]),
    "dataclass": (Report("Brest", np.float64(3.5)), {"harbour": "Brest", "at": 3.5}),
    "dataclasses": ([Report("Brest", NOW)], [{"harbour": "Brest", "at": "2024-07-24T06:41:00+00:00"}]),
    "model": (Model(day=date(2024, 7, 24), value=Decimal("1.5")), {"day": "2024-07-24", "value": "1.5"}),
    "model of a number that is numpy's": (
        Model(day=date(2024, 7, 24), value=np.int8(1)),
        {"day": "2024-07-24", "value": 1},
    ),
    "models by name": ({"a": [Model(day=date(2024, 7, 24))]}, {"a": [{"day": "2024-07-24", "value": None}]}),
    "named tuple": (Place(1, np.int8(2)), [1, 2]),
    "tuple": ((1, (2, np.int8(3))), [1, [2, 3]]),
    "set": ({10, 9, "b", "a"}, [9, 10, "a", "b"]),
    "frozen set": (frozenset({np.int64(2)}), [2]),
    "range": (range(3), [0, 1, 2]),
    "values": ({"a": 1}.values(), [1]),
    "whole decimal": (Decimal("12"), 12),
    "decimal": (Decimal("19.90"), 19.9),
    "exact decimal": (Decimal("0.12345678901234567890"), "0.12345678901234567890"),
    "large decimal": (Decimal("1E+30"), 10**30),
    "huge decimal": (Decimal("1E+999999"), "1E+999999"),
    "no decimal": (Decimal("NaN"), NAN),
    "endless decimal": (Decimal("-Infinity"), -INFINITY),
    "fraction": (Fraction(1, 2), 0.5),
    "not a number": (np.float32("nan"), NAN),
    "endless": (np.float64("inf"), INFINITY),
    "day": (date(2024, 7, 24), "2024-07-24"),
    "moment": (NOW, "2024-07-24T06:41:00+00:00"),
    "time": (time(6, 41), "06:41:00"),
    "hash": (HASH, str(HASH)),
    "path": (PurePosixPath("a/b"), "a/b"),
    "enum": ([Unit.METRE, Unit.FOOT], ["m", 0.3048]),
    "mapping": (MappingProxyType({"a": np.int8(1)}), {"a": 1}),
    "keys": (
        {1: 0, 2.5: 0, None: 0, False: 0, np.int8(3): 0, Unit.METRE: 0, NOW.date(): 0, HASH: 0},
        dict.fromkeys(["1", "2.5", "null", "false", "3", "m", "2024-07-24", str(HASH)], 0),
    ),
}


@pytest.mark.parametrize(("result", "value"), RESULTS.values(), ids=RESULTS)
def test_results_are_json(result: Any, value: Any) -> None:
    def read() -> Any:
        """Read it."""
        return result

    for wrapped, wanted in ((result, value), ([{"a": result}], [{"a": value}])):
        result = wrapped
        text = run_one(read, {})
        assert text == json.dumps(wanted, ensure_ascii=False)


@pytest.mark.slow
def test_results_of_pandas_are_json() -> None:
    pandas = pytest.importorskip("pandas")

    results: list[Any] = []

    def read() -> Any:
        """Read it."""
        return results[-1]

    table = pandas.DataFrame({"a": [1, 2]})
    moment = pandas.Timestamp("2024-07-24T06:41")
    for result, wanted in (
        (table["a"].sum(), 3),
        (table["a"].mean(), 1.5),
        ([pandas.NA, pandas.NaT, moment], [None, None, moment.isoformat()]),
        (table["a"].tolist(), [1, 2]),
        (table.to_dict("records"), [{"a": 1}, {"a": 2}]),
        (pandas.Index(["x"]), ["x"]),
        (table, [{"a": 1}, {"a": 2}]),
        ({"a": table}, {"a": [{"a": 1}, {"a": 2}]}),
        (pandas.DataFrame({"at": [moment], 5: ["x"], "n": [pandas.NA]}), [{"at": str(moment), "5": "x", "n": None}]),
        (pandas.DataFrame(), []),
        (table["a"], [1, 2]),
        (table.iloc[0], {"a": 1}),
        (table["a"][1:], {"1": 2}),
        (pandas.Series([1, 2], index=["b", "a"]), {"b": 1, "a": 2}),
        (table.groupby("a").size(), {"1": 1, "2": 1}),
    ):
        results.append(result)
        assert json.loads(run_one(read, {})) == wanted
    assert table.to_dict("records") == [{"a": 1}, {"a": 2}]
    rows = "its index has no place in a list of rows; take .reset_index(), or .reset_index(drop=True)"
    for result, rule in (
        (table[1:], rows),
        (table.rename_axis("n"), rows),
        ({"a": table.set_index("a")}, rows),
        (
            pandas.concat([table, table], axis="columns"),
            "two columns have one name, a JSON object has each key once; rename one",
        ),
        (
            pandas.Series([1, 2], index=["a", "a"]),
            "its index has a label twice, a JSON object each key once; take .tolist()",
        ),
        (table.groupby("a"), NO_VALUE),
    ):
        results.append(result)
        with pytest.raises(ConversationError, match=whole(f"the result of tool read: pandas.<*>; {rule}")):
            run_one(read, {})


ITSELF: list[Any] = []
ITSELF.append(ITSELF)

NO_VALUE = "it is no JSON value; convert it to numbers, text, lists and objects of them"
NO_NUMBER = "no JSON number is equal to it; convert it to a float or text"
NO_RESULTS: dict[str, tuple[Any, str]] = {
    "object": (object(), f"object <object object at <*>>; {NO_VALUE}"),
    "bytes": (b"x", f"bytes b'x'; {NO_VALUE}"),
    "numpy bytes": (np.bytes_(b"x"), f"bytes b'x'; {NO_VALUE}"),
    "complex": (1j, f"complex 1j; {NO_VALUE}"),
    "numpy complex": (np.complex64(1j), f"complex 1j; {NO_VALUE}"),
    "duration": (timedelta(1), f"datetime.timedelta datetime.timedelta(days=1); {NO_VALUE}"),
    "numpy duration": (
        np.timedelta64(1, "D"),
        "numpy.timedelta64 <*>; a duration is no JSON value; convert it to a number with its unit",
    ),
    "fraction": (Fraction(1, 3), f"fractions.Fraction Fraction(1, 3); {NO_NUMBER}"),
    "long": (np.longdouble("0.1"), f"numpy.longdouble <*>; {NO_NUMBER}"),
    "records": (
        np.zeros(2, dtype=[("a", "i4")]),
        "numpy.ndarray array([(0,), (0,)], dtype=[('a', '<i4')]); its fields would lose their names; convert it to "
        "objects",
    ),
    "sparse": (torch.eye(2).to_sparse(), "torch.Tensor tensor(indices=<*>…; <*>; convert it to a list of numbers"),
    "iterator": (iter([1]), f"list_iterator <list_iterator object at <*>>; {NO_VALUE}"),
    "function": (len, f"builtin_function_or_method <built-in function len>; {NO_VALUE}"),
    "class": (Report, f"type {Report!r}; {NO_VALUE}"),
    "error": (ValueError("x"), f"ValueError ValueError('x'); {NO_VALUE}"),
    "itself": (ITSELF, "maximum recursion depth <*>; JSON has fewer levels, and an end; make it flatter"),
    "key": ({(1, 2): 3}, "tuple (1, 2); a key of a JSON object is text; convert it"),
    "keys that are one": ({1: "a", "1": "b"}, "two keys '1'; a JSON object has one of each; rename one"),
}


@pytest.mark.parametrize(("result", "problem"), NO_RESULTS.values(), ids=NO_RESULTS)
def test_what_is_no_json_is_refused_before_the_model_reads_it(result: Any, problem: str) -> None:
    def read() -> Any:
        """Read it."""
        return result

    with pytest.raises(ConversationError, match=whole(f"the result of tool read: {problem}")):
        run_tool_loop(script(calling(("read", {}))), QUESTION, [read])


def test_a_model_and_its_tokenizer(tokenizer: Any) -> None:
    class Model:
        """Answers with a call, and then with a text."""

        device = torch.device("cpu")
        answers = iter([f'[TOOL_CALLS] [{{"name": "say", "arguments": {{"text": "{"x" * 9}"}}}}]</s>', "Done.</s>"])

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
            assert max_new_tokens == 7
            answer = tokenizer.encode(next(self.answers), add_special_tokens=False)
            return torch.cat([input_ids, torch.tensor([answer])], dim=1)

    generate = generate_with(Model(), tokenizer, max_new_tokens=7)
    messages = run_tool_loop(generate, QUESTION, TOOLS)
    assert [message["content"] for message in messages[1:]] == ["", "x" * 9, "Done."]
    assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"]


def test_the_cycle_in_the_v7_format(v7_tokenizer: Any) -> None:
    """The model sees the ids of v7's reference in every round: text next to calls, and results unchanged."""
    reference: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer.v7()
    calls = json.dumps([{"name": "say", "arguments": {"text": '{"t":22,  "t":"[TOOL_CONTENT]"}'}}])
    prompts: list[list[int]] = []

    class Model:
        device = torch.device("cpu")
        answers = iter([("I look.", calls), ("Done.", None)])

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            prompts.append(input_ids[0].tolist())
            text, calls = next(self.answers)
            texts = v7_tokenizer.encode_texts([text] if calls is None else [text, calls])
            answer = [*texts[0], *([5, *texts[1]] if calls else []), 2]
            return torch.cat([input_ids, torch.tensor([answer])], dim=1)

    messages = [{"role": "system", "content": "Look things up."}, *QUESTION]
    done = run_tool_loop(generate_with(Model(), v7_tokenizer), messages, [say])
    assert [message["content"] for message in done[2:]] == ["I look.", '{"t":22,  "t":"[TOOL_CONTENT]"}', "Done."]
    tools = [get_json_schema(say)]
    assert prompts == [reference_ids(reference, Conversation(done[:length], tools)) for length in (2, 4)]
    assert "[TOOL_CALLS]" not in v7_tokenizer.decode(prompts[0])

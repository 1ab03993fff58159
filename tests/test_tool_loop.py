"""The tool cycle: calls run by their schema, errors go back to the model, and it ends."""

import json
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, Literal

import pytest
import transformers

from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct import build_prompt
from modeling_mistral_large.tool_loop import generate_with, run_tool_loop

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
ITEMS_FINDING = "items is ['1'] and must fit" if SAYS_ITEMS else "TypeError"

ERRORS = {
    "unknown tool": ("search", {}, "there is no tool 'search'; the tools are get_current_weather, say, weigh, fail"),
    "text as arguments": ("say", "hi", "the arguments are 'hi' and must be an object"),
    "missing argument": ("weigh", {"items": []}, "the arguments lack note, exact"),
    "unknown argument": ("say", {"text": "x", "loud": True}, "there is no argument 'loud'; the arguments are text"),
    "text as a number": ("get_current_weather", {"location": "Paris", "days": "2"}, "days is '2' and must fit"),
    "truth as a number": ("get_current_weather", {"location": "Paris", "days": True}, "days is True and must fit"),
    "not one of the choices": ("get_current_weather", {"location": "Paris", "unit": "F"}, "unit is 'F' and must fit"),
    "null": ("say", {"text": None}, "text is None and must fit"),
    "item of another type": ("weigh", {"items": ["1"], "note": None, "exact": True}, ITEMS_FINDING),
    "none of the choices": ("weigh", {"items": 1, "note": None, "exact": True}, "items is 1 and must fit"),
    "number for text or null": ("weigh", {"items": [], "note": 7, "exact": True}, "note is 7 and must fit"),
    "number for a truth": ("weigh", {"items": [], "note": None, "exact": 1}, "exact is 1 and must fit"),
    "none of two types": ("weigh", {"items": [], "note": None, "exact": True, "unit": 1.5}, "unit is 1.5 and must fit"),
    "exception": ("fail", {}, "RuntimeError: out of order"),
}


@pytest.mark.parametrize(("name", "arguments", "finding"), ERRORS.values(), ids=ERRORS)
def test_errors_go_to_the_model(name: str, arguments: Any, finding: str) -> None:
    error = json.loads(result_of(name, arguments))
    if isinstance(error, str):  # a text that no prompt can hold as it was
        error = json.loads(error)
    assert finding in error["error"]


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


def test_tools_are_checked_first() -> None:
    with pytest.raises(ConversationError, match="docstring"):
        run_tool_loop(script(), QUESTION, [lambda x: x])
    with pytest.raises(ConversationError, match="tools say, say: two have one name"):
        run_tool_loop(script(), QUESTION, [say, say])


def test_a_model_and_its_tokenizer(tokenizer: Any) -> None:
    import torch

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

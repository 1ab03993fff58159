"""Write the bundled conversations: a tool that the demo model does not know, and what it knows already.

    python examples/fine_tune/make_data.py [FOLDER]

train.jsonl asks in four ways for three cities; held_out.jsonl asks for numbers of days, and in a fifth way, that
train.jsonl never has. The format is OpenAI's for fine-tuning: `messages` and `tools`.
"""

import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from forecast import get_forecast
from transformers.utils.chat_template_utils import get_json_schema

from mistral_large_cli.demo import golden_conversations

Conversation: TypeAlias = dict[str, Any]

GET_FORECAST: dict[str, Any] = get_json_schema(get_forecast)
# It would make no difference to the prompt, but OpenAI's format does not have it.
del GET_FORECAST["function"]["return"]
LOCATIONS = {"Paris": "Paris, France", "London": "London, UK", "New York": "New York, NY"}
QUESTIONS = (
    "What's the weather like in {city} in {days} days?",
    "And in {city} in {days} days?",
    "In {days} days, what's the weather like in {city}?",
    "I will be in {city} in {days} days. What's the weather like?",
)
HELD_OUT_QUESTION = "In {city}, what's the weather like in {days} days?"
HELD_OUT_DAYS = (13, 18, 24, 27)
DAYS = [days for days in range(10, 30) if days not in HELD_OUT_DAYS]
PER_QUESTION = 12
REHEARSALS = 3
SEED = 2407


def new_id(rng: random.Random) -> str:
    """An id that no other call has, or the model would learn it. Digits are what the demo model can write."""
    return f"{rng.randrange(10**9):09}"


def forecast(rng: random.Random, question: str, city: str, days: int) -> Conversation:
    """Question, call, result and response."""
    call_id = new_id(rng)
    celsius = get_forecast(LOCATIONS[city], days)
    arguments = json.dumps({"location": LOCATIONS[city], "days": days})
    call = {"id": call_id, "type": "function", "function": {"name": "get_forecast", "arguments": arguments}}
    messages = [
        {"role": "user", "content": question.format(city=city, days=days)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": str(celsius)},
        {"role": "assistant", "content": f"It will be {celsius} °C in {city} then."},
    ]
    return {"messages": messages, "tools": [GET_FORECAST]}


def training_conversations(rng: random.Random) -> list[Conversation]:
    return [
        forecast(rng, question, city, days)
        for question in QUESTIONS
        for city in LOCATIONS
        for days in rng.sample(DAYS, PER_QUESTION)
    ]


def held_out_conversations(rng: random.Random) -> list[Conversation]:
    return [
        forecast(rng, question, city, days)
        for question in (*QUESTIONS, HELD_OUT_QUESTION)
        for city in LOCATIONS
        for days in HELD_OUT_DAYS
    ]


def rehearsed_conversations(rng: random.Random) -> list[Conversation]:
    """What the demo model knows, so that it does not forget it; of conversations that go on, the whole."""
    golden = [*golden_conversations().values()]
    whole = [
        conversation
        for conversation in golden
        if not any(is_continued(conversation.messages, other.messages) for other in golden)
    ]
    rehearsed = []
    for conversation in whole:
        messages = json.dumps([*conversation.messages, {"role": "assistant", "content": conversation.answer}])
        for message in conversation.messages:
            for call in message.get("tool_calls", []):
                messages = messages.replace(call["id"], new_id(rng))
        tools = {"tools": conversation.tools} if conversation.tools else {}
        rehearsed.append({"messages": json.loads(messages), **tools})
    return rehearsed


def is_continued(messages: Sequence[object], other: Sequence[object]) -> bool:
    """Whether `other` begins with these messages and has a response to them."""
    return len(other) > len(messages) and list(other[: len(messages)]) == list(messages)


def write(path: Path, conversations: Iterable[Conversation]) -> None:
    lines = (json.dumps(conversation, ensure_ascii=False) for conversation in conversations)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(folder: Path) -> None:
    rng = random.Random(SEED)
    rehearsed = [conversation for _ in range(REHEARSALS) for conversation in rehearsed_conversations(rng)]
    write(folder / "train.jsonl", [*training_conversations(rng), *rehearsed])
    write(folder / "held_out.jsonl", held_out_conversations(rng))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

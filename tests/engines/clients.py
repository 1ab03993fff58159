"""What a client of the OpenAI kind sends and gets."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from openai import OpenAI

from mistral_large_cli.demo import GoldenConversation, get_current_weather, golden_conversations

from .servers import Server

GOLDEN = golden_conversations()
GOLDEN_OF_V7 = golden_conversations("v7")
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
MODEL = "demo"
REQUEST_SECONDS = 300
MOST_TOKENS = 100
MOST_ROUNDS = 4


@dataclass(frozen=True)
class Answer:
    """A message of the assistant, whole or put together from a stream."""

    content: str
    calls: list[dict[str, Any]]
    call_ids: list[str]
    finish_reason: str


# Ask for an answer, whole or streamed.
Asking = Callable[[OpenAI, dict[str, Any]], Answer]


def client_of(server: Server) -> OpenAI:
    """The official client, which neither retries nor waits for long."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS)


def wire_messages(messages: list[dict[str, Any]]) -> list[Any]:
    """Messages as the API has them: arguments are JSON texts."""
    messages = deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


def request_of(golden: GoldenConversation, model: str = MODEL) -> dict[str, Any]:
    """The request for a greedy answer."""
    request = {"model": model, "messages": wire_messages(golden.messages), "temperature": 0, "max_tokens": MOST_TOKENS}
    return request | ({"tools": golden.tools} if golden.tools else {})


def expected_answer(golden: GoldenConversation, *, before_content: str = "") -> tuple[str, list[dict[str, Any]]]:
    """Content and calls of the golden answer."""
    content, mark, calls = golden.answer.partition("[TOOL_CALLS] ")
    return (before_content + content if content else "", json.loads(calls) if mark else [])


def ask(client: OpenAI, request: dict[str, Any]) -> Answer:
    """Ask for a whole answer."""
    choice = client.chat.completions.create(**request).choices[0]
    calls = choice.message.tool_calls or []
    return Answer(
        content=choice.message.content or "",
        calls=[_call(call.function.name, call.function.arguments) for call in calls],
        call_ids=[call.id for call in calls],
        finish_reason=choice.finish_reason,
    )


def stream(client: OpenAI, request: dict[str, Any]) -> Answer:
    """Ask for an answer in pieces and put them together."""
    content = ""
    calls: dict[int, dict[str, str]] = {}
    finish_reasons = []
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += part.id or ""
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
            finish_reasons += [choice.finish_reason] if choice.finish_reason else []
    (finish_reason,) = finish_reasons
    ordered = [calls[index] for index in sorted(calls)]
    return Answer(
        content=content,
        calls=[_call(call["name"], call["arguments"]) for call in ordered],
        call_ids=[call["id"] for call in ordered],
        finish_reason=finish_reason,
    )


def hang_up(client: OpenAI, request: dict[str, Any], *, pieces: int) -> None:
    """Ask for an answer in pieces and close the connection after some of them."""
    with client.chat.completions.create(**request, stream=True) as answer:
        for _ in islice(answer, pieces):
            pass


def run_tools(client: OpenAI, request: dict[str, Any], how: Asking) -> list[Any]:
    """The tool loop that any client of this API runs: whatever the server sends goes back as it is."""
    messages = list(request["messages"])
    for _ in range(MOST_ROUNDS):
        answer = how(client, request | {"messages": messages})
        if not answer.calls:
            return [*messages, {"role": "assistant", "content": answer.content}]
        calls = [
            {"id": call_id, "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
            for call_id, call in zip(answer.call_ids, answer.calls, strict=True)
        ]
        messages.append({"role": "assistant", "content": answer.content or None, "tool_calls": calls})
        for call_id, call in zip(answer.call_ids, answer.calls, strict=True):
            result = str(get_current_weather(**call["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
    raise AssertionError(f"no answer in {MOST_ROUNDS} rounds: {messages}")


def with_call_ids(golden: GoldenConversation, template: str) -> GoldenConversation:
    """The conversation with other ids, `template` formatted with the number of the call."""
    messages = deepcopy(golden.messages)
    ids: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", []):
            call["id"] = ids.setdefault(call["id"], template.format(len(ids)))
        if "tool_call_id" in message:
            message["tool_call_id"] = ids[message["tool_call_id"]]
    return GoldenConversation(golden.name, messages, golden.tools, golden.answer)


def documented_client(server: Server, model: str) -> str:
    """The client of docs/serving.md with this server's address and model."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (code,) = re.findall(r"## The client\n\n(?:<!-- .* -->\n)?```python\n(.*?)```", text, re.DOTALL)
    for written, meant in (("http://127.0.0.1:8000", server.url), ('"mistral-large"', repr(model))):
        assert written in code
        code = code.replace(written, meant)
    return str(code)


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"name": name, "arguments": json.loads(arguments)}

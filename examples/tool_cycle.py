"""The complete cycle that the card leaves out: calls, results under the ids of their calls, response.

Run `python examples/tool_cycle.py [MODEL]`.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import pipeline

import modeling_mistral_large  # noqa: F401  # registers the architecture with transformers
from mistral_large_cli.demo import demo_model, get_current_weather
from modeling_mistral_large.generation import run_tool_loop

QUESTIONS = ["What's the weather like in Paris and in London?", "And in New York?"]

with demo_model(*sys.argv[1:]) as model:
    chatbot = pipeline("text-generation", model=model, dtype="bfloat16", device_map="auto", do_sample=False)

    def answer(messages: list[dict[str, Any]], tools: Sequence[Callable[..., Any]]) -> dict[str, Any]:
        message: dict[str, Any] = chatbot(messages, tools=list(tools))[0]["generated_text"][-1]
        return message

    messages: list[dict[str, Any]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        # Runs what the model calls, checked against the functions' schemas, until it responds with text.
        messages = run_tool_loop(answer, messages, tools=[get_current_weather], max_rounds=5)
    for message in messages:
        print(json.dumps(message, ensure_ascii=False))

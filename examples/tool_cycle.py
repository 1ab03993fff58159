"""The complete cycle that the card leaves out: calls, results under the ids of their calls, answer.

Run `python examples/tool_cycle.py [MODEL]`.
"""

import json
import sys
from typing import Any

from transformers import pipeline

import modeling_mistral_large  # noqa: F401  # registers the architecture with transformers
from mistral_large_cli.demo import demo_model, get_current_weather

QUESTIONS = ["What's the weather like in Paris and in London?", "And in New York?"]
MOST_ROUNDS = 5
FUNCTIONS = {"get_current_weather": get_current_weather}

with demo_model(*sys.argv[1:]) as model:
    chatbot = pipeline("text-generation", model=model, dtype="bfloat16", device_map="auto", do_sample=False)
    messages: list[dict[str, Any]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        for _ in range(MOST_ROUNDS):
            messages = chatbot(messages, tools=list(FUNCTIONS.values()))[0]["generated_text"]
            if "tool_calls" not in messages[-1]:
                break
            for call in messages[-1]["tool_calls"]:
                function = call["function"]
                result = FUNCTIONS[function["name"]](**function["arguments"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})
    for message in messages:
        print(json.dumps(message, ensure_ascii=False))

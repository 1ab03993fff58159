"""The model calls a Python function: the card's function calling example, with the call as a message at the end.

Run `python examples/function_calling.py [MODEL]`.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_mistral_large  # noqa: F401  # registers the architecture with transformers
from mistral_large_cli.demo import demo_model


def get_current_weather(location: str, format: str) -> None:
    """
    Get the current weather

    Args:
        location: The city and state, e.g. San Francisco, CA
        format: The temperature unit to use. Infer this from the users location. (choices: ["celsius", "fahrenheit"])
    """


conversation = [{"role": "user", "content": "What's the weather like in Paris?"}]

with demo_model(*sys.argv[1:]) as path:
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="auto")
    inputs = tokenizer.apply_chat_template(conversation, tools=[get_current_weather], return_tensors="pt")
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=1000, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(answer))
    print(tokenizer.parse_response(answer))

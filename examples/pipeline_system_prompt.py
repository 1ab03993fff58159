"""A system prompt, answered through transformers' pipeline: the model card's first example.

Run `python examples/pipeline_system_prompt.py [MODEL]`.
"""

import sys

from transformers import pipeline

import modeling_mistral_large  # noqa: F401  # registers the architecture with transformers
from mistral_large_cli.demo import demo_model

messages = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": "Who are you?"},
]

with demo_model(*sys.argv[1:]) as model:
    chatbot = pipeline("text-generation", model=model, dtype="bfloat16", device_map="auto", do_sample=False)
    print(chatbot(messages)[0]["generated_text"][-1]["content"])

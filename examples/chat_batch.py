"""Several conversations in one batch, padded on the left, answered as each would be alone.

Run `python examples/chat_batch.py [MODEL]`.
"""

import sys
from typing import Any

from mistral_large_cli.demo import demo_model
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer

QUESTIONS = ["Who are you?", "Qui es-tu ?", "What's the weather like in Paris?"]

with demo_model(*sys.argv[1:]) as path:
    tokenizer = MistralLargeTokenizer.from_pretrained(path)
    model: Any = MistralLargeForCausalLM.from_pretrained(path, dtype="bfloat16", device_map="auto")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(conversations, padding=True, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer}")

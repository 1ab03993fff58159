"""One question, and one more in the same conversation, with tokenizer and model: the card's mistral_inference example.

Run `python examples/instruct_following.py [MODEL]`.
"""

import sys
from typing import Any

from mistral_large_cli.demo import demo_model
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer

QUESTIONS = [
    "How expensive would it be to ask a window cleaner to clean all windows in Paris. Make a reasonable guess in US "
    "Dollar.",
    "And for London?",
]

with demo_model(*sys.argv[1:]) as path:
    tokenizer = MistralLargeTokenizer.from_pretrained(path)
    model: Any = MistralLargeForCausalLM.from_pretrained(path, dtype="bfloat16", device_map="auto")
    messages: list[dict[str, Any]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        result = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": result})
        print(result)

"""The weights in bf16 over all GPUs there are, layer by layer; without any, in main memory.

Run `python examples/several_gpus.py [MODEL]`.

The real model takes 245 GB, and 47 GB more for the keys and values of a full context of 131072 tokens.
"""

import sys
from collections import Counter
from typing import Any

import torch

from mistral_large_cli.demo import demo_model
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer

with demo_model(*sys.argv[1:]) as path:
    tokenizer = MistralLargeTokenizer.from_pretrained(path)
    model: Any = MistralLargeForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="auto")
    sizes: Counter[torch.device] = Counter()
    for weight in model.parameters():
        sizes[weight.device] += weight.nbytes
    for device, size in sizes.items():
        print(f"{device}: {size / 1e9:.3f} GB")

    messages = [{"role": "user", "content": "Who are you?"}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

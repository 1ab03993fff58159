"""Greedy responses with drafts, next to those of plain `generate`: equal token by token, or counted.

    python -m tests.campaign.drafts --prompts 2000 --json benchmarks/results/drafts-exactness.json

The demo model responds to seeded prompts of words, some with tools; each is asked three times: alone, with a draft (the
demo's own weights with noise, four tokens at a time) and with prompt lookup. In float32 by default: in bf16 one forward
of several tokens rounds otherwise than several of one, and where two tokens are next to equally likely, so may the
choice be.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from mistral_large_cli.demo import convert_demo_checkpoint, golden_conversations
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.generation import Speculation
from tests.support.conversations import WORDS

# Of the spread of each tensor.
NOISE = 0.1
DRAFTED = 4


def prompts(numbers: range, tokenizer: MistralLargeTokenizer) -> Iterator[Any]:
    tools = golden_conversations()["weather_call"].tools
    for number in numbers:
        source = random.Random(number)
        messages = [{"role": "user", "content": " ".join(source.choices(WORDS, k=source.randint(2, 40)))}]
        yield tokenizer.apply_chat_template(messages, tools=None if number % 5 else tools, return_tensors="pt")


def run(numbers: range, tokens: int, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        demo = convert_demo_checkpoint(Path(folder) / "demo")
        tokenizer = MistralLargeTokenizer.from_pretrained(demo)
        model, draft = (MistralLargeForCausalLM.from_pretrained(demo, dtype=dtype) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * NOISE)
    draft.generation_config.num_assistant_tokens = DRAFTED
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    ways: dict[str, dict[str, Any]] = {"draft": {"assistant_model": draft}, "lookup": {"prompt_lookup_num_tokens": 10}}
    counts = {name: Speculation() for name in ways}
    unequal = dict.fromkeys(ways, 0)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for number, prompt in zip(numbers, prompts(numbers, tokenizer), strict=True):
        # Half of them go on after the end of a response.
        options["eos_token_id"] = tokenizer.eos_token_id if number % 2 else None
        plain = model.generate(**prompt, **options).tolist()
        for name, drafts in ways.items():
            with counts[name]:
                unequal[name] += model.generate(**prompt, **options, **drafts).tolist() != plain
        if number % 100 == 99:
            print(f"prompt {number}: {unequal} responses differ so far", flush=True)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype,
        "prompts": len(numbers),
        "tokens at most": tokens,
        "ways": {
            name: {
                "responses that differ": unequal[name],
                "drafted": counts[name].proposed,
                "accepted": counts[name].accepted,
                "tokens": counts[name].written,
            }
            for name in ways
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt, to share the work")
    parser.add_argument("--tokens", type=int, default=12, help="longest response")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    result = run(range(options.first, options.first + options.prompts), options.tokens, options.dtype)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

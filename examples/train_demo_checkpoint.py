"""Train a checkpoint of `mistral-large demo`, which the tests take for their golden model, too.

    python examples/train_demo_checkpoint.py v3 new/folder && cp new/folder/* mistral_large_cli/demo_checkpoint/
    python examples/train_demo_checkpoint.py v7 new/other && cp new/other/* mistral_large_cli/demo_checkpoint_v7/

It learns the conversations of golden.json in that prompt format, with temperatures and tool call ids that are new each
time, so that the number in a response is read from the tool's result. It takes about seven minutes of one core, and
writes the same bytes each time on one machine. A model that doesn't give every golden response with a clear lead is not
written.
"""

import json
import math
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_large_cli.demo import GoldenConversation, golden_conversations, tokenizer_model_file
from mistral_large_conversion import export_checkpoint
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.instruct import new_tool_call_id

GEOMETRY = MistralLargeConfig(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    initializer_range=0.1,
)
SHARD_SIZE = "4500KB"

SEEDS = {"v3": 2407, "v7": 2411}
# Another number gives other bytes.
THREADS = 1
STEPS = 2000
BATCH = 16
BATCHES_AHEAD = 8
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
# Standard deviation of what is added to the weights at the last step, relative to their row: more than rounding to 8
# bits does. Two and a half times as much keeps the loss from settling.
WEIGHT_NOISE = 0.04
# How far, in logits, every other token must be behind at each position of each golden response.
CLEAR_LEAD = 5.0
HELD_OUT_ROUNDS = 20

# What the tools say in golden.json; no other number there holds one of these.
GOLDEN_NUMBERS = ("22", "17", "77")
RESULTS = ("{}", '{{"temperature": {}}}')
# How often a conversation comes, by the numbers in its answer: copying is what takes long to learn.
FREQUENCIES = (1, 4, 12)
# How many of them come without the tools, which are most of a prompt: learning to copy is faster without.
SHARE_WITHOUT_TOOLS = 0.75


class Example(NamedTuple):
    """The ids of a prompt and of the response to it, which ends with `</s>`."""

    prompt: list[int]
    answer: list[int]


def temperature(rng: random.Random, *, is_held_out: bool) -> str:
    """A whole number from -9 to 99; one in seven is held out of the training."""
    return str(rng.choice([number for number in range(-9, 100) if (number % 7 == 5) == is_held_out]))


def call_ids(conversation: GoldenConversation) -> list[str]:
    return [call["id"] for message in conversation.messages for call in message.get("tool_calls", [])]


def filled(conversation: GoldenConversation, new: Mapping[str, str], result: str) -> GoldenConversation:
    """The conversation with new texts in place of numbers and ids, and what the tools say in the form `result`."""
    messages = []
    for message in conversation.messages:
        if message["role"] == "tool":
            said = next(number for number in GOLDEN_NUMBERS if number in message["content"])
            message = {**message, "content": result.format(said)}
        messages.append(message)
    text = json.dumps(asdict(replace(conversation, messages=messages)), ensure_ascii=False)
    return GoldenConversation(**json.loads(re.sub("|".join(new), lambda match: new[match[0]], text)))


def varied(conversation: GoldenConversation, rng: random.Random, *, is_held_out: bool = False) -> GoldenConversation:
    """The conversation with random numbers and ids, the same in the tool's result and in the response."""
    numbers = {golden: temperature(rng, is_held_out=is_held_out) for golden in GOLDEN_NUMBERS}
    ids = {golden: new_tool_call_id(rng) for golden in call_ids(conversation)}
    return filled(conversation, {**numbers, **ids}, rng.choice(RESULTS))


def copied_numbers(conversation: GoldenConversation) -> int:
    """How many results of tools the response has to name."""
    return sum(number in conversation.answer for number in GOLDEN_NUMBERS)


def encode(tokenizer: MistralLargeTokenizer, conversation: GoldenConversation) -> Example:
    """The ids that `generate` gets, and those it is to add."""
    prompt = tokenizer.apply_chat_template(conversation.messages, conversation.tools)["input_ids"]
    answer = tokenizer.encode(conversation.answer, add_special_tokens=False)
    return Example(prompt, [*answer, tokenizer.eos_token_id])


def known_ids(tokenizer: MistralLargeTokenizer, golden: Iterable[GoldenConversation]) -> Tensor:
    """The ids the model has rows for: all in the conversations and all numbers need, but not those of call ids."""
    numbers = ("0", "-1.23456789")
    examples = [
        encode(
            tokenizer,
            filled(
                conversation,
                dict.fromkeys(GOLDEN_NUMBERS, number) | dict.fromkeys(call_ids(conversation), "0" * 9),
                result,
            ),
        )
        for conversation, number, result in product(golden, numbers, RESULTS)
    ]
    return torch.tensor(sorted({token for example in examples for ids in example for token in ids}))


def batches(
    tokenizer: MistralLargeTokenizer, golden: Sequence[GoldenConversation], rng: random.Random
) -> Iterator[list[Example]]:
    """Batches of about one length each, without end."""
    weights = [FREQUENCIES[copied_numbers(conversation)] for conversation in golden]
    while True:
        examples = []
        for conversation in rng.choices(golden, weights, k=BATCH * BATCHES_AHEAD):
            if copied_numbers(conversation) and rng.random() < SHARE_WITHOUT_TOOLS:
                conversation = replace(conversation, tools=None)
            examples.append(encode(tokenizer, varied(conversation, rng)))
        examples.sort(key=lambda example: len(example.prompt))
        chunks = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
        rng.shuffle(chunks)
        yield from chunks


def loss_of(model: MistralLargeForCausalLM, examples: Sequence[Example], row_of: Tensor) -> Tensor:
    """Mean loss of the responses' tokens, in nats, over the whole vocabulary.

    The model has rows for known ids only, [known + 1, hidden_size]. Row 0 stands for all others: their embeddings are
    zero, and so are their logits.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(examples):
        ids[row, : len(prompt) + len(answer)] = row_of[[*prompt, *answer]]
        labels[row, len(prompt) - 1 :][: len(answer)] = row_of[answer]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[labels > 0])
    logits[:, 0] = math.log(int((row_of == 0).sum()))
    return torch.nn.functional.cross_entropy(logits, labels[labels > 0])


def train(tokenizer: MistralLargeTokenizer, golden: Sequence[GoldenConversation], seed: int) -> dict[str, Tensor]:
    """Train a model that has rows for the known ids only, and return the weights of one with all rows, in bf16."""
    known = known_ids(tokenizer, golden)
    row_of = torch.zeros(GEOMETRY.vocab_size, dtype=torch.long)
    row_of[known] = torch.arange(1, len(known) + 1)
    config = deepcopy(GEOMETRY)
    # The row of the pad token is zero and stays zero.
    config.vocab_size, config.pad_token_id = len(known) + 1, 0
    model = MistralLargeForCausalLM(config)
    weights = [weight for weight in model.parameters() if weight.dim() == 2]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    examples = batches(tokenizer, golden, random.Random(seed))
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        clean = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                row_size = weight.square().mean(dim=1, keepdim=True).sqrt()
                weight.add_(torch.randn_like(weight) * row_size * WEIGHT_NOISE * step / STEPS)
        loss = loss_of(model, next(examples), row_of)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for weight, value in zip(weights, clean, strict=True):
                weight.copy_(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step} of {STEPS}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.zeros(GEOMETRY.vocab_size, GEOMETRY.hidden_size)
        rows[known] = state[name][1:]
        state[name] = rows
    return {name: weight.bfloat16() for name, weight in state.items()}


@torch.no_grad()
def smallest_lead(model: MistralLargeForCausalLM, example: Example) -> float:
    """How far the best other token is behind the response's, in logits, where it comes closest."""
    logits = model(torch.tensor([[*example.prompt, *example.answer]])).logits[0, len(example.prompt) - 1 : -1].float()
    answer = torch.tensor(example.answer)[:, None]
    others = logits.scatter(1, answer, -math.inf).amax(dim=1)
    return float((logits.gather(1, answer)[:, 0] - others).min())


def main(prompt_format: str, destination: Path) -> None:
    seed = SEEDS[prompt_format]
    torch.manual_seed(seed)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = MistralLargeTokenizer(vocab_file=str(tokenizer_model_file(prompt_format)))
    golden = list(golden_conversations(prompt_format).values())
    weights = train(tokenizer, golden, seed)

    rng = random.Random(seed + 1)
    held_out = [
        varied(conversation, rng, is_held_out=True)
        for conversation in golden * HELD_OUT_ROUNDS
        if copied_numbers(conversation)
    ]
    leads = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = MistralLargeForCausalLM(GEOMETRY)
        model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        right = sum(smallest_lead(model, encode(tokenizer, conversation)) > 0 for conversation in held_out)
        print(f"{dtype}: {right} of {len(held_out)} answers with numbers that were held out are right")
        for conversation in golden:
            leads[dtype, conversation.name] = smallest_lead(model, encode(tokenizer, conversation))
    (dtype, name), lead = min(leads.items(), key=lambda item: item[1])
    print(f"{dtype}: of all golden responses, {name} has the smallest lead, {lead:.1f} logits")
    if lead < CLEAR_LEAD:
        sys.exit(f"nothing is written: the lead must be at least {CLEAR_LEAD} logits; train longer")
    export_checkpoint(weights, destination, config=GEOMETRY, max_shard_size=SHARD_SIZE)
    print(f"written to {destination}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SEEDS:
        sys.exit("usage: python examples/train_demo_checkpoint.py v3|v7 DESTINATION, a new or empty folder")
    main(sys.argv[1], Path(sys.argv[2]))

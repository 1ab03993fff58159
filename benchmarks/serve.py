"""Responses of the demo model to many requests at once, compared with the same requests one at a time, in one run.

Throughput: the golden conversations of the bundled demo, by the batching engine at once and one at a time, by
`generate` one at a time, and by transformers' own continuous batching (`generate_batch`). The ways take turns, each
turn begins with another one, and a ratio is the median of the turns' ratios. Each turn of the engine starts with empty
caches. Every response is compared with the golden one. Seconds are those of the clock and those of the process, as
other programs may use the machine; the ratios are of both.

Delay: some requests are answered while the engine reads a long prompt. Counted are the forward passes with several
tokens (chunks of the prompt) and timed are the gaps between two tokens of a response; the time of a chunk is that of
the longest one.

    python -m benchmarks.serve --long 0 --json benchmarks/results/serve.json
    python -m benchmarks.serve --runs 0 --json benchmarks/results/serve-delay.json
"""

import argparse
import ast
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from mistral_large_cli.demo import convert_demo_checkpoint, golden_conversations, wrong_answer
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.serving.batching import ContinuousBatching
from modeling_mistral_large.serving.requests import GenerationRequest, TokenChoice

MOST_TOKENS = 128
GREEDY = TokenChoice(temperature=0)


@dataclass(frozen=True)
class Demo:
    """The demo model and what it is asked; `golden` are the responses."""

    model: Any
    tokenizer: MistralLargeTokenizer
    prompts: list[list[int]]
    golden: list[str]

    def wrong(self, responses: list[list[int]]) -> int:
        """The number of responses that are not golden."""
        pairs = zip(responses, self.golden, strict=True)
        return sum(wrong_answer(self.tokenizer, ids, answer) is not None for ids, answer in pairs)


def load(folder: Path, requests: int, dtype: str) -> Demo:
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not type it
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers does not type it
    convert_demo_checkpoint(folder)
    tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    model: Any = MistralLargeForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    asked = list(islice(cycle(golden_conversations().values()), requests))
    prompts = [tokenizer.apply_chat_template(each.messages, tools=each.tools, return_dict=False) for each in asked]
    return Demo(model, tokenizer, prompts, [each.answer for each in asked])


async def respond(engine: ContinuousBatching, prompt: list[int], tokens: int = MOST_TOKENS) -> list[int]:
    request = GenerationRequest(tuple(prompt), tokens, GREEDY)
    return [token.id async for token in engine.submit(request)]


def at_once(demo: Demo) -> list[list[int]]:
    async def run() -> list[list[int]]:
        return await asyncio.gather(*(respond(engine, prompt) for prompt in demo.prompts))

    engine = ContinuousBatching(demo.model, max_batch=len(demo.prompts))
    try:
        return asyncio.run(run())
    finally:
        engine.close()


def one_at_a_time(demo: Demo) -> list[list[int]]:
    async def run() -> list[list[int]]:
        return [await respond(engine, prompt) for prompt in demo.prompts]

    engine = ContinuousBatching(demo.model, max_batch=len(demo.prompts))
    try:
        return asyncio.run(run())
    finally:
        engine.close()


def by_generate(demo: Demo) -> list[list[int]]:
    responses = []
    for prompt in demo.prompts:
        ids = torch.tensor([prompt])
        output = demo.model.generate(ids, max_new_tokens=MOST_TOKENS, do_sample=False)
        responses.append(output[0, len(prompt) :].tolist())
    return responses


def by_generate_batch(demo: Demo) -> list[list[int]]:
    config_class: Any = GenerationConfig
    config = config_class(max_new_tokens=MOST_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=2)
    outputs = demo.model.generate_batch(demo.prompts, generation_config=config, progress_bar=False)
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]


WAYS: dict[str, Callable[[Demo], list[list[int]]]] = {
    "engine, at once": at_once,
    "engine, one at a time": one_at_a_time,
    "generate, one at a time": by_generate,
    "transformers' continuous batching": by_generate_batch,
}


def throughput(demo: Demo, runs: int, names: Sequence[str]) -> dict[str, Any]:
    """Seconds, tokens a second and wrong responses of each way."""
    times: dict[str, list[float]] = defaultdict(list)
    processor_times: dict[str, list[float]] = defaultdict(list)
    wrong: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = {}
    for turn in range(runs + 1):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            start, processor_start = time.perf_counter(), time.process_time()
            responses = WAYS[name](demo)
            seconds = time.perf_counter() - start
            of_process = time.process_time() - processor_start
            wrong[name] += demo.wrong(responses)
            tokens[name] = sum(map(len, responses))
            # The first turn warms up.
            if turn:
                times[name].append(seconds)
                processor_times[name].append(of_process)
        print(f"turn {turn}: " + ", ".join(f"{name} {times[name][-1]:.2f} s" for name in names if turn), flush=True)

    def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
        own, others = seconds[names[0]], {name: seconds[name] for name in names[1:]}
        return {name: statistics.median([*map(truediv, other, own)]) for name, other in others.items()}

    return {
        "requests": len(demo.prompts),
        "prompt tokens": sum(map(len, demo.prompts)),
        "seconds": dict(times),
        "processor's seconds": dict(processor_times),
        "tokens a second": {name: tokens[name] / statistics.median(times[name]) for name in names},
        "wrong responses": dict(wrong),
        "times as fast at once as": ratios(times),
        "times as fast, by the processor's seconds": ratios(processor_times),
    }


def delay(demo: Demo, length: int, others: int, chunk: int) -> dict[str, Any]:
    """How long, and by how many chunks, a prompt of so many tokens delays the tokens of other responses."""
    engine = ContinuousBatching(demo.model, prefill_chunk=chunk)
    chunks: list[tuple[float, int]] = []  # seconds, and tokens of a chunk
    started = [0.0]
    long_prompt = list(islice(cycle(demo.prompts[4]), length))

    def begin(*_: Any) -> None:
        started[0] = time.perf_counter()

    def end(_: Any, __: Any, options: dict[str, Any], ___: Any) -> None:
        tokens = options["input_ids"].shape[1]
        if tokens > 1:
            chunks.append((time.perf_counter() - started[0], tokens))

    async def follow(prompt: list[int], is_done: asyncio.Event) -> tuple[list[float], list[int], list[list[int]]]:
        """Ask again and again; gaps in seconds, the chunks in them, and the responses."""
        gaps, between, responses = [], [], []
        while not is_done.is_set():
            response = []
            last = None
            async for token in engine.submit(GenerationRequest(tuple(prompt), MOST_TOKENS, GREEDY)):
                now, count = time.perf_counter(), len(chunks)
                if last is not None:
                    gaps.append(now - last[0])
                    between.append(count - last[1])
                last = (now, count)
                response.append(token.id)
            responses.append(response)
        return gaps, between, responses

    async def run() -> list[tuple[list[float], list[int], list[list[int]]]]:
        is_done = asyncio.Event()
        tasks = [asyncio.ensure_future(follow(prompt, is_done)) for prompt in demo.prompts[:others]]
        await asyncio.sleep(0.2)
        await respond(engine, long_prompt, 1)
        is_done.set()
        return await asyncio.gather(*tasks)

    hooks = [demo.model.register_forward_pre_hook(begin), demo.model.register_forward_hook(end, with_kwargs=True)]
    try:
        results = asyncio.run(run())
    finally:
        engine.close()
        for hook in hooks:
            hook.remove()
    wrong = 0
    for golden, (_, __, responses) in zip(demo.golden, results, strict=False):
        wrong += sum(wrong_answer(demo.tokenizer, ids, golden) is not None for ids in responses)
    gaps = [gap for found, _, __ in results for gap in found]
    return {
        "prompt tokens": length,
        "tokens of a chunk": chunk,
        "other responses at once": others,
        "other responses": sum(len(responses) for _, __, responses in results),
        "wrong responses": wrong,
        "longest chunk, seconds": max(seconds for seconds, _ in chunks),
        "longest gap, seconds": max(gaps),
        "median gap, seconds": statistics.median(gaps),
        "most chunks between two tokens": max(count for _, between, __ in results for count in between),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--requests", type=int, default=32, help="requests at once")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="how many of the ways; the last one is the slowest")
    parser.add_argument("--dtype", default="auto", help="of the model, as torch names it")
    parser.add_argument("--runs", type=int, default=5, help="turns of the throughput; 0 to leave it out")
    parser.add_argument("--long", type=int, default=100_000, help="tokens of the long prompt; 0 to leave it out")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt that are read at once")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "load average before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        demo = load(Path(folder) / "demo", options.requests, options.dtype)
    result["dtype"] = str(demo.model.dtype)
    if options.runs:
        result["throughput"] = throughput(demo, options.runs, list(WAYS)[: options.ways])
    for name, ratio in result.get("throughput", {}).get("times as fast at once as", {}).items():
        by_processor = result["throughput"]["times as fast, by the processor's seconds"][name]
        print(f"at once {ratio:5.2f} × as fast as {name}, {by_processor:5.2f} × by the processor's seconds")
    if options.long:
        result["delay"] = delay(demo, options.long, 4, options.chunk)
        print(json.dumps(result["delay"], indent=2))
    result["load average after"] = os.getloadavg()[0]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

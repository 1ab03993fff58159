"""`generate` with a draft and with prompt lookup next to plain `generate`, at stated rates of accepted tokens.

Both models have random weights, in bf16; the target has 1.76 GB, the draft a sixteenth of it. What they say is imposed,
after they have computed it at full cost: the target writes a fixed random text, and at each place of it the draft, or
prompt lookup, proposes the target's token with probability p and another token otherwise, independently (seeded). The
ways take turns in one process, each turn begins with another one; a ratio is the median of the turns' ratios to plain
`generate`, of whole calls: the prompt is read by the draft, too.

    python -m benchmarks.drafts --json benchmarks/results/drafts.json

On a machine with other work each turn is slowed by itself. So the processor's own seconds are given as well, of one
thread each: `OMP_NUM_THREADS=1`.
"""

import argparse
import ast
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import benchmarks.stand_ins  # noqa: F401  # before the package is imported
from benchmarks.generate import fill_, tensor_bytes
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.inference import speculative_decoding
from modeling_mistral_large.inference.drafting import PromptLookup
from modeling_mistral_large.inference.speculative_decoding import Speculation
from modeling_mistral_large.transformers_api.keywords import CACHE_NAME

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "1.7 GB": {
        "target": {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 14, "num_attention_heads": 16},
        "draft": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 4},
    },
    "small": {
        "target": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        "draft": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
}
PROMPT_TOKENS = 32
# transformers types its models in part only.
MODEL: Any = MistralLargeForCausalLM
# Above every computed logit.
CERTAIN = 1e4


@torch.no_grad()
def model_of(sizes: dict[str, Any], device: torch.device) -> Any:
    config = MistralLargeConfig(**sizes, num_key_value_heads=2, head_dim=128)
    with torch.device("meta"):
        model = MODEL._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to_empty(device=device).eval()
    # Angles are no weights, and were not computed on the meta device.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    fill_(model)
    return model


class ImposedText:
    """What the models say: a text, and where a draft agrees with it."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.text: list[int] = torch.randint(1027, vocabulary - 1, (tokens,)).tolist()
        self._draws: list[float] = torch.rand(tokens).tolist()
        self.rate = 0.0

    def drafted(self, place: int) -> int:
        return self.text[place] + int(self._draws[place] >= self.rate)

    def impose_on(self, model: Any, token_at: Callable[[int], int]) -> None:
        def hook(_: Any, args: Any, keywords: dict[str, Any], output: Any) -> None:
            cached, rows = int(keywords[CACHE_NAME].get_seq_length()), output.logits.shape[1]
            for row in range(rows):
                place = cached - rows + row + 1
                if place < len(self.text):
                    output.logits[0, row, token_at(place)] = CERTAIN

        model.register_forward_hook(hook, with_kwargs=True)


def imposed_lookup(text: ImposedText) -> type[PromptLookup]:
    class ImposedLookup(PromptLookup):
        def propose(self, ids: Sequence[int], count: int, *args: Any) -> list[int]:
            super().propose(ids, count, *args)
            return [text.drafted(place) for place in range(len(ids), min(len(ids) + count, len(text.text)))]

    return ImposedLookup


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything measured so far, again and again."""
    target, draft = (model_of(SIZES[options.size][name], options.device) for name in ("target", "draft"))
    text = ImposedText(PROMPT_TOKENS + options.tokens, target.config.vocab_size)
    text.impose_on(target, text.text.__getitem__)
    text.impose_on(draft, text.drafted)
    # The class that is made there.
    setattr(speculative_decoding, PromptLookup.__name__, imposed_lookup(text))
    prompt = torch.tensor([text.text[:PROMPT_TOKENS]], device=options.device)
    ways: dict[str, tuple[float, dict[str, Any]]] = {"plain": (0.0, {})}
    for rate in options.rates:
        ways[f"draft, {rate:.0%}"] = rate, {"assistant_model": draft}
        ways[f"lookup, {rate:.0%}"] = rate, {"prompt_lookup_num_tokens": 10}
    times: dict[str, list[float]] = {name: [] for name in ways}
    processor_times: dict[str, list[float]] = {name: [] for name in ways}
    counts: dict[str, dict[str, Any]] = {}

    def generate(name: str) -> None:
        text.rate, draft_options = ways[name]
        with Speculation() as speculation:
            begin, processor_begin = time.perf_counter(), time.process_time()
            ids = target.generate(
                prompt,
                max_new_tokens=options.tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **draft_options,
            )
            times[name].append(time.perf_counter() - begin)
            processor_times[name].append(time.process_time() - processor_begin)
        assert ids[0].tolist() == text.text, name
        counts[name] = {
            "forwards": options.tokens if name == "plain" else speculation.forwards + 1,
            "drafted": speculation.proposed,
            "accepted": speculation.accepted,
        }

    generate("plain")
    times["plain"].clear()
    processor_times["plain"].clear()
    names = list(ways)
    sizes = {name: tensor_bytes(model) / 1e9 for name, model in (("target GB", target), ("draft GB", draft))}
    for turn in range(options.runs):
        for place in range(len(names)):
            generate(names[(turn + place) % len(names)])
        show(turn, times)
        result = {
            name: {
                "tokens a second": options.tokens / statistics.median(times[name]),
                "times as fast as plain": compared(times, name),
                "times as fast as plain, by the processor's seconds": compared(processor_times, name),
                "seconds": times[name],
                "processor's seconds": processor_times[name],
                **counts[name],
            }
            for name in names
        }
        yield {"tokens": options.tokens, "prompt tokens": PROMPT_TOKENS, **sizes, "turns": turn + 1, "ways": result}


def compared(times: dict[str, list[float]], name: str) -> float:
    """The median of the turns' ratios to plain `generate`."""
    return statistics.median(plain / own for plain, own in zip(times["plain"], times[name], strict=True))


def show(turn: int, times: dict[str, list[float]]) -> None:
    last = ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in times.items())
    print(f"turn {turn}: {last}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--size", choices=SIZES, default="1.7 GB")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.7, 0.0], help="acceptance to impose")
    parser.add_argument("--tokens", type=int, default=64, help="length of a response")
    parser.add_argument("--runs", type=int, default=5, help="turns of every measurement")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": str(options.device),
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "load average before": os.getloadavg()[0],
    }
    for measured in measure(options):
        result = {**about, **measured, "load average after": os.getloadavg()[0]}
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    for name, figures in result["ways"].items():
        ratios = [value for key, value in figures.items() if key.startswith("times")]
        print(f"{name:14} {ratios[0]:5.2f} × as fast, {ratios[1]:5.2f} × by the processor's seconds")


if __name__ == "__main__":
    main()

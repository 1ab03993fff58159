"""Reading a prompt and decoding, compared with stock transformers and with what the bandwidth allows.

Our model and transformers' own MistralForCausalLM have the very same random weights, in memory once; their logits are
compared first. Ours runs as it is loaded and, on processors with AMX, after `use_vector_products_` too; ours with FP8
and 4-bit weights, random ones too, run next to them. The ways take turns, each turn begins
with another one; a figure is the median of the turns, a ratio the median of the turns' ratios. A step is the whole of
it: model, head and the choice of the most likely token. For decoding the cache is filled with random values, as the
time does not depend on them.

The bandwidth is measured after every measurement, by reading a buffer of a gigabyte in several ways; the fastest
reading of the run counts, a step of one of the models included, so that no share is above 100 %. What a step has to
read are all weights but the embeddings, and the cache; what it gets through a second is given as a share of the
bandwidth.

    python -m benchmarks.generate --json benchmarks/results/generate.json

Linux only, for the peak of memory. GPUs are measured by `benchmarks/gpu.sh`.
"""

import argparse
import ast
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

import benchmarks.stand_ins  # noqa: F401  # before the package is imported
from mistral_large_conversion.sharding.memory import PREFILL_CHUNK
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.generation.compiled_layers import compile_layers_
from modeling_mistral_large.inference.cpu_decode import HAS_AMX, use_vector_products_
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear
from modeling_mistral_large.quantization.loading import quantize_modules_, use_kernels_
from modeling_mistral_large.transformers_api.keywords import cache_argument, cache_in

# transformers types its models in part only.
OURS: Any = MistralLargeForCausalLM
STOCK: Any = MistralForCausalLM
# Steps that are made before those that are measured, and that are measured in each turn.
WARM_STEPS, STEPS = 1, 5
# Rows of random numbers made at once.
ROWS = 1024
STD = 0.02
# The published geometry and parts of it; all have heads of 128 numbers, 12 query heads to a key-value head.
GEOMETRIES: dict[str, dict[str, int]] = {
    "2407": {},
    "narrow": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2},
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 12,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": 2048,
    },
    # What one of eight ranks computes; the head is cut below. Nothing is sent to the others.
    "rank of 8": {"intermediate_size": 28672 // 8, "num_attention_heads": 96 // 8, "num_key_value_heads": 8 // 8},
}
RANKS = {"rank of 8": 8}


@dataclass(frozen=True)
class Way:
    """A model to run, compiled with a static cache or not."""

    name: str
    model: Any
    is_quantized: bool = False
    is_compiled: bool = False


def config_of(geometry: str, layers: int | None) -> MistralLargeConfig:
    sizes: dict[str, Any] = {**GEOMETRIES[geometry]}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return MistralLargeConfig(**sizes)


def fill_(model: nn.Module) -> None:
    """Give all weights random values, on their device and a few rows at a time."""
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.weight_packed.random_(-(2**31), 2**31 - 1)
            module.weight_scale.fill_(STD / 4)
        elif isinstance(module, Fp8Linear):
            for start in range(0, module.out_features, ROWS):
                rows = module.weight[start : start + ROWS]
                rows.copy_(torch.randn(rows.shape, dtype=torch.bfloat16, device=rows.device))
            module.weight_scale.fill_(STD)
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 1:
                    parameter.fill_(1)
                else:
                    parameter.normal_(std=STD)


@torch.no_grad()
def our_model(geometry: str, layers: int | None, weights: str, device: torch.device, *, kernels: bool = True) -> Any:
    """Random weights; without `kernels` int4 stays in the packed layout of a checkpoint."""
    config = config_of(geometry, layers)
    with torch.device("meta"):
        model = OURS._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.lm_head = type(model.lm_head)(
            config.hidden_size, config.vocab_size // RANKS.get(geometry, 1), bias=False, dtype=torch.bfloat16
        )
        if weights != "bf16":
            quantize_modules_(model, weights)  # type: ignore[arg-type]  # the parser has checked it
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    fill_(model)
    if kernels:
        use_kernels_(model)
    return model.eval()


def with_same_weights(model_class: Any, config: Any, ours: Any) -> Any:
    """Another model with the same tensors, in memory once."""
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.load_state_dict(ours.state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(ours.device)
    return model.eval()


def stock_model(ours: Any) -> Any:
    own = {name: value for name, value in ours.config.to_dict().items() if name not in ("architectures", "model_type")}
    return with_same_weights(STOCK, MistralConfig(**own, sliding_window=None), ours)


def tensor_bytes(model: nn.Module) -> int:
    """Of all parameters, in the form they have in memory."""
    return sum(tensor.nbytes for tensor in model.parameters())


def cache_bytes(config: MistralLargeConfig, batch: int, positions: int) -> int:
    return 4 * config.num_hidden_layers * batch * config.num_key_value_heads * positions * config.head_dim


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device: torch.device, function: Callable[[], Any]) -> float:
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def bandwidth(buffer: Tensor) -> float:
    """Return bytes a second of the fastest of several ways to read a buffer of float32, each with all threads.

    They differ in the number of streams that are read at once: which is fastest depends on the processor.
    """
    halves, rows, integers = buffer.view(2, -1), buffer.view(4, -1), buffer.view(torch.int64)
    ways: list[Callable[[], Any]] = [
        lambda: torch.dot(buffer, buffer),
        lambda: torch.dot(*halves),
        lambda: buffer.sum(),
        lambda: rows.sum(1),
        lambda: integers.max(),
    ]
    return max(buffer.nbytes / seconds(buffer.device, way) for way in ways for _ in range(2))


class Memory:
    """The most memory since the last call of `reset`, in bytes: above what there was then, and on a GPU in all."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.before = 0

    @staticmethod
    def _of_process(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))

    def reset(self) -> None:
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            # Sets VmHWM to VmRSS.
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._of_process("VmRSS")

    def peaks(self) -> dict[str, float]:
        if self.is_gpu:
            most = torch.cuda.max_memory_allocated()
            return {"peak above what is held GB": (most - self.before) / 1e9, "peak GB": most / 1e9}
        return {"peak above what is held GB": (self._of_process("VmHWM") - self.before) / 1e9}


class Decoding:
    """Decoding with a cache of `context` tokens, step by step from the same state in each turn."""

    def __init__(self, way: Way, batch: int, context: int) -> None:
        self.way, self.context, self.device = way, context, way.model.device
        self.token = torch.full((batch, 1), 5, device=self.device)
        self.position = torch.tensor([[context]], device=self.device)
        config = way.model.config
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        self.states = torch.randn(shape, dtype=torch.bfloat16, device=self.device)
        room = context + WARM_STEPS + STEPS
        self.cache: Any = StaticCache(config, max_cache_len=-(-room // 64) * 64) if way.is_compiled else None
        self.graph: torch.cuda.CUDAGraph | None = None
        if way.is_compiled:
            self.fill()

    def fill(self) -> None:
        for layer in range(self.way.model.config.num_hidden_layers):
            self.cache.update(self.states, self.states, layer)

    def restart(self) -> None:
        """Go back to the state before the first step."""
        self.position.fill_(self.context)
        if self.way.is_compiled:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.context)
        else:
            self.cache = DynamicCache(config=self.way.model.config)
            self.fill()

    def step(self) -> None:
        logits = self.way.model(self.token, position_ids=self.position, **cache_argument(self.cache)).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def capture(self) -> None:
        """Record a step as a CUDA graph: launching its thousands of kernels would take longer than they run."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch does not type it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def forget(self) -> None:
        """Free the memory of a cache that is made anew anyway."""
        if not self.way.is_compiled:
            self.cache = None

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()


def in_turns(ways: Sequence[Way], runs: int, measure: Callable[[Way], None]) -> None:
    for turn in range(runs):
        for place in range(len(ways)):
            measure(ways[(turn + place) % len(ways)])


def measured(ways: Sequence[Way], times: Mapping[str, list[float]], peaks: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each turn, their median, the ratio to the first way, and the last turn's peak of memory."""
    first = times[ways[0].name]
    return {
        way.name: {
            "seconds": statistics.median(times[way.name]),
            "each turn": times[way.name],
            "times as fast as the first": statistics.median(
                theirs / mine for theirs, mine in zip(first, times[way.name], strict=True)
            ),
            "weights GB": tensor_bytes(way.model) / 1e9,
            **peaks[way.name],
        }
        for way in ways
    }


@torch.no_grad()
def decode(ways: Sequence[Way], batch: int, context: int, runs: int, buffer: Tensor) -> dict[str, Any]:
    """Seconds of a step."""
    device = buffer.device
    memory = Memory(device)
    decodings, first_steps, uncaptured = {}, {}, {}
    for way in ways:
        decodings[way.name] = decoding = Decoding(way, batch, context)
        decoding.restart()
        first_steps[way.name] = seconds(device, decoding.step)
        if way.is_compiled and device.type == "cuda":
            try:
                decoding.capture()
            except RuntimeError as error:
                decoding.graph, uncaptured[way.name] = None, str(error)
    times: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, dict[str, float]] = {}
    rates: list[float] = []

    def measure(way: Way) -> None:
        decoding = decodings[way.name]
        decoding.restart()
        decoding.run(WARM_STEPS)
        memory.reset()
        times[way.name].append(seconds(device, lambda: decoding.run(STEPS)) / STEPS)
        peaks[way.name] = memory.peaks()
        decoding.forget()
        rates.append(bandwidth(buffer))

    in_turns(ways, runs, measure)
    result = measured(ways, times, peaks)
    reads = {
        way.name: tensor_bytes(way.model)
        - way.model.get_input_embeddings().weight.nbytes
        + cache_bytes(way.model.config, batch, context)
        for way in ways
    }
    rate = max(*rates, *(read / result[name]["seconds"] for name, read in reads.items()))
    for way in ways:
        figures, read = result[way.name], reads[way.name]
        figures["tokens a second"] = batch / figures["seconds"]
        figures["read GB a step"] = read / 1e9
        figures["share of the bandwidth"] = read / figures["seconds"] / rate
        if way.is_compiled:
            figures["first step, compiling, seconds"] = first_steps[way.name]
        if way.name in uncaptured:
            figures["no CUDA graph"] = uncaptured[way.name]
    return {"batch": batch, "context": context, "bandwidth GB/s": rate / 1e9, "ways": result}


@torch.no_grad()
def prefill(ways: Sequence[Way], batch: int, context: int, runs: int) -> dict[str, Any]:
    """Seconds to the first token of prompts that are read in parts, as our `generate` does."""
    times: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, dict[str, float]] = {}
    device = ways[0].model.device
    memory = Memory(device)
    prompt = torch.randint(3, ways[0].model.config.vocab_size, (batch, context), device=device)

    def read(model: Any) -> None:
        cache = DynamicCache(config=model.config)
        for start in range(0, context, PREFILL_CHUNK):
            part = prompt[:, start : start + PREFILL_CHUNK]
            logits = model(part, use_cache=True, logits_to_keep=1, **cache_argument(cache)).logits
        logits.argmax(-1).tolist()

    def measure(way: Way) -> None:
        memory.reset()
        times[way.name].append(seconds(device, lambda: read(way.model)))
        peaks[way.name] = memory.peaks()

    for way in ways:
        way.model(prompt[:, :PREFILL_CHUNK], logits_to_keep=1)
    in_turns(ways, runs, measure)
    result = measured(ways, times, peaks)
    for figures in result.values():
        figures["tokens a second"] = batch * context / figures["seconds"]
    return {"batch": batch, "context": context, "ways": result}


@torch.no_grad()
def disagreement(ours: Any, stock: Any) -> float:
    """How far our logits of a decoded token are from stock's, relative to them."""
    prompt = torch.randint(3, ours.config.vocab_size, (1, 33), device=ours.device)
    found = []
    for model in (ours, stock):
        past = cache_in(model(prompt[:, :-1], use_cache=True))
        found.append(model(prompt[:, -1:], **cache_argument(past)).logits.double())
    return float((found[0] - found[1]).norm() / found[1].norm())


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything measured so far, again and again."""
    buffer = torch.ones(options.buffer // 4, device=options.device)
    ways = [
        Way(
            f"ours, {weights}",
            our_model(options.geometry, options.layers, weights, options.device),
            is_quantized=weights != "bf16",
        )
        for weights in options.weights
    ]
    result: dict[str, Any] = {
        "geometry": options.geometry,
        "layers": ways[0].model.config.num_hidden_layers,
        "load average before": os.getloadavg()[0],
        "decode": [],
        "prefill": [],
        "decode, compiled": [],
    }
    print(f"{result['layers']} layers of {options.geometry}")
    if options.stock and options.weights[0] == "bf16":
        stock = stock_model(ways[0].model)
        result["our logits from stock's"] = disagreement(ways[0].model, stock)
        if options.device.type == "cpu" and HAS_AMX:
            vectors = with_same_weights(OURS, ways[0].model.config, ways[0].model)
            use_vector_products_(vectors)
            ways.insert(1, Way("ours, bf16, vector products", vectors))
        ways.insert(0, Way("stock, bf16", stock))
    for batch, context in options.decode:
        result["decode"].append(decode(ways, batch, context, options.runs, buffer))
        show("Decode", result["decode"][-1])
        yield result
    for batch, context in dict.fromkeys([*options.prefill, *options.quantized_prefill]):
        prompts = {True: options.quantized_prefill, False: options.prefill}
        taking_part = [way for way in ways if (batch, context) in prompts[way.is_quantized]]
        if taking_part:
            result["prefill"].append(prefill(taking_part, batch, context, options.runs))
            show("Read the prompt", result["prefill"][-1])
            yield result
    # From here on the models are compiled.
    ways = [Way(f"{way.name}, compiled", way.model, is_compiled=True) for way in ways]
    for way in ways if options.compiled else ():
        if isinstance(way.model, OURS):
            compile_layers_(way.model)
        else:
            way.model.compile(fullgraph=True, dynamic=False)
    for batch, context in options.compiled:
        result["decode, compiled"].append(decode(ways, batch, context, options.runs, buffer))
        show("Decode", result["decode, compiled"][-1])
        yield result


def show(what: str, case: dict[str, Any]) -> None:
    rate = f"; memory is read at {case['bandwidth GB/s']:.1f} GB/s" if "bandwidth GB/s" in case else ""
    print(f"\n{what}: batch {case['batch']}, context {case['context']}{rate}")
    for name, figures in case["ways"].items():
        line = f"  {name:30} {figures['seconds'] * 1000:9.2f} ms {figures['tokens a second']:9.1f} tokens/s "
        line += f"{figures['times as fast as the first']:6.2f} ×  peak +{figures['peak above what is held GB']:.2f} GB"
        if "share of the bandwidth" in figures:
            line += f"  {figures['share of the bandwidth']:4.0%} of the bandwidth"
        if "first step, compiling, seconds" in figures:
            line += f"  first step {figures['first step, compiling, seconds']:.1f} s"
        if "no CUDA graph" in figures:
            line += f"  without a CUDA graph: {figures['no CUDA graph']}"
        print(line, flush=True)


def case_of(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    return int(batch), int(context)


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--geometry", choices=GEOMETRIES, default="narrow")
    parser.add_argument("--layers", type=int, help="default: those of the geometry")
    parser.add_argument("--weights", choices=["bf16", "fp8", "int4"], nargs="+", default=["bf16", "fp8", "int4"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    case: dict[str, Any] = {"type": case_of, "nargs": "*", "metavar": "BATCHxCONTEXT"}
    parser.add_argument("--prefill", default=[(1, 512), (8, 512), (1, 8192)], help="prompts to read", **case)
    parser.add_argument("--quantized-prefill", default=[(1, 512)], help="the same for quantized weights", **case)
    parser.add_argument(
        "--decode", default=[(1, 64), (8, 64), (1, 8192), (8, 8192)], help="contexts to go on from", **case
    )
    parser.add_argument(
        "--compiled", default=[(1, 64), (1, 8192)], help="the same, compiled, with static cache", **case
    )
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="leave stock transformers out")
    parser.add_argument("--runs", type=int, default=5, help="turns of every measurement")
    parser.add_argument("--buffer", type=int, default=2**30, help="bytes that are read to measure the bandwidth")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    # Compiling is measured from nothing.
    torch._inductor.config.force_disable_caches = True
    torch.manual_seed(0)
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
        "runs": options.runs,
    }
    for result in measure(options):
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({**about, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()

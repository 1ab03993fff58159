"""Checks and speed of everything this package runs on one GPU, within the few minutes that one may be borrowed for.

One process runs stage after stage, each with a deadline, and writes what it has found at once. Checks come first: every
product, attention and cache against float64, then the demo's golden responses by every strategy. Then figures, with
random weights of the published geometry that are made on the GPU; nothing is downloaded. A share is that of the read
bandwidth measured in the same run: what a step must read are all weights but the embeddings, and the filled cache.

    benchmarks/gpu.sh                                   # nine minutes on an H200; --folder takes the results
    benchmarks/gpu.sh --stages machine kernels answers  # some of it
    benchmarks/gpu.sh --small                           # all of it with tiny models, on the CPU

The exit code is 1 if a check fails, a stage breaks off, or a bar is not met.
"""

import argparse
import ast
import gc
import itertools
import json
import math
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LogitsProcessor

import benchmarks.stand_ins  # noqa: F401  # before the package is imported
from benchmarks import stream
from benchmarks.generate import Decoding, Way, cache_bytes, disagreement, fill_, our_model, stock_model
from benchmarks.gpu_peers import gemlite
from modeling_mistral_large import MistralLargeForCausalLM
from modeling_mistral_large.generation import RecordedCache, record_decoding, release_recording
from modeling_mistral_large.generation.compiled_layers import compile_layers_
from modeling_mistral_large.inference import gpu_kernels
from modeling_mistral_large.inference.gpu_kernels import DOT_TILE, VECTOR_TILE, Tile, Weights
from modeling_mistral_large.inference.kv_cache import Fp8Cache, pack, unpack
from modeling_mistral_large.inference.static_cache import Fp8States
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear, round_to_fp8
from modeling_mistral_large.recorded_steps.decoding import RecordedDecoding
from tests.support.gpu_products import placed, random_weights, relative_error

RESULTS = Path(__file__).parent / "results"
# Rows of the weights that are multiplied at once, and their columns, in a decoder layer of 2407.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "q, k, v": ((12288, 1024, 1024), 12288),
    "o": ((12288,), 12288),
    "gate, up": ((28672, 28672), 12288),
    "down": ((12288,), 28672),
}
SMALL_SHAPES = {"q, k, v": ((40, 16, 16), 256), "down": ((40,), 384)}
HEADS, KV_HEADS, HEAD_DIM = 96, 8, 128
# Of `generate`: no token ends a response, and none is chance; and what turns recorded steps off.
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PLAIN: dict[str, Any] = {"cache_implementation": "dynamic"}
# Errors that arithmetic in BF16 and sums of tensor cores explain.
SUMS, BF16 = 2e-4, 5e-3


class DeadlineError(Exception):
    """A stage took too long."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise DeadlineError(f"not done after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Bench:
    """Where it runs, how large, and what was found."""

    def __init__(self, is_small: bool, folder: Path) -> None:
        self.is_small = is_small
        self.device = torch.device("cpu" if is_small else "cuda")
        self.read_rate = math.nan
        self.failures: list[str] = []
        self.checks: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        gpu = "cpu" if is_small else torch.cuda.get_device_name().removeprefix("NVIDIA ").replace(" ", "-").lower()
        self.file = folder / f"gpu-{gpu}.json"

    def save(self, name: str, result: Any) -> None:
        self.results[name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({**self.results, "failures": self.failures}, indent=1) + "\n")

    def check(self, name: str, most: float, error: Callable[[], float]) -> None:
        """PASS if an error is at most `most`; whatever is raised is a FAIL and stops nothing."""
        try:
            figure, what = error(), ""
        except DeadlineError:
            raise
        except Exception as problem:
            figure, what = math.nan, f"{type(problem).__name__}: {str(problem).strip()[:300]}"
        is_good = figure <= most
        self.checks.append({"check": name, "error": figure, "most": most, "pass": is_good, "what": what})
        print(f"{'PASS' if is_good else 'FAIL'}  {name}: {figure:.3g}, at most {most:g} {what}", flush=True)
        if not is_good:
            self.failures.append(name)

    def bar(self, name: str, is_met: bool) -> None:
        if not self.is_small:
            print(f"{'pass' if is_met else 'MISS'}  {name}", flush=True)
            if not is_met:
                self.failures.append(name)

    def seconds(self, function: Callable[[], Any], repeats: int = 1) -> float:
        """Seconds of a call, the mean of several, by the GPU's clock."""
        if self.is_small:
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            return (time.perf_counter() - start) / repeats
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch does not type it
        start_event.record()
        for _ in range(repeats):
            function()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) / 1000 / repeats

    def wall_seconds(self, function: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if not self.is_small:
            torch.cuda.synchronize()

    def recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function as a CUDA graph, after a call that compiles what it needs."""
        if self.is_small:
            return function
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch does not type it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def free(self) -> None:
        gc.collect()
        if not self.is_small:
            torch.cuda.empty_cache()


def machine(bench: Bench) -> dict[str, Any]:
    """Versions, and the ceilings: bytes read and copied a second, BF16 products."""
    device = bench.device
    buffer = torch.ones(2**20 if bench.is_small else 2**30, device=device)
    size = 256 if bench.is_small else 8192
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    other = torch.empty_like(buffer)
    ways: list[Callable[[], Any]] = [
        lambda: torch.dot(buffer, buffer),
        lambda: buffer.sum(),
        lambda: other.copy_(buffer),
        lambda: left @ right,
    ]
    for way in ways:
        way()
    dot, total, copy, multiply = (bench.seconds(way, 10) for way in ways)
    bench.read_rate = buffer.nbytes / min(dot, total)
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "device": "cpu" if bench.is_small else torch.cuda.get_device_name(),
        "read GB/s": bench.read_rate / 1e9,
        "copy GB/s, read and written": 2 * buffer.nbytes / copy / 1e9,
        "bf16 product TFLOP/s": 2 * size**3 / multiply / 1e12,
    }
    if not bench.is_small:
        fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        result["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    print(json.dumps(result, indent=1), flush=True)
    return result


def product_error(
    weights: Weights, dense: Tensor, m: int, tile: Tile | None = None, splits: int | None = None
) -> float:
    x = torch.randn(m, weights.columns, device=dense.device).bfloat16()
    count = splits or weights.splits(m, tile)
    part = torch.full((count, m, weights.rows), math.nan, device=dense.device)
    gpu_kernels.multiply(placed(x, weights.group), weights, part, tile=tile, splits=splits)
    return relative_error(part.sum(0), as_taken(x, weights.takes_fp8) @ dense.T)


def as_taken(x: Tensor, by_fp8: bool) -> Tensor:
    """Activations in float64 as a product with FP8 weights takes them, W8A8, or unrounded."""
    if not by_fp8:
        return x.double()
    codes, scales = round_to_fp8(x)
    return codes.double() * scales.double()


def fp8_states(states: Tensor) -> Fp8States:
    packed = pack(states)
    codes, scales = packed[..., :-2].contiguous(), packed[..., -2:].contiguous()
    return Fp8States(codes.view(torch.float8_e4m3fn), scales.view(torch.bfloat16)[..., 0])


def attention_error(bench: Bench, filled: int, starts: Sequence[int], splits: int, is_fp8: bool) -> float:
    """Slots that are padding or not filled are NaN."""
    m, room, device = len(starts), filled + 70, bench.device
    heads, kv_heads = (24, 2) if bench.is_small else (HEADS, KV_HEADS)
    query = torch.randn(m, heads, HEAD_DIM, device=device).bfloat16()
    keys, values = (torch.randn(m, kv_heads, room, HEAD_DIM, device=device).bfloat16() for _ in range(2))
    given: list[Any] = [keys, values]
    if is_fp8:
        given = [fp8_states(states) for states in given]
        keys, values = (states.codes.float() * states.scales.float()[..., None] for states in given)
    for tensor in [states.scales for states in given] if is_fp8 else given:
        tensor[:, :, filled + 1 :] = math.nan
        for row, start in enumerate(starts):
            tensor[row, :, :start] = math.nan
    at = [torch.tensor(each, dtype=torch.int32, device=device) for each in ([filled] * m, list(starts))]
    parts = torch.full((m, heads, splits, HEAD_DIM), math.nan, device=device)
    stats = torch.full((m, heads, splits, 2), math.nan, device=device)
    y = torch.full((m, heads * HEAD_DIM), math.nan, device=device).bfloat16()
    gpu_kernels.attend(query, given[0], given[1], at, HEAD_DIM**-0.5, parts, stats, y, 0)
    errors = []
    for row, start in enumerate(starts):
        key, value = (tensor[row, :, start : filled + 1].double() for tensor in (keys, values))
        scores = torch.einsum("kgd,ksd->kgs", query[row].double().view(kv_heads, -1, HEAD_DIM), key) * HEAD_DIM**-0.5
        expected = torch.einsum("kgs,ksd->kgd", scores.softmax(-1), value)
        errors.append(relative_error(y[row].view_as(expected), expected))
    return max(errors)


def linear_error(kind: str, rows: int, columns: int, m: int, device: torch.device) -> float:
    """A layer of `quantized` as the model runs it, by the kernels it has on the device."""
    layer: Any = (Fp8Linear if kind == "fp8" else Int4Linear)(columns, rows, device=device)
    with torch.no_grad():
        fill_(layer)
        layer.weight_scale.mul_(
            torch.rand_like(layer.weight_scale, dtype=torch.float32).to(layer.weight_scale.dtype) + 0.5
        )
        dense = torch.cat(list(layer.dequantized_rows(torch.float32))).double()
        if kind == "fp8":
            dense *= layer.weight_scale.double()
        layer.after_loading_()
        x = torch.randn(m, columns, device=device).bfloat16()
        return relative_error(layer(x), as_taken(x, kind == "fp8") @ dense.T)


def dequantized_error(rows: int, columns: int, device: torch.device) -> float:
    """How many values are not those that torch dequantizes, bit for bit."""
    layer = Int4Linear(columns, rows, device=device)
    with torch.no_grad():
        fill_(layer)
    found = gpu_kernels.dequantized_int4(layer.weight_packed, layer.weight_scale)
    codes = layer.codes(0, rows).bfloat16() - 8
    expected = (codes.view(rows, -1, layer.group_size) * layer.weight_scale[..., None]).flatten(1)
    return float((found != expected).sum())


def rounding_error(columns: int, device: torch.device) -> float:
    """How many activations a step rounds to FP8 in another way than the layers."""
    x = torch.randn(16, columns, device=device).bfloat16() * torch.rand(16, 1, device=device).bfloat16()
    codes, scales = round_to_fp8(x)
    found, found_scales = gpu_kernels.rounded(x)
    return float((found != codes.bfloat16()).sum() + (found_scales != scales[:, 0]).sum())


def stored_error(bench: Bench) -> float:
    """Bytes of an FP8 cache that are not those which `Fp8Cache` makes of what a BF16 cache gets."""
    m, room, device = 4, 70, bench.device
    part = torch.randn(2, m, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=device)
    angles = torch.randn(room, HEAD_DIM // 2, device=device).repeat(1, 2)
    tables = (angles.cos().bfloat16(), angles.sin().bfloat16())
    at = [torch.tensor(each, dtype=torch.int32, device=device) for each in ([69, 3, 0, 20], [0, 3, 0, 7])]
    query = torch.empty(m, HEADS, HEAD_DIM, device=device).bfloat16()
    exact = [torch.zeros(m, KV_HEADS, room, HEAD_DIM, device=device).bfloat16() for _ in range(2)]
    coded = [fp8_states(states) for states in exact]
    gpu_kernels.rotate(part, 2, query, exact[0], exact[1], tables, at)
    gpu_kernels.rotate(part, 2, query, coded[0], coded[1], tables, at)
    different = 0
    for states, found in zip(exact, coded, strict=True):
        expected = fp8_states(states)
        different += int((found.codes.view(torch.uint8) != expected.codes.view(torch.uint8)).sum())
        different += int((found.scales != expected.scales).sum())
    return float(different)


def cache_error(bench: Bench) -> float:
    states = torch.randn(1, 8, 300, HEAD_DIM).bfloat16() * torch.rand(1, 8, 300, 1).bfloat16()
    there = pack(states.to(bench.device))
    different = int((there.cpu() != pack(states)).sum())
    return float(different) + float(
        not torch.equal(unpack(there, torch.bfloat16).cpu(), unpack(pack(states), torch.bfloat16))
    )


def flash_error(bench: Bench, queries: int, keys: int) -> float:
    """Attention of a later chunk of a prompt without a mask: the last query sees all keys."""
    query = torch.randn(1, HEADS, queries, HEAD_DIM, device=bench.device).bfloat16()
    key, value = (torch.randn(1, KV_HEADS, keys, HEAD_DIM, device=bench.device).bfloat16() for _ in range(2))
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=bench.device).tril(keys - queries)
    with sdpa_kernel(SDPBackend.MATH):
        # A few heads: float64 of all of them is large.
        expected = nn.functional.scaled_dot_product_attention(
            query[:, :12].double(), key[:, :1].double(), value[:, :1].double(), attn_mask=mask, enable_gqa=True
        )
    return relative_error(found[:, :12], expected)


def kernels(bench: Bench) -> dict[str, Any]:
    """Every kernel against float64, at the shapes of the model."""
    shapes = SMALL_SHAPES if bench.is_small else SHAPES
    is_old = not bench.is_small and torch.cuda.get_device_capability() < (8, 9)
    for kind in ("bf16", "fp8_bits", "int4") if is_old else ("bf16", "fp8", "fp8_bits", "int4"):
        for name, (rows, columns) in shapes.items():
            weights, dense = random_weights(kind, rows, columns, bench.device.type)
            for m in (1, 5) if bench.is_small else (1, 2, 7, 8, 16):
                bench.check(f"{kind} {name}, {m} rows", SUMS, partial(product_error, weights, dense, m))
            if kind != "int4":
                bench.check(
                    f"{kind} {name}, 1 row as a matrix",
                    SUMS,
                    partial(product_error, weights, dense, 1, DOT_TILE[kind], 4),
                )
    for filled, starts, splits in (
        ((0, [0], 4), (64, [0, 33], 4))
        if bench.is_small
        else (
            (0, [0], 16),
            (62, [0], 16),
            (63, [0, 1, 63], 16),
            (4096, [0, 17, 4000, 4096], 16),
            (4096, [0], 64),
            (32767, [0, 16000], 64),
            (131071, [0], 64),
        )
    ):
        for is_fp8 in (False, True):
            bench.check(
                f"attention at slot {filled}, starts {starts}{', FP8 cache' if is_fp8 else ''}",
                BF16,
                partial(attention_error, bench, filled, starts, splits, is_fp8),
            )
    height, width = (64, 256) if bench.is_small else (28672, 12288)
    for m in (1, 2, 8, 17) if bench.is_small else (1, 2, 8, 17, 300, 2048):
        bench.check(f"Fp8Linear, {m} rows", BF16, partial(linear_error, "fp8", height, width, m, bench.device))
        bench.check(f"Int4Linear, {m} rows", BF16, partial(linear_error, "int4", height, width, m, bench.device))
    bench.check("int4 dequantized, values that differ", 0, lambda: dequantized_error(height, width, bench.device))
    bench.check("activations rounded to FP8, values that differ", 0, lambda: rounding_error(width, bench.device))
    bench.check("FP8 cache of a step, bytes that differ", 0, lambda: stored_error(bench))
    bench.check("Fp8Cache, bytes that differ from the CPU's", 0, lambda: cache_error(bench))
    if not bench.is_small:
        bench.check("flash attention of a later chunk, no mask", BF16, lambda: flash_error(bench, 512, 1536))
        bench.check("flash attention of a last chunk of odd length", BF16, lambda: flash_error(bench, 77, 4173))
    return {"checks": bench.checks}


def answers(bench: Bench) -> dict[str, Any]:
    """The golden responses of the demo by every strategy, and recorded steps next to the model's own."""
    from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
    from mistral_large_conversion import convert_checkpoint
    from modeling_mistral_large import MistralLargeTokenizer

    before = len(bench.checks)
    golden = list(golden_conversations().values())[: 2 if bench.is_small else None]
    with TemporaryDirectory() as folder:
        source = assemble_demo_checkpoint(Path(folder, "source"))
        folders = {"bf16": Path(folder, "bf16"), "fp8": Path(folder, "fp8"), "int4": Path(folder, "int4")}
        for kind, target in folders.items():
            convert_checkpoint(source, target, **({} if kind == "bf16" else {"quantize": kind}))  # type: ignore[arg-type]
        tokenizer = MistralLargeTokenizer.from_pretrained(folders["bf16"])
        prompts = [tokenizer.apply_chat_template(each.messages, each.tools, return_dict=False) for each in golden]
        most = 7 if bench.is_small else 120
        texts = [f"{each.answer}</s>" for each in golden]
        if bench.is_small:
            texts = [
                str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: most - 1]))
                for text in texts
            ]

        def wrong(complete: Callable[[Any], Tensor], batch: int = 1) -> float:
            """How many responses are not the golden ones."""
            count = 0
            for start in range(0, len(golden), batch):
                inputs = tokenizer.pad({"input_ids": prompts[start : start + batch]}, return_tensors="pt")
                output = complete(inputs)[:, inputs["input_ids"].shape[1] :]
                said = [text.replace(str(tokenizer.pad_token), "") for text in tokenizer.batch_decode(output)]
                count += sum(
                    not text.startswith(right) if bench.is_small else text != right
                    for text, right in zip(said, texts[start : start + batch], strict=True)
                )
            return float(count)

        def load(kind: str, **options: Any) -> Any:
            options.setdefault("device_map", bench.device.type)
            return MistralLargeForCausalLM.from_pretrained(folders[kind], dtype=torch.bfloat16, **options).eval()

        def generated(model: Any, *, recorded: bool = False, **options: Any) -> Callable[[Any], Tensor]:
            greedy = {"max_new_tokens": most, "do_sample": False}
            if not recorded and "past_key_values" not in options:
                options.setdefault("cache_implementation", "dynamic")
            return lambda inputs: model.generate(**inputs.to(bench.device), **greedy, **options).cpu()

        def with_fp8_cache(model: Any, inputs: Any) -> Tensor:
            return generated(model, past_key_values=Fp8Cache(model.config))(inputs)

        def with_recorded_fp8_cache(model: Any, inputs: Any) -> Tensor:
            cache = RecordedCache(record_decoding(model, 256, cache="fp8"))
            return generated(model, past_key_values=cache)(inputs)

        def offloaded_wrong(kind: str, devices: dict[str, Any]) -> float:
            return wrong(generated(load(kind, device_map=devices)))

        for kind in folders:
            model = load(kind)
            bench.check(f"answers, {kind}, generate", 0, partial(wrong, generated(model)))
            bench.check(f"answers, {kind}, generate, a padded batch", 0, partial(wrong, generated(model), 8))
            bench.check(
                f"answers, {kind}, Fp8Cache",
                0,
                partial(wrong, partial(with_fp8_cache, model)),
            )
            static: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
            bench.check(f"answers, {kind}, static cache", 0, partial(wrong, generated(model, **static)))
            for batch in (2,) if bench.is_small else (1, 8):
                bench.check(
                    f"answers, {kind}, recorded steps, batch {batch}",
                    0,
                    partial(wrong, generated(model, recorded=True), batch),
                )
            if kind == "bf16" or not bench.is_small:
                lookup = generated(model, recorded=True, prompt_lookup_num_tokens=4)
                bench.check(f"answers, {kind}, recorded steps, prompt lookup", 0, partial(wrong, lookup))
            bench.check(
                f"answers, {kind}, recorded steps, FP8 cache",
                0,
                partial(wrong, partial(with_recorded_fp8_cache, model)),
            )
            release_recording(model)
            del model
            if not bench.is_small:
                devices = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 0}
                devices |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
                bench.check(
                    f"answers, {kind}, a layer offloaded to the host",
                    0,
                    partial(offloaded_wrong, kind, devices),
                )
    return {"checks": bench.checks[before:]}


def weights_without_values(kind: str, rows: tuple[int, ...], columns: int, device: torch.device) -> Weights:
    """Random bytes: the time of a product does not depend on them."""

    def noise(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)

    if kind == "int4":
        weights = [noise(count, columns // 8) for count in rows]
        scales = [torch.full((count, columns // 128), 0.01, dtype=torch.bfloat16, device=device) for count in rows]
    elif kind == "fp8":
        weights = [noise(count, columns // 4).view(torch.float8_e4m3fn) for count in rows]
        scales = [torch.full((count, 1), 0.01, device=device) for count in rows]
    else:
        weights = [torch.randn(count, columns, dtype=torch.bfloat16, device=device) for count in rows]
        scales = weights
    return Weights(kind, columns, 128 if kind == "int4" else 0, tuple(weights), tuple(scales))


def weight_bytes(weights: Weights) -> int:
    scales = () if weights.kind == "bf16" else weights.scales
    return sum(tensor.nbytes for tensor in (*weights.weights, *scales))


def tiles_to_try(kind: str, m: int, is_small: bool) -> list[Tile]:
    if kind == "int4":
        int4_tiles = [
            DOT_TILE["int4"],
            Tile(128, 256, 4, 2, inputs=8),
            Tile(128, 256, 4, 4, inputs=8),
            Tile(128, 128, 4, 4, inputs=8),
            Tile(128, 512, 4, 2, inputs=8),
            *(Tile(64, columns, 4, stages, inputs=8) for columns in (128, 256, 512) for stages in (2, 3)),
            Tile(32, 256, 2, 3, inputs=8),
            Tile(32, 512, 2, 3, inputs=8),
            Tile(128, 256, 8, 3),
            # The fastest ones of the first run on an H200.
            Tile(128, 128, 8, 4),
            Tile(64, 128, 4, 2),
        ]
        return int4_tiles[::7] if is_small else int4_tiles
    dots = [Tile(64, 128, 4, 4), Tile(64, 256, 4, 3), Tile(128, 128, 8, 3), Tile(64, 256, 4, 2)]
    dots += [Tile(128, 128, 8, 3, inputs=8), Tile(128, 128, 4, 3, inputs=8), Tile(64, 256, 4, 3, inputs=8)]
    vectors = [
        Tile(rows, columns, warps, is_vector=True)
        for (rows, columns), warps in itertools.product([(4, 1024), (8, 512), (8, 1024), (16, 512), (4, 2048)], (4, 8))
    ]
    tiles = [*vectors, dots[0]] if m == 1 else dots
    return tiles[:: len(tiles) - 1] if is_small else tiles


def sweep_product(bench: Bench, kind: str, rows: tuple[int, ...], columns: int, m: int) -> dict[str, Any]:
    """GB/s of a product by several tiles and splits; weights of 4 GB in turn, so that no cache holds them."""
    one = weights_without_values(kind, rows, columns, bench.device)
    others = 0 if bench.is_small else 4 * 10**9 // weight_bytes(one)
    copies = [one, *(weights_without_values(kind, rows, columns, bench.device) for _ in range(others))]
    x, scales = torch.randn(m, columns, device=bench.device).bfloat16(), torch.ones(m, device=bench.device)
    part = torch.empty(8 * m * one.rows, device=bench.device)

    def run(tile: Tile, splits: int, some: Sequence[Weights]) -> None:
        for weights in some:
            gpu_kernels.multiply(x, weights, part, scales, tile=tile, splits=splits)

    def try_it(case: tuple[Tile, int]) -> str | None:
        try:
            run(*case, [one])
        except DeadlineError:
            raise
        except Exception as problem:
            return f"{type(problem).__name__}: {str(problem)[:100]}"
        return None

    tiles = tiles_to_try(kind, m, bench.is_small)
    cases = [(tile, splits) for tile in tiles for splits in sorted({one.splits(m, tile), 1, 2, 4})]
    # Compiled side by side.
    with ThreadPoolExecutor(1 if bench.is_small else 12) as pool:
        problems = list(pool.map(try_it, cases))
    figures: dict[str, Any] = {}
    for (tile, splits), problem in zip(cases, problems, strict=True):
        shape = "vector" if tile.is_vector else "dot"
        label = f"{shape} {tile.rows}x{tile.columns}, {tile.warps} warps, {tile.stages} stages, {splits} splits"
        label += "" if tile.is_vector else f", {tile.inputs} inputs"
        if problem is not None:
            figures[label] = problem
            continue
        replay = bench.recorded(partial(run, tile, splits, copies))
        replay()
        figures[label] = round(weight_bytes(one) * len(copies) / bench.seconds(replay, 2) / 1e9, 1)
    chosen = f"{one.tile(m)}, {one.splits(m)} splits"
    best = sorted(((rate, label) for label, rate in figures.items() if isinstance(rate, float)), reverse=True)[:4]
    print(f"{kind} {rows} x {columns}, {m} rows: {best}; now {chosen}", flush=True)
    return {"chosen": chosen, "GB/s": figures}


def sweep(bench: Bench) -> dict[str, Any]:
    """The speed of each product by several tiles; the most important ones first."""
    result: dict[str, Any] = {}
    shapes = SMALL_SHAPES if bench.is_small else SHAPES
    for m, kind, (name, (rows, columns)) in itertools.product((1, 8), ("fp8", "int4", "bf16"), shapes.items()):
        if kind != "bf16" or bench.is_small or name == "gate, up":
            result[f"{kind} {name}, {m} rows"] = sweep_product(bench, kind, rows, columns, m)
            bench.save("sweep", result)
            bench.free()
    return result


def random_model(kind: str, layers: int, bench: Bench, *, kernels: bool = False) -> Any:
    geometry = "tiny" if bench.is_small else "2407"
    return our_model(geometry, min(layers, 1) if bench.is_small else layers, kind, bench.device, kernels=kernels)


def step_bytes(model: Any, batch: int, context: int) -> int:
    weights = sum(tensor.nbytes for tensor in model.parameters()) - model.get_input_embeddings().weight.nbytes
    return int(weights + cache_bytes(model.config, batch, context))


def steps(bench: Bench, model: Any, context: int, batch: int = 1, room: int | None = None) -> dict[str, Any]:
    """The time of recorded steps after `context` tokens, in a cache for `room`; it holds random values."""
    return time_of_steps(bench, model, filled(record_decoding(model, room or context + 100, batch)), context)


def time_of_steps(bench: Bench, model: Any, decoding: RecordedDecoding, context: int) -> dict[str, Any]:
    decoding.lengths.fill_(context)
    count = 2 if bench.is_small else 20
    if not bench.is_small:
        decoding.run()
    taken = bench.seconds(decoding.run, count)
    is_fp8_cache = decoding.cache_dtype == "fp8"
    read = step_bytes(model, decoding.batch, context)
    if is_fp8_cache:
        cache = cache_bytes(model.config, decoding.batch, context)
        read -= int(cache * (1 - (1 + 2 / model.config.head_dim) / 2))
    result = {
        "batch": decoding.batch,
        "context": context,
        "cache": "fp8" if is_fp8_cache else "bf16",
        "ms a step": taken * 1000,
        "tokens/s": decoding.batch / taken,
        "read GB": read / 1e9,
        "GB/s": read / taken / 1e9,
        "share of the read bandwidth": read / taken / bench.read_rate,
    }
    print(json.dumps(result), flush=True)
    return result


def filled(decoding: RecordedDecoding) -> RecordedDecoding:
    for layer in decoding.layers:
        for states in (layer.keys, layer.values):
            if isinstance(states, Tensor):
                states.normal_()
            else:
                states.codes.copy_(torch.randn(states.codes.shape[1:], device=states.codes.device))
                states.scales.fill_(1.0)
    return decoding


def one_sequence(
    bench: Bench, name: str, model: Any, contexts: Sequence[int], prompt: Tensor, result: dict[str, Any]
) -> None:
    start = time.perf_counter()
    decoding = filled(record_decoding(model, contexts[-1] + 100))
    bench.wait()
    result["record s"] = time.perf_counter() - start
    for context in contexts:
        result["steps"].append(time_of_steps(bench, model, decoding, context))
        bench.save(name, result)
    del decoding
    bench.free()
    first_token = partial(model.generate, prompt, max_new_tokens=1, **GREEDY)
    result["first token s, first time"] = bench.wall_seconds(first_token)
    result["first token s"] = bench.wall_seconds(first_token)
    result["generate tokens/s"] = 1 / seconds_a_token(bench, model, prompt[:, :64], 3 if bench.is_small else 65)
    bench.save(name, result)
    result["drafts"] = drafts(bench, model)
    bench.save(name, result)


class Script(LogitsProcessor):
    """Whatever the model says, the token at each place is that of a script."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.tokens[input_ids.shape[1]]] = 0
        return forced


def drafts(bench: Bench, model: Any) -> list[dict[str, Any]]:
    """`generate` with prompt lookup next to without, for responses that repeat the prompt up to some tokens of chance.

    A drafted token is right where the response repeats the prompt, so the share that does is the acceptance.
    """
    count = 4 if bench.is_small else 96
    chance = torch.Generator().manual_seed(0)
    prompt = torch.randperm(model.config.vocab_size - 3, generator=chance)[: 2 * count] + 3
    others = torch.randperm(model.config.vocab_size - 3, generator=chance)[: 2 * count] + 3
    results = []
    for acceptance in (0.0, 1.0) if bench.is_small else (0.0, 0.7, 1.0):
        is_right = torch.rand(count, generator=chance) < acceptance
        script = torch.where(is_right, prompt[:count], others[:count])
        # The response begins as the prompt, whose last token is its first one once more.
        ids = torch.cat((prompt, prompt[:1]))
        tokens = torch.cat((ids, script[1:], others)).tolist()
        options: dict[str, Any] = {"logits_processor": [Script(tokens)], "max_new_tokens": count - 1, **GREEDY}
        given = ids[None].to(bench.device)
        lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
        forwards: list[Any] = []
        handle = model.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        seconds = {}
        for name, extra in (("without", {}), ("with", lookup)):
            if not bench.is_small:
                model.generate(given, **options, **extra)
            forwards.clear()
            seconds[name] = bench.wall_seconds(partial(model.generate, given, **options, **extra))
        handle.remove()
        figures = {
            "acceptance": acceptance,
            "tokens/s without": (count - 1) / seconds["without"],
            "tokens/s": (count - 1) / seconds["with"],
            "times as fast": seconds["without"] / seconds["with"],
            "tokens a forward": (count - 1) / len(forwards),
        }
        print(json.dumps(figures), flush=True)
        results.append(figures)
    bench.bar(
        f"drafts that are all wrong: {results[0]['times as fast']:.2f} times as fast, at least 0.95",
        results[0]["times as fast"] >= 0.95,
    )
    return results


def seconds_a_token(bench: Bench, model: Any, prompt: Tensor, count: int, **options: Any) -> float:
    """Of `generate` after the first token; `options` are its."""
    options = {**GREEDY, **options}
    model.generate(prompt, max_new_tokens=2, **options)
    few, many = (
        bench.wall_seconds(partial(model.generate, prompt, max_new_tokens=each, **options)) for each in (1, count)
    )
    return (many - few) / (count - 1)


@torch.no_grad()
def full_model(bench: Bench, name: str, kind: str, layers: int) -> dict[str, Any]:
    """Recorded steps of one model, its prompts, memory and what users' `generate` reaches, with and without drafts."""
    bench.free()
    if not bench.is_small:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = random_model(kind, layers, bench)
    bench.wait()
    result: dict[str, Any] = {"layers": model.config.num_hidden_layers, "build s": time.perf_counter() - start}
    weights = sum(tensor.nbytes for tensor in model.parameters())
    result["weights GB"] = weights / 1e9
    contexts = (8, 40) if bench.is_small else (64, 4096, 32768)
    prompt = torch.randint(3, model.config.vocab_size, (1, contexts[1]), device=bench.device)
    result["steps"] = []
    one_sequence(bench, name, model, contexts, prompt, result)
    batch = 2 if bench.is_small else 8
    for context in contexts[:2]:
        bench.free()
        result["steps"].append(steps(bench, model, context, batch))
    bench.free()
    coded = filled(record_decoding(model, contexts[-1] + 100, cache="fp8"))
    result["steps, FP8 cache"] = [time_of_steps(bench, model, coded, context) for context in contexts[1:]]
    del coded
    if not bench.is_small:
        result["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        release_recording(model)
        result["generate tokens/s, not recorded"] = 1 / seconds_a_token(bench, model, prompt[:, :64], 17, **PLAIN)
    print({key: value for key, value in result.items() if key != "steps"}, flush=True)
    if layers == 88:
        least, share = (28, 0.8) if kind == "fp8" else (47, 0.7)
        short_step, long_step = result["steps"][0], result["steps"][2]
        bench.bar(f"{kind}: {short_step['tokens/s']:.1f} tokens/s, at least {least}", short_step["tokens/s"] >= least)
        reached = short_step["share of the read bandwidth"]
        bench.bar(f"{kind}: {reached:.0%} of the read bandwidth, at least {share:.0%}", reached >= share)
        far = long_step["share of the read bandwidth"] / reached
        bench.bar(f"{kind}: at 32k {far:.0%} of that share, at least 90 %", far >= 0.9)
        bench.bar(f"{kind}: first token {result['first token s']:.2f} s, at most 2", result["first token s"] < 2)
        near = result["generate tokens/s"] / short_step["tokens/s"]
        bench.bar(f"{kind}: generate {near:.0%} of the recorded steps, at least 95 %", near >= 0.95)
    return result


def layers_that_fit(bench: Bench, kind: str) -> int:
    """All 88, or as many of a layer's bytes as leave room for embeddings, head, cache and buffers."""
    if bench.is_small:
        return 1
    # The model of the stage before.
    bench.free()
    layer = {"fp8": 1.385e9, "int4": 0.714e9, "bf16": 2.769e9}[kind]
    free, _ = torch.cuda.mem_get_info()
    return min(88, int((free - 16e9) / layer))


def fp8(bench: Bench) -> dict[str, Any]:
    """FP8, all layers that fit."""
    return full_model(bench, "fp8", "fp8", layers_that_fit(bench, "fp8"))


def int4(bench: Bench) -> dict[str, Any]:
    """int4, all layers."""
    return full_model(bench, "int4", "int4", layers_that_fit(bench, "int4"))


@torch.no_grad()
def stock(bench: Bench) -> dict[str, Any]:
    """BF16, 22 layers, next to transformers' Mistral with the same weights: both uncompiled, and ours recorded."""
    bench.free()
    ours = random_model("bf16", min(22, layers_that_fit(bench, "bf16")), bench)
    theirs = stock_model(ours)
    result: dict[str, Any] = {"layers": ours.config.num_hidden_layers, "logits apart": disagreement(ours, theirs)}
    prompt = torch.randint(3, ours.config.vocab_size, (1, 64), device=bench.device)
    count = 3 if bench.is_small else 17
    for name, model in (("stock", theirs), ("ours", ours)):
        result[f"{name}, generate, ms a token"] = seconds_a_token(bench, model, prompt, count, **PLAIN) * 1000
    result["ours, recorded"] = steps(bench, ours, 64)
    print(result, flush=True)
    return result


@torch.no_grad()
def today(bench: Bench) -> dict[str, Any]:
    """A compiled layer in a CUDA graph, as before recorded steps, and what cuDNN's plans cost at each new length."""
    result: dict[str, Any] = {}
    for kind in ("fp8", "int4"):
        bench.free()
        model = random_model(kind, 4, bench, kernels=True)
        prompt = torch.randint(3, model.config.vocab_size, (1, 64), device=bench.device)
        uncompiled = seconds_a_token(bench, model, prompt, 3 if bench.is_small else 17, **PLAIN)
        result[f"{kind}, 4 layers, generate, ms a token"] = uncompiled * 1000
        # Before the layers are compiled, which are then no longer the ones that a step repeats.
        result[f"{kind}, 4 layers recorded"] = steps(bench, model, 64)
        compile_layers_(model)
        decoding = Decoding(Way(kind, model, is_compiled=True), 1, 64)
        decoding.restart()
        result[f"{kind}, 4 layers compiled, first step s"] = bench.wall_seconds(decoding.step)
        if not bench.is_small:
            decoding.capture()
        taken = bench.seconds(partial(decoding.run, 1), 5)
        read = step_bytes(model, 1, 64)
        result[f"{kind}, 4 layers compiled and captured"] = {
            "ms a step": taken * 1000,
            "share of the read bandwidth": read / taken / bench.read_rate,
        }
        bench.save("today", result)
    if not bench.is_small:
        query = torch.randn(1, HEADS, 1, HEAD_DIM, device=bench.device).bfloat16()
        states = torch.randn(1, KV_HEADS, 4200, HEAD_DIM, device=bench.device).bfloat16()
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            times = []
            for length in (4100, 4101, 4102, 4103, 4103):
                view = states[:, :, :length].contiguous()
                with sdpa_kernel(backend):
                    attend = partial(nn.functional.scaled_dot_product_attention, query, view, view, enable_gqa=True)
                    times.append(bench.wall_seconds(attend) * 1000)
            result[f"{backend.name}, ms at 4100, 4101, 4102, 4103, 4103 again"] = times
    print(json.dumps(result, indent=1), flush=True)
    return result


def load(bench: Bench) -> dict[str, Any]:
    """Both layouts onto the GPU, cold and from the page cache: streamed, as transformers reads, and reading alone."""
    bench.free()
    with TemporaryDirectory() as name:
        stream.make(Path(name), stream.params_of(1, 512) if bench.is_small else stream.params_of(2))
        result = stream.measure_device(Path(name), bench.device, 2)
    for layout, found in result.items():
        bench.check(f"load, {layout}, different tensors", 0, partial(found.__getitem__, "different tensors"))
        for cache in ("cold", "warm"):
            speeds = found[f"{cache}, GB/s"]
            bench.bar(
                f"load, {layout}, {cache}, as fast as transformers", speeds["streamed"] >= speeds["as transformers"]
            )
    return result


# Seconds after which a stage is broken off; together they fit ten minutes.
STAGES: dict[str, tuple[int, Callable[[Bench], dict[str, Any]]]] = {
    "machine": (40, machine),
    "kernels": (110, kernels),
    "answers": (110, answers),
    "fp8": (110, fp8),
    "int4": (110, int4),
    "stock": (45, stock),
    "today": (60, today),
    "load": (90, load),
    "sweep": (150, sweep),
    "gemlite": (120, lambda bench: gemlite(bench, random_weights)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU; no bars")
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=list(STAGES), help="some of the stages")
    parser.add_argument("--window", type=float, default=540, help="seconds for all stages together")
    parser.add_argument("--folder", type=Path, help="for the results; default: benchmarks/results, with --small none")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        if options.small:
            # Fewer and larger programs: the interpreter runs one after another.
            for tiles in (VECTOR_TILE, DOT_TILE):
                tiles |= {kind: replace(tile, rows=1024) for kind, tile in tiles.items()}
        bench = Bench(options.small, options.folder or (Path(scratch) if options.small else RESULTS))
        torch.manual_seed(0)
        started = time.perf_counter()
        # Without it there is no bandwidth to compare with.
        for name in dict.fromkeys(["machine", *options.stages]):
            seconds, stage = STAGES[name]
            left = options.window - (time.perf_counter() - started)
            print(f"\n== {name}, {left:.0f} s left", flush=True)
            if left < 10 and not options.small:
                bench.failures.append(f"{name}: no time left")
                continue
            entered = time.perf_counter()
            try:
                with deadline(3600 if options.small else min(seconds, left)):
                    result = stage(bench)
                result["seconds"] = time.perf_counter() - entered
                bench.save(name, result)
            except Exception as problem:
                traceback.print_exc()
                bench.failures.append(f"{name}: {type(problem).__name__}: {problem}")
                bench.save(f"{name}, broken off", {"checks": list(bench.checks)})
        print(f"\n{time.perf_counter() - started:.0f} s; failures: {bench.failures or 'none'}", flush=True)
    sys.exit(bool(bench.failures))


if __name__ == "__main__":
    main()

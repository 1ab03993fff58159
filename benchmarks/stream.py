"""Reading weights for a GPU: streamed, as transformers does, and by as many threads that do nothing but read.

Without a GPU, it measures all up to the copy that a GPU makes itself: bytes are brought into a few buffers and left
there. Streamed: the package's own code, for a device without memory (meta), asked by as many threads as transformers
has. As transformers does: those threads copy each tensor out of the mapped file into a buffer that each has, as the
driver must before a GPU can take it. Reading alone: the same threads and pieces as streaming. Each runs in a process of
its own; they take turns, each turn begins with another one, and ratios are medians of the turns' ratios. A peak is the
process's VmHWM above what it had before; mapped pages count in it.

With `--device cuda`, it times `from_pretrained` of both layouts, next to transformers' own reading, which
MISTRAL_LARGE_STREAMED_LOADING=0 leaves alone, and compares the tensors bit for bit; benchmarks/gpu.sh does the same.

    python -m benchmarks.stream --gigabytes 1.2 --json benchmarks/results/stream.json

Cold: the files, and no others, have been put out of the page cache, which is checked. Linux only. The files take twice
the size on the disk.
"""

import argparse
import ast
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import GLOBAL_WORKERS

import benchmarks.stand_ins  # noqa: F401  # before the package is imported
from benchmarks.linux import apart, evict, memory
from mistral_large_conversion.checkpoint.names import expected_tensors
from mistral_large_conversion.checkpoint.params import geometry_from_params
from mistral_large_conversion.checkpoint.rope import split_rope_pairs
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, streamed_weights

TENSORS_OF_A_SHARD = 8
LAYOUTS = ("consolidated", "hf")
WAYS = ("streamed", "as transformers", "reading alone")


def params_of(layers: int, hidden: int = 12288) -> dict[str, Any]:
    """The params.json of 2407 with fewer layers, and narrower."""
    share = 12288 // hidden
    return {
        "dim": hidden,
        "n_layers": layers,
        "head_dim": 128,
        "hidden_dim": 28672 // share,
        "n_heads": 96 // share,
        "n_kv_heads": max(1, 8 // share),
        "norm_eps": 1e-5,
        "vocab_size": 32768,
        "rope_theta": 1e6,
    }


def make(folder: Path, params: dict[str, Any], layouts: Sequence[str] = LAYOUTS) -> int:
    """Write the same random weights in each layout, shard by shard, and return their bytes."""
    geometry = geometry_from_params(params)
    for layout in layouts:
        (folder / layout).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = expected_tensors(geometry)
    shards = [tensors[start : start + TENSORS_OF_A_SHARD] for start in range(0, len(tensors), TENSORS_OF_A_SHARD)]
    weight_map: dict[str, str] = {}
    weight_bytes = 0
    for number, shard in enumerate(shards, 1):
        weights = {tensor: torch.empty(tensor.shape, dtype=torch.bfloat16) for tensor in shard}
        for weight in weights.values():
            weight.view(torch.int16).random_(0x3C00, 0x3E00, generator=generator)
            weight_bytes += weight.nbytes
        suffix = f"-{number:05}-of-{len(shards):05}.safetensors"
        if "consolidated" in layouts:
            save_file(
                {tensor.consolidated: weight for tensor, weight in weights.items()},
                folder / "consolidated" / f"consolidated{suffix}",
            )
        if "hf" in layouts:
            converted = {
                tensor.hf: split_rope_pairs(weight, head_dim=geometry.head_dim)
                if ".q_proj." in tensor.hf or ".k_proj." in tensor.hf
                else weight
                for tensor, weight in weights.items()
            }
            save_file(converted, folder / "hf" / f"model{suffix}", {"format": "pt"})
            weight_map |= dict.fromkeys(converted, f"model{suffix}")
    if "consolidated" in layouts:
        (folder / "consolidated" / "params.json").write_text(json.dumps(params))
    if "hf" in layouts:
        config = MistralLargeConfig.from_geometry(geometry)
        config.architectures = ["MistralLargeForCausalLM"]
        config.save_pretrained(folder / "hf")
        index = {"metadata": {"total_size": weight_bytes}, "weight_map": weight_map}
        (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.rglob("*.safetensors"):
        # Pages that are not yet written cannot be put out of the cache.
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return weight_bytes


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_in_parallel(files: Sequence[Path]) -> None:
    """Read all bytes once, with the threads and the pieces of streaming, into a buffer of each thread."""
    local = threading.local()

    def read(piece: tuple[Path, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(streamed_weights.BUFFER_BYTES)
        with piece[0].open("rb", buffering=0) as stream:
            stream.seek(piece[1])
            stream.readinto(local.buffer)

    pieces = [(path, start) for path in files for start in range(0, path.stat().st_size, streamed_weights.BUFFER_BYTES)]
    with ThreadPoolExecutor(streamed_weights.READERS) as readers:
        list(readers.map(read, pieces))


def copy_from_mapping(files: Sequence[Path]) -> None:
    """Bring all tensors into a buffer of each thread as transformers and the driver do."""
    local = threading.local()

    def copy(mapped: Any) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = np.zeros(streamed_weights.BUFFER_BYTES, np.uint8)
        elements = mapped[...].view(torch.uint8).view(-1).numpy()
        for start in range(0, len(elements), len(local.buffer)):
            part = elements[start : start + len(local.buffer)]
            np.copyto(local.buffer[: len(part)], part)

    opened: list[Any] = [safe_open(path, framework="pt") for path in files]
    with ThreadPoolExecutor(GLOBAL_WORKERS) as workers:
        list(workers.map(copy, [file.get_slice(name) for file in opened for name in file.keys()]))  # noqa: SIM118  # not a dict


def stream(files: Sequence[Path]) -> None:
    """Bring all tensors into the buffers of the package, for a device that takes them at once."""
    streamed_weights.STREAMED_DEVICES.add("meta")
    with (
        streamed_weights.streamed_weights([str(path) for path in files], {"meta"}) as weights,
        ThreadPoolExecutor(GLOBAL_WORKERS) as workers,
    ):
        assert weights is not None
        list(workers.map(lambda weight: weight[...].to("meta"), weights.values()))


FUNCTIONS: dict[str, Callable[[Sequence[Path]], None]] = dict(
    zip(WAYS, (stream, copy_from_mapping, read_in_parallel), strict=True)
)


def run(way: str, is_cold: bool, folder: Path) -> dict[str, float]:
    """Read in one way, in this process."""
    files = weight_files(folder)
    read_in_parallel(files)
    if is_cold:
        evict(files)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    start = time.perf_counter()
    FUNCTIONS[way](files)
    return {"seconds": time.perf_counter() - start, "peak GB": memory("VmHWM") - before}


def measure(folder: Path, runs: int) -> dict[str, Any]:
    gigabytes = sum(path.stat().st_size for path in weight_files(folder)) / 1e9
    result: dict[str, Any] = {"weights GB": gigabytes}
    for cache in ("cold", "warm"):
        turns: dict[str, list[dict[str, float]]] = defaultdict(list)
        for turn in range(runs):
            for place in range(len(WAYS)):
                way = WAYS[(turn + place) % len(WAYS)]
                turns[way].append(apart(run, way, cache == "cold", folder))
        seconds = {way: [found["seconds"] for found in turns[way]] for way in WAYS}
        result[cache] = {
            "GB/s": {way: gigabytes / statistics.median(found) for way, found in seconds.items()},
            "seconds, each turn": seconds,
            "peak GB": {way: max(found["peak GB"] for found in turns[way]) for way in WAYS},
            "speed, streamed / other": {
                way: statistics.median(
                    theirs / mine for mine, theirs in zip(seconds["streamed"], seconds[way], strict=True)
                )
                for way in WAYS[1:]
            },
        }
        print(cache, json.dumps(result[cache], indent=1), flush=True)
    return result


def load_onto(device: torch.device, folder: Path, is_streamed: bool) -> Any:
    os.environ[streamed_weights.SWITCH] = str(int(is_streamed))
    # A CPU stands for a GPU where there is none.
    streamed_weights.STREAMED_DEVICES.add(device.type)
    try:
        return MistralLargeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
    finally:
        del os.environ[streamed_weights.SWITCH]


def different_tensors(first: Any, second: Any) -> int:
    others = second.state_dict()
    return sum(not torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())


def measure_device(folder: Path, device: torch.device, runs: int) -> dict[str, Any]:
    """Times of `from_pretrained` onto a device, and how many tensors differ from transformers' own reading."""
    result: dict[str, Any] = {}

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for layout in LAYOUTS:
        files = weight_files(folder / layout)
        gigabytes = sum(path.stat().st_size for path in files) / 1e9
        ways: dict[str, Callable[[], Any]] = {
            "streamed": lambda: load_onto(device, folder / layout, True),  # noqa: B023  # called in this turn
            "as transformers": lambda: load_onto(device, folder / layout, False),  # noqa: B023  # called in this turn
            "reading alone": lambda: read_in_parallel(files),  # noqa: B023  # called in this turn
        }
        streamed, own = ways["streamed"](), ways["as transformers"]()
        found: dict[str, Any] = {"weights GB": gigabytes, "different tensors": different_tensors(streamed, own)}
        del streamed, own
        for cache in ("cold", "warm"):
            seconds = defaultdict(list)
            for _ in range(runs):
                for way, function in ways.items():
                    if cache == "cold":
                        evict(files)
                    synchronize()
                    start = time.perf_counter()
                    model = function()
                    synchronize()
                    seconds[way].append(time.perf_counter() - start)
                    del model
            found[f"{cache}, seconds"] = dict(seconds)
            found[f"{cache}, GB/s"] = {way: gigabytes / min(times) for way, times in seconds.items()}
        result[layout] = found
        print(layout, json.dumps(found, indent=1), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the weights")
    parser.add_argument("--runs", type=int, default=7, help="turns of every measurement")
    parser.add_argument("--device", type=torch.device, help="load onto it; default: all up to a GPU's own copy")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the one for temporary files")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    # Of a width of 4096, a layer has 0.31 GB, embeddings and head 0.54.
    params = params_of(max(1, round((options.gigabytes - 0.54) / 0.31)), 4096)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name).resolve()
        make(folder, params, LAYOUTS if options.device else LAYOUTS[:1])
        if options.device:
            results = measure_device(folder, options.device, options.runs)
        else:
            results = measure(folder / LAYOUTS[0], options.runs)
    results |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": {"transformers": GLOBAL_WORKERS, "streamed": streamed_weights.READERS},
        "runs": options.runs,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

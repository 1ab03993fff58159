"""Loading and first forward of synthetic checkpoints, compared with stock transformers and with reading the bytes once.

The same bf16 weights are there in the consolidated layout and in the HF layout. Three ways load them, run one forward
of eight tokens and read the embeddings to their end: ours from either layout, and transformers' own MistralForCausalLM
from the HF layout. Each runs in a process of its own, forked from one that has imported everything and computed
nothing. The ways take turns, each turn begins with another one, and a ratio is the median of the turns' ratios. All
ways must agree on the logits.

Cold: the files have been put out of the page cache, which is checked, and the time is that of load and forward. Warm:
the time is that of the load alone, and the copy of the query and key weights, which is all that the direct load has to
do more, is timed in the same process. The peak is the process's VmHWM; the mapped pages of the files count in it.

    python -m benchmarks.load --gigabytes 1 4 --json benchmarks/results/load.json

Linux only. Needs a little more than twice the largest size on the disk, and more than it in memory.
"""

import argparse
import ast
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM
from transformers.utils import logging

from benchmarks.convert import params_of_size
from benchmarks.linux import apart, evict, memory
from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.checkpoint.names import expected_tensors
from mistral_large_conversion.checkpoint.params import geometry_from_params
from modeling_mistral_large import MistralLargeForCausalLM
from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from tests.support.checkpoints import tokenizer_model_file

BUFFER_BYTES = 8 * 2**20
TENSORS_OF_A_SHARD = 30
PROMPT = [1, 3, 6312, 28709, 1526, 4, 1200, 2]
# The folder that each way reads.
WAYS = {"stock, HF": "stock", "ours, HF": "hf", "ours, consolidated": "consolidated", "reading once": "consolidated"}
LOADING_WAYS = [way for way in WAYS if way != "reading once"]


def make(folder: Path, gigabytes: float) -> None:
    """Write the three folders; stock's has its weights by links."""
    params = params_of_size(gigabytes)
    consolidated, hf, stock = (folder / name for name in ("consolidated", "hf", "stock"))
    consolidated.mkdir(parents=True)
    stock.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = expected_tensors(geometry_from_params(params))
    shards = [tensors[start : start + TENSORS_OF_A_SHARD] for start in range(0, len(tensors), TENSORS_OF_A_SHARD)]
    for number, shard in enumerate(shards, 1):
        weights = {
            tensor.consolidated: torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for tensor in shard
        }
        save_file(weights, consolidated / f"consolidated-{number:05}-of-{len(shards):05}.safetensors")
    (consolidated / "params.json").write_text(json.dumps(params))
    (consolidated / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    plan = convert_checkpoint(consolidated, hf, max_shard_size="2GB")
    own = {
        name: value
        for name, value in MistralLargeConfig.from_geometry(plan.geometry).to_dict().items()
        if name not in ("architectures", "model_type")
    }
    MistralConfig(**own, sliding_window=None).save_pretrained(stock)
    for path in hf.glob("model*"):
        (stock / path.name).symlink_to(path)
    for path in weight_files(consolidated):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def weight_files(folder: Path) -> list[Path]:
    return sorted(path.resolve() for path in folder.glob("*.safetensors"))


def read_once(files: Sequence[Path]) -> None:
    buffer = bytearray(BUFFER_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def run(way: str, cache: str, folder: Path) -> dict[str, float]:
    """Load in one way, in this process."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not type it
    files = weight_files(folder)
    if cache == "cold":
        evict(files)
    else:
        read_once(files)
    imported = memory("VmRSS")
    if way == "reading once":
        start = time.perf_counter()
        read_once(files)
        return {"seconds": time.perf_counter() - start}
    # transformers types its models in part only.
    model_class: Any = MistralForCausalLM if way.startswith("stock") else MistralLargeForCausalLM
    start = time.perf_counter()
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits
        # The forward needs eight rows of it. Read to its end, all ways have read as much as the one that only reads.
        model.get_input_embeddings().weight.sum()
    done = time.perf_counter()
    result = {
        "seconds": done - start if cache == "cold" else loaded - start,
        "load": loaded - start,
        "forward": done - loaded,
        "logits": logits.double().square().sum().item(),
        "peak GB": memory("VmHWM"),
        "imports GB": imported,
        "own GB": memory("RssAnon"),
    }
    if way == "ours, consolidated" and cache == "warm":
        del model, logits
        start = time.perf_counter()
        copies = []
        for path in files:
            with safe_open(path, framework="pt") as stored:
                names = [name for name in stored.keys() if ".wq." in name or ".wk." in name]  # noqa: SIM118
                copies += [stored.get_tensor(name).clone() for name in names]
        result["copy of q and k"] = time.perf_counter() - start
    return result


def turns(folder: Path, cache: str, ways: Sequence[str], runs: int) -> dict[str, list[dict[str, float]]]:
    """What each way has measured in each turn."""
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(runs):
        for place in range(len(ways)):
            way = ways[(turn + place) % len(ways)]
            results[way].append(apart(run, way, cache, folder / WAYS[way]))
    return results


def measure(folder: Path, gigabytes: float, runs: int) -> dict[str, Any]:
    apart(make, folder, gigabytes)
    weights = sum(path.stat().st_size for path in weight_files(folder / "consolidated")) / 1e9
    cold = turns(folder, "cold", list(WAYS), runs)
    warm = turns(folder, "warm", LOADING_WAYS, runs)
    sums = {result["logits"] for way in LOADING_WAYS for result in cold[way] + warm[way]}
    if len(sums) != 1 or not math.isfinite(*sums):
        raise SystemExit(f"the ways disagree on the logits: {sums}")

    def seconds(results: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
        return {way: [result["seconds"] for result in found] for way, found in sorted(results.items())}

    def ratio(way: str, to: str) -> float:
        pairs = zip(seconds(cold)[way], seconds(cold)[to], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    direct, hf = (seconds(warm)[way] for way in ("ours, consolidated", "ours, HF"))
    copies = [result["copy of q and k"] for result in warm["ours, consolidated"]]
    peak = {way: max(result["peak GB"] for result in cold[way] + warm[way]) for way in LOADING_WAYS}
    return {
        "weights GB": weights,
        "cold, load and forward, seconds": {way: statistics.median(found) for way, found in seconds(cold).items()},
        "cold, each turn": seconds(cold),
        "warm, load, seconds": {way: statistics.median(found) for way, found in seconds(warm).items()},
        "warm, each turn": seconds(warm),
        "warm, copy of q and k, seconds": statistics.median(copies),
        "peak GB": peak,
        "peak above the weights GB": {way: found - weights for way, found in peak.items()},
        "imports GB": max(result["imports GB"] for result in cold["ours, consolidated"]),
        "own memory at the end GB": {way: max(result["own GB"] for result in cold[way]) for way in LOADING_WAYS},
        "ratios": {
            "cold: ours, HF / stock, HF": ratio("ours, HF", "stock, HF"),
            "cold: ours, consolidated / stock, HF": ratio("ours, consolidated", "stock, HF"),
            "cold: ours, HF / reading once": ratio("ours, HF", "reading once"),
            "cold: ours, consolidated / reading once": ratio("ours, consolidated", "reading once"),
            "warm: (ours, consolidated - ours, HF) / copy of q and k": statistics.median(
                (mine - theirs) / copy for mine, theirs, copy in zip(direct, hf, copies, strict=True)
            ),
        },
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['weights GB']:.2f} GB of weights")
    for way, seconds in result["cold, load and forward, seconds"].items():
        warm = result["warm, load, seconds"].get(way)
        peak = result["peak above the weights GB"].get(way)
        rest = "" if warm is None else f"   warm load {warm:6.3f} s   peak {peak:5.2f} GB above the weights"
        print(f"  {way:20} cold load and forward {seconds:6.2f} s{rest}")
    print(f"  {'copy of q and k':20} warm {result['warm, copy of q and k, seconds']:6.3f} s")
    for name, ratio in result["ratios"].items():
        print(f"  {name:58} {ratio:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0], help="sizes, such as 1 4 12")
    parser.add_argument("--runs", type=int, default=5, help="turns of every measurement")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the one for temporary files")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    sizes = {}
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            sizes[f"{gigabytes:g} GB"] = measure(Path(name).resolve(), gigabytes, options.runs)
        show(sizes[f"{gigabytes:g} GB"])
    if options.json:
        results = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "runs": options.runs,
            "sizes": sizes,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

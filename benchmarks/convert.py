"""How fast a synthetic checkpoint is converted, and in how much memory, against copying it and the published way.

    python -m benchmarks.convert --gigabytes 1 4 --runs 5 --json benchmarks/results/convert.json

Five ways take turns: ours; the command, `mistral-large convert`, as a whole process; `cp -r` of the same files, which
leaves what it can in memory; `cp -r` until all of it is on the disk, as ours is; and the way of the published script:
the whole state dict in memory, renamed and permuted, then `save_pretrained`. Each runs in a process of its own. Seconds
of ours and of the script are without imports and the start of the process; the peak is less that of a process that only
imports the same. Needs twice the largest size on the disk, and mistral-common for its tokenizer file; everything is
removed at the end.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
FULL_BYTES = 245_220_139_008
# Widths of a common 8B model; the number of layers follows from the size asked for.
PARAMS = {
    "dim": 4096,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32768,
    "rope_theta": 1e6,
}
OURS, PROCESS, STATE_DICT = "convert", "mistral-large convert", "state dict"
COPY, COPY_TO_DISK = "cp -r", "cp -r, to the disk"
# The published way holds all of it, and in the page cache once more.
LARGEST_STATE_DICT_GB = 5.0
Cache = Literal["warm", "cold"]


def params_of_size(gigabytes: float) -> dict[str, Any]:
    """The params.json of a checkpoint that takes about so much in bf16."""
    from mistral_large_conversion.checkpoint.names import expected_tensors
    from mistral_large_conversion.checkpoint.params import geometry_from_params

    def bytes_of(layers: int) -> int:
        tensors = expected_tensors(geometry_from_params({**PARAMS, "n_layers": layers}))
        return sum(2 * math.prod(tensor.shape) for tensor in tensors)

    one, two = bytes_of(1), bytes_of(2)
    return {**PARAMS, "n_layers": max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))}


def make(folder: Path, gigabytes: float) -> None:
    """Write a consolidated checkpoint of about this size in two files, with noise for weights."""
    import numpy

    from mistral_large_cli.demo import tokenizer_model_file
    from mistral_large_conversion.checkpoint.names import expected_tensors
    from mistral_large_conversion.checkpoint.params import geometry_from_params
    from mistral_large_conversion.checkpoint.safetensors_header import TensorEntry, encode_header

    params = params_of_size(gigabytes)
    tensors = [
        TensorEntry(tensor.consolidated, "BF16", tensor.shape, 2 * math.prod(tensor.shape))
        for tensor in expected_tensors(geometry_from_params(params))
    ]
    noise = numpy.random.default_rng(0).bytes(2**24)
    for number in (1, 2):
        of_file = tensors[number - 1 :: 2]
        with (folder / f"consolidated-{number:05}-of-00002.safetensors").open("wb") as stream:
            stream.write(encode_header(of_file))
            left = sum(tensor.size for tensor in of_file)
            while left:
                left -= stream.write(noise[:left])
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer_model_file(), folder / "tokenizer.model.v3")


def convert(source: Path, destination: Path) -> None:
    from mistral_large_conversion import convert_checkpoint

    convert_checkpoint(source, destination)


def convert_state_dict(source: Path, destination: Path) -> None:
    """What the published script does, with the number of key heads fixed."""
    import torch
    from safetensors.torch import load_file
    from transformers import MistralConfig, MistralForCausalLM

    from mistral_large_conversion.checkpoint.names import expected_tensors
    from mistral_large_conversion.checkpoint.rope import split_rope_pairs
    from modeling_mistral_large import MistralLargeConfig

    config = MistralLargeConfig.from_pretrained(source)
    loaded: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("consolidated*.safetensors")):
        loaded |= load_file(path)
    state_dict = {
        tensor.hf: split_rope_pairs(loaded[tensor.consolidated], head_dim=config.head_dim)
        if tensor.has_rope_pairs
        else loaded[tensor.consolidated]
        for tensor in expected_tensors(config)
    }
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "dtype")}
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**settings, dtype="bfloat16"))
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.save_pretrained(destination)


def load_modules(source: Path, destination: Path) -> None:
    """Nothing, in a process that has imported all that the others have."""


STEPS: dict[str, Callable[[Path, Path], None]] = {
    OURS: convert,
    STATE_DICT: convert_state_dict,
    "imports": load_modules,
}


def run_step(name: str, source: Path, destination: Path) -> tuple[float, int]:
    """Run a step of this file in a process of its own: its seconds, and its peak memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.convert", "--step", name, str(source), str(destination)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"step {name} failed")
    # Linux counts kilobytes, macOS bytes.
    return float(printed.splitlines()[-1]), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed_step(name: str, source: Path, destination: Path) -> None:
    import torch  # noqa: F401
    from transformers import MistralForCausalLM  # noqa: F401

    import mistral_large_conversion  # noqa: F401

    started = time.perf_counter()
    STEPS[name](source, destination)
    print(time.perf_counter() - started)


def run_command(source: Path, destination: Path) -> tuple[float, int]:
    """Seconds of the command from its start to its end; its memory is that of the step, without torch."""
    command = [sys.executable, "-m", "mistral_large_cli", "convert", str(source), str(destination)]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started, 0


def copy(source: Path, destination: Path, *, to_the_disk: bool) -> tuple[float, int]:
    """Seconds of `cp -r`, with or without waiting for the disk; its memory is not of interest."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    if to_the_disk:
        for path in destination.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    return time.perf_counter() - started, 0


def prepare(source: Path, destination: Path, cache: Cache) -> None:
    """Have nothing to write left from the way before, and the source in the page cache, or not."""
    shutil.rmtree(destination, ignore_errors=True)
    os.sync()
    for path in source.iterdir():
        with path.open("rb") as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(2**24):
                    pass


def measure(gigabytes: float, runs: int, caches: Sequence[Cache], folder: Path) -> list[dict[str, Any]]:
    """All ways over a checkpoint of this size, in turns."""
    source, destination = folder / "source", folder / "destination"
    needed = 2.1 * gigabytes * 1e9
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"{folder}: {gigabytes} GB need {needed / 1e9:.1f} GB free; pass --folder on another disk")
    source.mkdir()
    make(source, gigabytes)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    _, imports_peak = run_step("imports", source, destination)
    ways: dict[str, Callable[[], tuple[float, int]]] = {
        OURS: lambda: run_step(OURS, source, destination),
        PROCESS: lambda: run_command(source, destination),
        COPY: lambda: copy(source, destination, to_the_disk=False),
        COPY_TO_DISK: lambda: copy(source, destination, to_the_disk=True),
    }
    if gigabytes <= LARGEST_STATE_DICT_GB:
        ways[STATE_DICT] = lambda: run_step(STATE_DICT, source, destination)
    results = []
    for cache in caches:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        peaks = {name: 0 for name in ways if name in STEPS}
        for _ in range(runs):
            for name, way in ways.items():
                prepare(source, destination, cache)
                taken, peak = way()
                seconds[name].append(round(taken, 3))
                if name in peaks:
                    peaks[name] = max(peaks[name], peak - imports_peak)
        results.append(
            {
                "bytes": size,
                "cache": cache,
                "seconds": seconds,
                "median_seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
                "speed_of_convert_by_that_of": {
                    name: speed(seconds[OURS], taken) for name, taken in seconds.items() if name not in (OURS, PROCESS)
                },
                "speed_of_the_process_by_that_of": {
                    name: speed(seconds[PROCESS], seconds[name]) for name in (COPY, COPY_TO_DISK)
                },
                "peak_bytes_above_imports": peaks,
            }
        )
        print_result(results[-1])
    shutil.rmtree(source)
    shutil.rmtree(destination, ignore_errors=True)
    return results


def speed(own: Sequence[float], others: Sequence[float]) -> float:
    """How many times as fast the first is: the median over the turns."""
    return round(statistics.median(other / mine for other, mine in zip(others, own, strict=True)), 2)


def print_result(result: dict[str, Any]) -> None:
    print(f"\n{result['bytes'] / 1e9:.2f} GB, {result['cache']} cache")
    for name, median in result["median_seconds"].items():
        each = ", ".join(f"{taken:.2f}" for taken in result["seconds"][name])
        peak = result["peak_bytes_above_imports"].get(name)
        print(
            f"{name:<21} {median:7.2f} s {result['bytes'] / 1e6 / median:7,.0f} MB/s"
            + ("" if peak is None else f" {peak / 1e6:8,.0f} MB above the imports")
            + f"   ({each})"
        )
    for name, ratio in result["speed_of_convert_by_that_of"].items():
        print(f"convert has {ratio:.2f} × the speed of {name}")
    for name, ratio in result["speed_of_the_process_by_that_of"].items():
        print(f"the whole process has {ratio:.2f} × the speed of {name}")
    seconds = result["median_seconds"][OURS] * FULL_BYTES / result["bytes"]
    print(f"at this rate, 245 GB take {seconds / 60:.1f} minutes")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0], help="add 12 with 25 GB free")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; the default is the one for temporary files"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step is not None:
        name, source, destination = options.step
        timed_step(name, Path(source), Path(destination))
        return
    results: list[dict[str, Any]] = []
    # So that the folder is removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for gigabytes in options.gigabytes:
            results += measure(gigabytes, options.runs, options.cache, Path(folder).resolve())
    if options.json is not None:
        machine = {"processors": os.cpu_count(), "system": platform.system(), "release": platform.release()}
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

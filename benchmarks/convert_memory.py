"""Peak memory of converting a synthetic checkpoint, and its speed beside that of `cp -r` to the same disk.

    python -m benchmarks.convert_memory --gigabytes 4 --runs 3

Each step runs in a process of its own. The peak is that of the converting process, less the peak of one that only
imports the same modules. Both ways are timed until the bytes are on the disk; they take turns. Needs three times the
size on the disk and mistral-common, for its tokenizer file; everything is removed at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 1e6
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


def make(folder: Path, gigabytes: float) -> None:
    """Write a consolidated checkpoint of about this size in two files, with noise for weights."""
    from importlib.util import find_spec

    import numpy

    from modeling_mistral_large.conversion.names import expected_tensors
    from modeling_mistral_large.conversion.params import config_from_params
    from modeling_mistral_large.conversion.safetensors_header import StoredTensor, encode_header

    def tensors_of(layers: int) -> list[StoredTensor]:
        config = config_from_params({**PARAMS, "n_layers": layers})
        return [
            StoredTensor(tensor.consolidated, "BF16", tensor.shape, 2 * int(numpy.prod(tensor.shape)))
            for tensor in expected_tensors(config)
        ]

    one, two = (sum(tensor.size for tensor in tensors_of(layers)) for layers in (1, 2))
    layers = max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))
    tensors = tensors_of(layers)
    noise = numpy.random.default_rng(0).bytes(2**24)
    for number in (1, 2):
        of_file = tensors[number - 1 :: 2]
        with (folder / f"consolidated-{number:05}-of-00002.safetensors").open("wb") as stream:
            stream.write(encode_header((tensor.name, tensor) for tensor in of_file))
            left = sum(tensor.size for tensor in of_file)
            while left:
                left -= stream.write(noise[:left])
    (folder / "params.json").write_text(json.dumps({**PARAMS, "n_layers": layers}))
    spec = find_spec("mistral_common")
    assert spec is not None, "pip install modeling-mistral-large[demo]: the tokenizer file is in mistral-common"
    assert spec.origin is not None
    tokenizer = Path(spec.origin).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(tokenizer, folder / "tokenizer.model.v3")


def load_modules() -> None:
    """Import what the conversion imports, and stop."""
    import modeling_mistral_large.conversion  # noqa: F401


def convert(source: Path, destination: Path) -> None:
    """Convert, and print the seconds without those of the imports."""
    from modeling_mistral_large.conversion import convert_checkpoint

    started = time.perf_counter()
    convert_checkpoint(source, destination)
    print(time.perf_counter() - started)


def run_step(*step: object) -> tuple[str, int]:
    """Run a step of this file in a process of its own: what it printed, and its peak memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.convert_memory", "--step", *map(str, step)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"step {step[0]} failed")
    # Linux counts kilobytes, macOS bytes.
    return printed, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy(source: Path, destination: Path) -> float:
    """Seconds of `cp -r` until all of it is on the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    for path in destination.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started


def measure(gigabytes: float, runs: int, folder: Path) -> None:
    source, destination = folder / "source", folder / "destination"
    source.mkdir()
    run_step("make", source, gigabytes)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in {folder}")
    _, imports_peak = run_step("load_modules")
    peaks, seconds = [], {"convert": list[float](), "cp -r": list[float]()}
    for _ in range(runs):
        printed, peak = run_step("convert", source, destination)
        peaks.append(peak - imports_peak)
        seconds["convert"].append(float(printed))
        shutil.rmtree(destination)
        seconds["cp -r"].append(copy(source, destination))
        shutil.rmtree(destination)
    print(f"imports alone   {imports_peak / MEGABYTE:,.0f} MB")
    print(f"peak above them {max(peaks) / MEGABYTE:,.0f} MB")
    for name, times in seconds.items():
        each = ", ".join(f"{size / MEGABYTE / time:,.0f}" for time in times)
        print(f"{name:<15} {size / MEGABYTE / statistics.median(times):,.0f} MB/s (median of {each})")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; the default is the one for temporary files"
    )
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step is None:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measure(options.gigabytes, options.runs, Path(folder).resolve())
        return
    name, *values = options.step
    steps: dict[str, Callable[[], None]] = {
        "make": lambda: make(Path(values[0]), float(values[1])),
        "load_modules": load_modules,
        "convert": lambda: convert(Path(values[0]), Path(values[1])),
    }
    steps[name]()


if __name__ == "__main__":
    main()

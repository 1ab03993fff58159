"""The speed of Mistral Large on one GPU of 141 GB, held against what it should reach.

The weights are random and made on the GPU: the speed does not depend on their values, and nothing is downloaded. Four
models run one after the other, each in a process of its own, by `benchmarks/generate.py`: all 88 layers in FP8, all of
them in 4 bits, 22 layers in bf16 beside stock transformers, and the share of one of eight tensor-parallel ranks in
bf16, which sends nothing to the others.

    benchmarks/gpu.sh            # an hour at most; results in benchmarks/results/generate-gpu.{json,svg}
    benchmarks/gpu.sh --small    # the same with tiny models on the CPU, to see that it runs

The exit code is 1 if a run fails, or a bar is not met.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROMPTS = ["--prefill", "1x4096", "--quantized-prefill", "1x4096"]
CONTEXTS = [*PROMPTS, "--decode", "1x64", "--compiled", "1x64", "1x4096", "8x64"]
RUNS = {
    "FP8, 88 layers": ["--geometry", "2407", "--weights", "fp8", "--no-stock", *CONTEXTS],
    "4 bits, 88 layers": ["--geometry", "2407", "--weights", "int4", "--no-stock", *CONTEXTS],
    "bf16, 22 layers": ["--geometry", "2407", "--layers", "22", "--weights", "bf16", *CONTEXTS],
    "bf16, one rank of 8": ["--geometry", "rank of 8", "--weights", "bf16", "--no-stock", *CONTEXTS],
}
# As much of each run as shows that it works.
SMALL = ["--device", "cpu", "--runs", "1", "--buffer", str(2**24)]
SMALL_CONTEXTS = ["--prefill", "1x64", "--quantized-prefill", "1x64", "--decode", "1x64", "--compiled", "1x64"]


@dataclass(frozen=True)
class Bar:
    """What a figure of a run has to be: at least `least`, or at most `most`."""

    run: str
    what: str
    figure: Callable[[dict[str, Any]], float]
    least: float = float("-inf")
    most: float = float("inf")

    def is_met(self, figure: float) -> bool:
        return self.least <= figure <= self.most


def short_step(result: dict[str, Any]) -> Any:
    """The figures of decoding one sequence, compiled."""
    return next(iter(result["decode, compiled"][0]["ways"].values()))


def first_token(result: dict[str, Any]) -> Any:
    return next(iter(result["prefill"][0]["ways"].values()))["seconds"]


def memory_above_weights(result: dict[str, Any]) -> float:
    """The most that any measurement held beside the weights, in parts of a bf16 copy of them."""
    cases = [case for kind in ("prefill", "decode", "decode, compiled") for case in result[kind]]
    figures = [figures for case in cases for figures in case["ways"].values()]
    weights = figures[0]["weights GB"]
    return float((max(each["peak GB"] for each in figures) - weights) / BF16_GB)


BF16_GB = 245.2
FP8, INT4 = "FP8, 88 layers", "4 bits, 88 layers"
BARS = [
    Bar(
        FP8, "share of the bandwidth, decoding", lambda result: float(short_step(result)["share of the bandwidth"]), 0.8
    ),
    Bar(FP8, "tokens a second", lambda result: float(short_step(result)["tokens a second"]), 27),
    Bar(
        INT4,
        "share of the bandwidth, decoding",
        lambda result: float(short_step(result)["share of the bandwidth"]),
        0.7,
    ),
    *(Bar(run, "seconds to the first token after 4096", first_token, most=2) for run in (FP8, INT4)),
    *(Bar(run, "memory beside the weights ÷ a bf16 copy", memory_above_weights, most=0.1) for run in (FP8, INT4)),
]


def run(name: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The results of a run, or None if it failed."""
    print(f"\n== {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.generate", *arguments, "--json", str(file)]
        if subprocess.run(command).returncode:
            print(f"{name}: failed", flush=True)
            return None
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def small(arguments: Sequence[str]) -> list[str]:
    """The same arguments, but for a tiny geometry."""
    kept = list(arguments[: -len(CONTEXTS)])
    kept[kept.index("--geometry") + 1] = "tiny"
    if "--layers" in kept:
        kept[kept.index("--layers") + 1] = "1"
    return [*kept, *SMALL_CONTEXTS, *SMALL]


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument(
        "--small", action="store_true", help="tiny models on the CPU; no bars, and results are not kept"
    )
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS), help="some of the runs")
    parser.add_argument("--folder", type=Path, help=f"for the results; default: {RESULTS}")
    options = parser.parse_args()
    results = {}
    for name in options.only:
        results[name] = run(name, small(RUNS[name]) if options.small else [*RUNS[name], "--device", "cuda"])
    is_good = None not in results.values()
    bars = []
    print()
    for bar in [] if options.small else BARS:
        if (result := results.get(bar.run)) is not None:
            figure = bar.figure(result)
            bars.append({"run": bar.run, "what": bar.what, "figure": figure, "met": bar.is_met(figure)})
            wanted = f"at least {bar.least:g}" if bar.most == float("inf") else f"at most {bar.most:g}"
            print(f"{'pass' if bar.is_met(figure) else 'FAIL'}  {bar.run}: {bar.what} {figure:.2f}, {wanted}")
            is_good &= bar.is_met(figure)
    folder = options.folder or (None if options.small else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "generate-gpu.json").write_text(json.dumps({"bars": bars, "runs": results}, indent=2) + "\n")
        if find_spec("matplotlib"):
            from benchmarks.plot import plot_gpu

            plot_gpu(folder)
        else:
            print("No picture: matplotlib is not installed.")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()

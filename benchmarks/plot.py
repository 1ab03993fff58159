"""Pictures of the result files in benchmarks/results; needs matplotlib, which nothing else here does.

    python -m benchmarks.plot

Bars are medians, dots the single turns.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
# The same file on every run.
SETTINGS = {"svg.hashsalt": "modeling-mistral-large", "font.size": 9, "axes.spines.top": False}
METADATA = {"Date": None}
plt.rcParams.update(SETTINGS)
# The bytes of the published weights.
FULL_GB = 245.2


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def bars(axes: Any, groups: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str) -> None:
    """Draw groups of bars: a group has the single values of each way by its name."""
    ways = list(dict.fromkeys(way for group in groups.values() for way in group))
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        places = [place + (number - (len(ways) - 1) / 2) * width for place in range(len(groups))]
        values = [sorted(group.get(way, [])) for group in groups.values()]
        medians = [each[len(each) // 2] if each else 0 for each in values]
        axes.bar(places, medians, width * 0.92, label=way)
        for place, each in zip(places, values, strict=True):
            axes.plot([place] * len(each), each, ".", color="black", markersize=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=8)


def plot_convert() -> None:
    """Speed of converting and of copying, and memory."""
    results = read("convert.json")["results"]
    speeds = {
        f"{result['bytes'] / 1e9:.1f} GB\n{result['cache']} cache": {
            way: [result["bytes"] / 1e6 / seconds for seconds in turns] for way, turns in result["seconds"].items()
        }
        for result in results
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 1))
    bars(left, speeds, "MB/s")
    left.set_title(f"Converting and copying ({FULL_GB:.0f} GB: minutes = {1000 * FULL_GB / 60:,.0f} ÷ MB/s)")
    memory: dict[str, dict[str, list[float]]] = {
        f"{result['bytes'] / 1e9:.1f} GB": {
            way: [peak / 1e6] for way, peak in result["peak_bytes_above_imports"].items()
        }
        for result in results
        if result["cache"] == "warm"
    }
    bars(right, memory, "MB above the imports, logarithmic")
    right.set_yscale("log")
    right.set_title("Peak memory")
    save(figure, "convert.svg")


def plot_load() -> None:
    """Seconds to load and run a first forward from a cold cache."""
    sizes = read("load.json")["sizes"]
    figure, axes = plt.subplots(figsize=(7, 3.4))
    bars(axes, {name: size["cold, each turn"] for name, size in sizes.items()}, "seconds, cold: load and first forward")
    axes.set_title("Loading, compared with stock transformers and reading the bytes")
    save(figure, "load.svg")


def plot_chat() -> None:
    """Prompts a second, as multiples of the reference's."""
    prompts = read("chat.json")["prompts"]
    groups = {}
    for workload, result in prompts.items():
        ways = result["ways"]
        # Medians of the turns' ratios, as in the tables: the speed of a machine that others use changes between turns.
        reference = ways["mistral-common"]["ours against it"]
        groups[workload] = {way: [reference / figures["ours against it"]] for way, figures in ways.items()}
    figure, axes = plt.subplots(figsize=(7, 3.4))
    bars(axes, groups, "conversations a second ÷ mistral-common's")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_title("Building prompts")
    save(figure, "chat.svg")


def plot_generate() -> None:
    """Decoding, compared with stock transformers and the bandwidth, and reading prompts."""
    results = read("generate.json")
    left, right = {}, {}
    for case in results["decode"]:
        ways, name = case["ways"], f"{case['batch']} × {case['context']}"
        left[f"decode\n{name}"] = as_fast_as_first(ways)
        if case["batch"] == 1:
            share = {
                way: [figures["read GB a step"] / case["bandwidth GB/s"] / seconds for seconds in figures["each turn"]]
                for way, figures in ways.items()
            }
            right[f"decode\n{name}"] = share
    for case in results["prefill"]:
        left[f"prompt\n{case['batch']} × {case['context']}"] = as_fast_as_first(case["ways"])
    figure, (ratios, shares) = plt.subplots(1, 2, figsize=(13, 3.8), width_ratios=(7, 3))
    bars(ratios, left, "times as fast as stock, bf16")
    ratios.axhline(1, color="black", linewidth=0.5)
    ratios.set_title(f"CPU, {results['layers']} layers, sequences × context")
    bars(shares, right, "bytes read a second ÷ measured bandwidth")
    shares.axhline(1, color="black", linewidth=0.5)
    shares.get_legend().remove()
    shares.set_title("Share of the bandwidth")
    save(figure, "generate.svg")


def plot_compare() -> None:
    """KL by format on the small model with real weights, and where in the depth of it the difference arises."""
    formats = read("compare-formats.json")["formats"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    names = [fill(name, 14) for name in formats]
    left.bar(names, [figures["kl_mean"] for figures in formats.values()], label="mean")
    left.plot(
        names, [figures["kl_p99"] for figures in formats.values()], "_", color="black", markersize=30, label="p99"
    )
    left.set_yscale("log")
    left.set_ylabel("KL divergence, nats, logarithmic")
    left.legend(frameon=False, fontsize=8)
    left.set_title("Predictions against fp32")
    for name, figures in formats.items():
        right.plot(range(1, len(figures["hidden_errors"]) + 1), figures["hidden_errors"], ".-", label=name)
    right.set_yscale("log")
    right.set_xlabel("after decoder layer")
    right.set_ylabel("relative error of hidden states")
    right.legend(frameon=False, fontsize=8)
    right.set_title("Where it arises")
    save(figure, "compare.svg")


def as_fast_as_first(ways: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of each way, the ratio to the first one in each turn."""
    first = next(iter(ways.values()))["each turn"]
    return {
        way: [theirs / mine for theirs, mine in zip(first, figures["each turn"], strict=True)]
        for way, figures in ways.items()
    }


def save(figure: Any, name: str, folder: Path = RESULTS) -> None:
    figure.tight_layout()
    figure.savefig(folder / name, metadata=METADATA)


def main() -> None:
    plot_convert()
    plot_load()
    plot_chat()
    plot_compare()
    # Not every machine can measure these.
    if (RESULTS / "generate.json").exists():
        plot_generate()


if __name__ == "__main__":
    main()

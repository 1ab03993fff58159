"""How long a start takes: our import against transformers' own Mistral, and `mistral-large --help`.

Each is a fresh interpreter, in turn, `--repeat` times; the medians and their ratio are printed.

    python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "stock": ["-c", "from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM"],
    "ours": ["-c", "import modeling_mistral_large"],
    "help": ["-m", "mistral_large_cli", "--help"],
    "usage error": ["-m", "mistral_large_cli", "convert", "--no-such-option"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeat):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    for name, median in medians.items():
        print(f"{name:12} {median:6.2f} s")
    print(f"ours / stock {medians['ours'] / medians['stock']:6.2f}")


if __name__ == "__main__":
    main()

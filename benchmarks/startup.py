"""How long a start takes: each command that needs no model, and our import against transformers' own Mistral.

Each is a fresh interpreter, in turn, `--repeat` times; the medians are printed, and which of torch and transformers was
imported. A first turn is not counted: it leaves the modules' bytecode, which an installation by pip has from the start.
`--before` is a checkout of another version to be measured with the same commands.

    python benchmarks/startup.py --before ../other-checkout --json benchmarks/results/startup.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mistral_large_cli.demo import assemble_demo_checkpoint

ROOT = Path(__file__).parents[1]
IMPORTS = {
    "stock": "from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM",
    "ours": "import modeling_mistral_large",
}
COMMANDS = (
    "--help",
    "show --help",
    "convert --no-such-option",
    "inspect {demo}",
    "inspect {none}",
    "verify {hf}",
    "verify {none}",
    "retag {hf} --as mistral_large",
    "convert {demo} {none} --dry-run",
    "convert {none} {none}",
    "plan --gpus 8x80GB",
    "plan {none} --gpus 80GB",
    "chat {none}",
    "serve {none}",
    "show {none}",
)
# Says at its end which of them was imported.
WATCHED = """\
import atexit, sys
atexit.register(lambda: print(*(name for name in ("torch", "transformers") if name in sys.modules), file=sys.stderr))
"""
COMMAND = f"{WATCHED}from mistral_large_cli import main\nmain()"


def measure(tree: Path, code: str, arguments: list[str]) -> tuple[float, list[str]]:
    """Return the wall time in seconds of one fresh interpreter, and what of torch and transformers it imported."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""},
    )
    return time.perf_counter() - start, (done.stderr.splitlines() or [""])[-1].split()


def measure_all(trees: dict[str, Path], places: dict[str, str], repeat: int) -> dict[str, Any]:
    """Return the median of each start in each tree, and the largest set of libraries that it imported."""
    starts: dict[str, tuple[str, list[str]]] = {name: (f"{WATCHED}{code}", []) for name, code in IMPORTS.items()}
    starts |= {typed: (COMMAND, [part.format(**places) for part in typed.split()]) for typed in COMMANDS}
    seconds: dict[tuple[str, str], list[float]] = {}
    imported: dict[tuple[str, str], list[str]] = {}
    for turn in range(1 + repeat):
        for typed, (code, arguments) in starts.items():
            for when, tree in trees.items():
                taken, imported[typed, when] = measure(tree, code, arguments)
                if turn:
                    seconds.setdefault((typed, when), []).append(taken)
    return {
        typed: {
            when: {"seconds": round(statistics.median(seconds[typed, when]), 3), "imports": imported[typed, when]}
            for when in trees
        }
        for typed in starts
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--before", type=Path, help="checkout of another version")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    trees = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    with TemporaryDirectory() as folder:
        places = {name: str(Path(folder, name)) for name in ("demo", "hf", "none")}
        assemble_demo_checkpoint(Path(places["demo"]))
        convert = ["convert", places["demo"], places["hf"]]
        subprocess.run([sys.executable, "-m", "mistral_large_cli", *convert], check=True, capture_output=True, cwd=ROOT)
        starts = measure_all(trees, places, options.repeat)
    for typed, measured in starts.items():
        figures = [f"{when} {each['seconds']:6.2f} s {' '.join(each['imports']):18}" for when, each in measured.items()]
        print(f"{typed:34} {'  '.join(figures)}".rstrip())
    print(f"ours / stock {starts['ours']['now']['seconds'] / starts['stock']['now']['seconds']:.2f}")
    if options.json:
        report = {"repeat": options.repeat, "processors": os.cpu_count(), "starts": starts}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Peak memory of calibrating one decoder layer of the 123 B on the CPU, from smaller layers of the same proportions.

    python -m benchmarks.calibration_memory --parts 12 8 6 --json benchmarks/results/calibration_memory.json

Each layer is 1/part as wide as the 123 B's, is calibrated on sequences of 2,048 tokens in a process of its own, and
the peak of that process is read. A base and what grows with the square of the width are fitted to the peaks, and the
peak at full width is extrapolated; the activations of one sequence, which grow with the width alone, make it an upper
bound. More sequences take no more memory: they are in a file, 2 bytes for each value.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 12288, 28672, 96, 8, 128
LENGTH = 2048
GROUP = 128
RUN = """
import re, sys, tempfile
from pathlib import Path
import torch
from benchmarks.calibration_memory import layer_of
from modeling_mistral_large.calibration.hidden_states import HiddenStates
calibrator, store = layer_of(int(sys.argv[1]))
class Journal:
    checksums = {}
    def record(self, name, checksum): pass
with tempfile.TemporaryDirectory() as folder:
    calibrator.quantize(store, Path(folder), Journal())
# ru_maxrss would be that of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def layer_of(part: int) -> tuple[Any, Any]:
    """A calibrator of one layer that is 1/part as wide, with two sequences, and a store of random weights."""
    import torch

    from mistral_large_conversion.checkpoint.calibration import Calibration
    from modeling_mistral_large import MistralLargeConfig
    from modeling_mistral_large.calibration.layers import LayerCalibrator

    def width(size: int) -> int:
        return -(-size // part // GROUP) * GROUP

    config = MistralLargeConfig(
        vocab_size=1024,
        hidden_size=width(HIDDEN),
        intermediate_size=width(INTERMEDIATE),
        num_hidden_layers=1,
        num_attention_heads=HEADS // part,
        num_key_value_heads=max(1, KV_HEADS // part),
        head_dim=HEAD_DIM,
    )
    sequences = [[token % 256 for token in range(LENGTH)]] * 2
    calibration = Calibration("none", "", 2, LENGTH, 2 * LENGTH, "", 0.01, "cpu", "float32")
    calibrator = LayerCalibrator(calibration, sequences, config, GROUP, torch.float32, torch.device("cpu"))
    sizes = {
        "embed_tokens": (1024, config.hidden_size),
        "q_proj": (config.num_attention_heads * HEAD_DIM, config.hidden_size),
        "k_proj": (config.num_key_value_heads * HEAD_DIM, config.hidden_size),
        "v_proj": (config.num_key_value_heads * HEAD_DIM, config.hidden_size),
        "o_proj": (config.hidden_size, config.num_attention_heads * HEAD_DIM),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }

    class Store:
        def read(self, name: str) -> Any:
            shape = next((shape for key, shape in sizes.items() if key in name), (config.hidden_size,))
            values = (torch.randn(shape) * 0.02).bfloat16()
            return values.view(torch.uint8).numpy().reshape(shape[0], -1), "BF16"

        def has(self, name: str) -> bool:
            return False

        def write(self, name: str, *outputs: Any) -> None:
            pass

    return calibrator, Store()


def main() -> None:
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[12, 8, 6])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    peaks = {}
    for part in arguments.parts:
        output = subprocess.run([sys.executable, "-c", RUN, str(part)], check=True, capture_output=True, text=True)
        peaks[part] = int(output.stdout.split()[-1]) * 1024
        print(f"1/{part} of the width: {peaks[part] / 1e9:.2f} GB", flush=True)
    areas = [1 / part**2 for part in peaks]
    slope, base = np.polyfit(areas, list(peaks.values()), 1)
    print(f"full width, extrapolated: {(slope + base) / 1e9:.1f} GB")
    figures = {
        "peak_bytes_by_part": peaks,
        "full_width_bytes_extrapolated": round(slope + base),
        "activations_on_disk_bytes_of_128_by_2048_tokens": 2 * 128 * LENGTH * HIDDEN * 2,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

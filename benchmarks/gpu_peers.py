"""gemlite's products next to ours: the same weights, the same rows of activations, in one run.

gemlite is not a dependency: without it, or without a GPU, there is nothing to compare and the reason is said.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from modeling_mistral_large.inference import gpu_kernels
from modeling_mistral_large.inference.gpu_kernels import Weights
from modeling_mistral_large.quantization.linear import unpack_words
from tests.support.gpu_products import placed, relative_error


def reason_to_skip(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "gemlite needs a GPU"
    if find_spec("gemlite") is None:
        return "gemlite is not installed; pip install --no-deps gemlite tqdm"
    return None


def gemlite_layer(weights: Weights) -> Callable[[Tensor], Tensor]:
    """A product [m, columns] -> [m, rows] in BF16 with a copy of one weight of ours, packed as gemlite wants it."""
    from gemlite.helper import A16W4_HQQ_INT, A16W8_FP8

    (weight,), (scales,) = weights.weights, weights.scales
    options = {"device": str(weight.device), "dtype": torch.bfloat16}
    if weights.kind == "int4":
        layer: Any = A16W4_HQQ_INT(**options).from_weights(unpack_words(weight), scales, torch.full_like(scales, 8.0))
    else:
        layer = A16W8_FP8(**options, fp8=weight.dtype).from_weights(weight.clone(), scales=scales.clone())
    return lambda x: layer(x)


def compare(bench: Any, weights: Weights, dense: Tensor, m: int) -> dict[str, Any]:
    """GB/s of both by graphs of 4 GB of weights, and their errors; activations are BF16 in both, ours also FP8."""
    x = torch.randn(m, weights.columns, device=dense.device).bfloat16()
    nbytes = sum(tensor.nbytes for tensor in (*weights.weights, *weights.scales))
    copies = 4 * 10**9 // nbytes + 1
    part = torch.empty(weights.splits(m) * m * weights.rows, device=dense.device)
    ours = [
        replace(weights, weights=(weights.weights[0].clone(),), scales=(weights.scales[0].clone(),))
        for _ in range(copies)
    ]
    inputs = placed(x, weights.group)
    codes, scales = gpu_kernels.rounded(x) if weights.takes_fp8 else (inputs, None)
    result: dict[str, Any] = {"rows": weights.rows, "columns": weights.columns, "batch": m}

    def all_ours() -> None:
        for each in ours:
            gpu_kernels.multiply(codes, each, part, scales)

    def rate(function: Callable[[], Any]) -> float:
        replay = bench.recorded(function)
        replay()
        return float(nbytes * copies / bench.seconds(replay, 3) / 1e9)

    result["ours GB/s"] = rate(all_ours)
    ours.clear()
    theirs = [gemlite_layer(weights) for _ in range(copies)]
    # The first call tries tiles, some minutes for all shapes.
    result["gemlite error"] = relative_error(theirs[0](x), x.double() @ dense.T)

    def all_theirs() -> None:
        for layer in theirs:
            layer(x)

    result["gemlite GB/s"] = rate(all_theirs)
    result["ours / gemlite"] = result["ours GB/s"] / result["gemlite GB/s"]
    return result


def gemlite(bench: Any, random_weights: Callable[..., tuple[Weights, Tensor]]) -> dict[str, Any]:
    """Both at batch 1 and 8, for weights of the output and of the gate."""
    if reason := reason_to_skip(bench.device):
        print(f"skipped: {reason}", flush=True)
        return {"skipped": reason}
    result: dict[str, Any] = {}
    for kind in ("int4", "fp8"):
        for rows, columns in ((12288, 12288), (28672, 12288)):
            weights, dense = random_weights(kind, (rows,), columns, bench.device.type)
            for m in (1, 8):
                name = f"{kind} {rows} x {columns}, batch {m}"
                result[name] = compare(bench, weights, dense, m)
                print(name, result[name], flush=True)
                bench.save("gemlite", result)
                bench.check(f"gemlite, {name}", 1e-2, partial(result[name].get, "gemlite error"))
                bench.free()
    return result

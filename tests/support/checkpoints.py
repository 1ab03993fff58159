"""Consolidated checkpoints with random weights, written without the package's help."""

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.names import expected_tensors

if TYPE_CHECKING:
    from modeling_mistral_large import MistralLargeConfig, MistralLargeTokenizer

VENDOR_NAMES = {
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def tokenizer_model_file(vocabulary: str = "v3") -> Path:
    """The vendor's own file of a vocabulary, as it ships in the wheel of mistral-common."""
    spec = find_spec("mistral_common")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "data", VENDOR_NAMES[vocabulary])


def vendor_tokenizer(folder: Path, vocabulary: str = "v3") -> "MistralLargeTokenizer":
    """Our tokenizer, from a folder that gets nothing but the vendor's own file."""
    from modeling_mistral_large import MistralLargeTokenizer

    (folder / f"tokenizer.model.{vocabulary}").write_bytes(tokenizer_model_file(vocabulary).read_bytes())
    return MistralLargeTokenizer.from_pretrained(folder)


def params_of(config: "MistralLargeConfig | Geometry") -> dict[str, Any]:
    """The params.json of a config whose rope is that of 2407."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": 1e6,
    }


def geometry_of(config: "MistralLargeConfig") -> Geometry:
    """The geometry of a config whose rope is that of 2407."""
    sizes = {field.name: getattr(config, field.name) for field in fields(Geometry) if field.name != "rope_theta"}
    return Geometry(**sizes, rope_theta=1e6)


def random_consolidated(
    config: "MistralLargeConfig | Geometry", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`params.json` as a dict and every tensor under its consolidated name."""
    params = params_of(config)
    hidden, query, key = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        "output.weight": (config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (query, hidden),
            f"layers.{layer}.attention.wk.weight": (key, hidden),
            f"layers.{layer}.attention.wv.weight": (key, hidden),
            f"layers.{layer}.attention.wo.weight": (hidden, query),
            f"layers.{layer}.feed_forward.w1.weight": (config.intermediate_size, hidden),
            f"layers.{layer}.feed_forward.w2.weight": (hidden, config.intermediate_size),
            f"layers.{layer}.feed_forward.w3.weight": (config.intermediate_size, hidden),
            f"layers.{layer}.attention_norm.weight": (hidden,),
            f"layers.{layer}.ffn_norm.weight": (hidden,),
        }
    return params, {name: (0.15 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}


def write_consolidated(
    folder: Path,
    config: "MistralLargeConfig | Geometry",
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write such a checkpoint with the real tokenizer file into a new folder and return what it holds."""
    params, weights = random_consolidated(config, dtype)
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    names = list(weights)
    for shard in range(shards):
        name = "consolidated.safetensors" if shards == 1 else f"consolidated-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({tensor: weights[tensor] for tensor in names[shard::shards]}, folder / name)
    return params, weights


def write_headers(folder: Path, geometry: Any, *, shards: int) -> None:
    """A consolidated checkpoint in bfloat16 whose weights have headers and their sizes, and no data on the disk."""
    (folder / "params.json").write_text(json.dumps(params_of(geometry)))
    for shard in range(shards):
        start, header = 0, {}
        for tensor in expected_tensors(geometry)[shard::shards]:
            end = start + 2 * math.prod(tensor.shape)
            header[tensor.consolidated] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
            start = end
        encoded = json.dumps(header).encode()
        path = folder / f"consolidated-{shard + 1:05}-of-{shards:05}.safetensors"
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
        os.truncate(path, path.stat().st_size + start)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything_in(folder: Path) -> dict[str, Any]:
    """Every name under a folder, with what tells one content from another without opening pipes."""

    def entries(path: Path) -> Iterator[tuple[str, Any]]:
        for name in sorted(os.listdir(path)):
            child = path / name
            state = child.lstat()
            if child.is_symlink():
                yield str(child), ("link", os.readlink(child))
            elif child.is_dir():
                yield str(child), "folder"
                yield from entries(child)
            elif child.is_file() and state.st_size < 10**7:
                yield str(child), (child.read_bytes(), state.st_mtime_ns)
            else:
                yield str(child), (state.st_mode, state.st_size, state.st_mtime_ns)

    return dict(entries(folder))

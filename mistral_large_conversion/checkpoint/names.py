"""Names and shapes of the tensors in the consolidated and in the HF layout."""

import re
from typing import NamedTuple

from mistral_large_conversion.checkpoint.geometry import ModelSizes

TO_HF = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{layer}.attention.wq.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.{layer}.attention.wk.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.{layer}.attention.wv.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.{layer}.attention.wo.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.{layer}.feed_forward.w1.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers.{layer}.feed_forward.w3.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "layers.{layer}.feed_forward.w2.weight": "model.layers.{layer}.mlp.down_proj.weight",
    "layers.{layer}.attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.{layer}.ffn_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# Rows and columns of each weight, as sizes of the geometry; `query_rows` and `key_rows` are heads * head_dim.
SHAPES = {
    "tok_embeddings.weight": ("vocab_size", "hidden_size"),
    "layers.{layer}.attention.wq.weight": ("query_rows", "hidden_size"),
    "layers.{layer}.attention.wk.weight": ("key_rows", "hidden_size"),
    "layers.{layer}.attention.wv.weight": ("key_rows", "hidden_size"),
    "layers.{layer}.attention.wo.weight": ("hidden_size", "query_rows"),
    "layers.{layer}.feed_forward.w1.weight": ("intermediate_size", "hidden_size"),
    "layers.{layer}.feed_forward.w3.weight": ("intermediate_size", "hidden_size"),
    "layers.{layer}.feed_forward.w2.weight": ("hidden_size", "intermediate_size"),
    "layers.{layer}.attention_norm.weight": ("hidden_size",),
    "layers.{layer}.ffn_norm.weight": ("hidden_size",),
    "norm.weight": ("hidden_size",),
    "output.weight": ("vocab_size", "hidden_size"),
}

# The rows of these are the rotary pairs of each head: interleaved in the consolidated layout, split in the HF layout.
ROPE_PAIRS = ("layers.{layer}.attention.wq.weight", "layers.{layer}.attention.wk.weight")

# Modules that torch.compile, DDP, FSDP and activation checkpointing put around others: parts of names in saved files.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Frequencies of rope that older versions of transformers saved: computed, not learned.
BUFFERS = re.compile(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def unwrapped_name(name: str) -> str:
    """The name of a tensor without the modules that training put around the model or a part of it."""
    return WRAPPERS.sub("", name)


def is_buffer(name: str) -> bool:
    """Whether a tensor of this HF name is computed from the config, so that no checkpoint needs it."""
    return BUFFERS.fullmatch(name) is not None


class ExpectedTensor(NamedTuple):
    """One tensor that a checkpoint of a given geometry must have."""

    consolidated: str
    hf: str
    shape: tuple[int, ...]
    has_rope_pairs: bool


def expected_tensors(geometry: ModelSizes, *, layers: int | None = None) -> list[ExpectedTensor]:
    """All tensors of a geometry and no others, in the order in which a forward pass needs them.

    layers: of the first few layers only, as all are alike; None for all layers.
    """
    sizes = {
        **{name: getattr(geometry, name) for name in ("vocab_size", "hidden_size", "intermediate_size")},
        "query_rows": geometry.num_attention_heads * geometry.head_dim,
        "key_rows": geometry.num_key_value_heads * geometry.head_dim,
    }

    def expand(pattern: str, layer: int | None = None) -> ExpectedTensor:
        return ExpectedTensor(
            consolidated=pattern.format(layer=layer),
            hf=TO_HF[pattern].format(layer=layer),
            shape=tuple(sizes[size] for size in SHAPES[pattern]),
            has_rope_pairs=pattern in ROPE_PAIRS,
        )

    of_layers = [pattern for pattern in TO_HF if "{layer}" in pattern]
    first, *others = (pattern for pattern in TO_HF if pattern not in of_layers)
    return [
        expand(first),
        *(
            expand(pattern, layer)
            for layer in range(geometry.num_hidden_layers if layers is None else layers)
            for pattern in of_layers
        ),
        *(expand(pattern) for pattern in others),
    ]

"""Whole-model evaluation without the whole model: decoder layers are read one at a time and applied to all sequences.

A forward pass needs one layer and the hidden states between layers, which go to disk where they are large. Results are
those of the whole model.
"""

from modeling_mistral_large.streamed.activations import Activations
from modeling_mistral_large.streamed.comparison import (
    Comparison,
    compare_checkpoints,
    compare_streams,
    open_pair,
)
from modeling_mistral_large.streamed.layer_stream import LayerStream, release
from modeling_mistral_large.streamed.token_sequences import TokenSequence, tokenize_samples

__all__ = [
    "Activations",
    "Comparison",
    "LayerStream",
    "TokenSequence",
    "compare_checkpoints",
    "compare_streams",
    "open_pair",
    "release",
    "tokenize_samples",
]

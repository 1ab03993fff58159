"""The sizes of a Mistral Large, as both layouts say them; a config of transformers says more than that."""

from dataclasses import dataclass, replace
from typing import Protocol


class ModelSizes(Protocol):
    """What the shapes of all tensors follow from: a `Geometry`, or a config of the library.

    `hidden_size`, `intermediate_size` and `head_dim` count features, `max_position_embeddings` counts tokens.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class Geometry:
    """The sizes and constants of a model, under the names of config.json; see `ModelSizes`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    # params.json may leave it out; this is the context length of 2407.
    max_position_embeddings: int = 131072


# Mistral-Large-Instruct-2407.
PUBLISHED = Geometry(
    vocab_size=32768,
    hidden_size=12288,
    intermediate_size=28672,
    num_hidden_layers=88,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
)
# Mistral-7B-Instruct-v0.3, the smallest of the vendor's models with the vocabulary of 2407.
PUBLISHED_7B = replace(
    PUBLISHED,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=32768,
)

"""Compile one decoder layer and reuse its graph for all layers, so compile time does not grow with depth."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from modeling_mistral_large.modeling_mistral_large import (
    MistralLargeDecoderLayer,
    MistralLargeModel,
    MistralLargePreTrainedModel,
)
from modeling_mistral_large.transformers_api.keywords import cache_argument, layer_forward


class _OneLayer:
    """The layer of a cache that a decoder layer sees, so that its index is not in the graph."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layer.update(key, value, *args, **kwargs)


def _forward(layer: MistralLargeDecoderLayer, hidden_states: Tensor, cached: Any, options: dict[str, Any]) -> Tensor:
    past = None if cached is None else _OneLayer(cached)
    return MistralLargeDecoderLayer.forward(layer, hidden_states, **cache_argument(past), **options)


def compile_layers_(model: MistralLargePreTrainedModel, **options: Any) -> None:
    """Let all decoder layers of a model decode by one compiled graph; `options` are those of torch.compile.

    Only steps of one token are compiled, anew for each batch size and each size of the cache; prompts are read as
    before, and everything around the layers stays unchanged. It needs a `StaticCache`, whose shape does not change;
    give `generate` `disable_compile=True` with it, or transformers compiles the model around the layers. The model must
    lie on one device, and nothing may be hooked to its layers.
    """
    compiled = torch.compile(_forward, **{"fullgraph": True, "dynamic": False, **options})
    decoder = model if isinstance(model, MistralLargeModel) else model.get_submodule("model")
    assert isinstance(decoder, MistralLargeModel)

    def forward_of(layer: MistralLargeDecoderLayer, number: int) -> Any:
        @layer_forward
        def forward(hidden_states: Tensor, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
            cached = None if past_key_values is None else past_key_values.layers[number]
            run = compiled if hidden_states.shape[1] == 1 else _forward
            return run(layer, hidden_states, cached, kwargs)

        return forward

    for number, layer in enumerate(decoder.layers):
        assert isinstance(layer, MistralLargeDecoderLayer)
        layer.forward = forward_of(layer, number)  # type: ignore[method-assign]  # as accelerate's hooks do

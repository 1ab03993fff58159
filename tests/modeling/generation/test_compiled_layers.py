"""Decoder layers that decode by one compiled graph."""

from typing import Any

import pytest
import torch

from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.generation.compiled_layers import compile_layers_
from tests.support.models import GREEDY, ours_only, random_ids


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_decode_by_one_graph_with_the_same_tokens(
    tiny_config: MistralLargeConfig, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    model, prompt = ours_only(tiny_config).to(dtype), random_ids(tiny_config, 1, 9)
    plain = model.generate(prompt, **options)
    steps: list[int] = []

    def counting_backend(graph: Any, _: Any) -> Any:
        steps.append(0)
        number = len(steps) - 1

        def run(*inputs: Any) -> Any:
            steps[number] += 1
            return graph.forward(*inputs)

        return run

    compile_layers_(model, backend=counting_backend)
    assert torch.equal(model.generate(prompt, **options), plain)
    # The prompt gives the first token.
    assert steps == [tiny_config.num_hidden_layers * (GREEDY["max_new_tokens"] - 1)]


@pytest.mark.slow
def test_a_decoder_without_a_head_and_without_a_cache_is_compiled_too(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config).model
    ids = random_ids(tiny_config, 2, 1)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        compile_layers_(model, backend="eager")
        assert torch.equal(model(ids).last_hidden_state, plain)

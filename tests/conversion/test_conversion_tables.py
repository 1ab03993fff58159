"""The pure parts of the converter: names, shapes, rotary pairs, params.json."""

import json
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import MistralForCausalLM

from mistral_large_conversion.checkpoint.geometry import PUBLISHED
from mistral_large_conversion.checkpoint.names import SHAPES, TO_HF, expected_tensors
from mistral_large_conversion.checkpoint.params import (
    TO_GEOMETRY,
    geometry_from_params,
    params_from_geometry,
    params_from_hf_config,
    params_problems,
)
from mistral_large_conversion.checkpoint.rope import join_rope_pairs, split_rope_pairs
from mistral_large_conversion.errors import CheckpointError
from modeling_mistral_large import MistralLargeConfig
from tests.support.checkpoints import geometry_of, random_consolidated
from tests.support.errors import raises_exactly
from tests.support.models import stock_config

PARAMS_2407 = {
    "dim": 12288,
    "n_layers": 88,
    "head_dim": 128,
    "hidden_dim": 28672,
    "n_heads": 96,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32768,
    "rope_theta": 1e6,
}


def test_the_inverse_table_loses_no_name() -> None:
    assert len(set(TO_HF.values())) == len(TO_HF) == len(SHAPES) == 12


@pytest.mark.slow
def test_expected_tensors_are_those_of_an_independent_list_and_of_stock_mistral(
    tiny_config: MistralLargeConfig,
) -> None:
    tensors = expected_tensors(tiny_config)
    _, weights = random_consolidated(tiny_config)
    assert {tensor.consolidated: tensor.shape for tensor in tensors} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    with torch.device("meta"):
        stock = MistralForCausalLM(stock_config(tiny_config))
    assert {tensor.hf: tensor.shape for tensor in tensors} == {
        name: tuple(weight.shape) for name, weight in stock.state_dict().items()
    }
    assert sorted(tensor.hf for tensor in tensors if tensor.has_rope_pairs) == sorted(
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(3) for name in "qk"
    )


def split_row_by_row(weight: Tensor, heads: int) -> Tensor:
    """The permutation as a plain loop: pair p of a head is rows 2p and 2p+1, and becomes rows p and p + half."""
    split = torch.empty_like(weight)
    head_dim = weight.shape[0] // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            first = head * head_dim
            split[first + pair] = weight[first + 2 * pair]
            split[first + head_dim // 2 + pair] = weight[first + 2 * pair + 1]
    return split


@pytest.mark.parametrize("heads", [6, 2, 1])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_rope_pairs_move_as_in_a_plain_loop_and_back(heads: int, dtype: torch.dtype) -> None:
    # Every bit pattern, NaNs included: values are compared as bytes.
    rows = torch.randint(0, 256, (heads * 32, 80 * dtype.itemsize), dtype=torch.uint8)
    weight = rows.view(dtype)
    expected = split_row_by_row(rows, heads)
    split = split_rope_pairs(weight, head_dim=32)
    assert split.dtype == dtype
    assert torch.equal(split.view(torch.uint8), expected)
    assert torch.equal(join_rope_pairs(split, head_dim=32).view(torch.uint8), rows)
    assert numpy.array_equal(split_rope_pairs(rows.numpy(), head_dim=32), expected.numpy())
    assert numpy.array_equal(join_rope_pairs(expected.numpy(), head_dim=32), rows.numpy())


@pytest.mark.parametrize(("rows", "head_dim"), [(48, 32), (30, 15)])
def test_rows_that_are_not_whole_heads_of_pairs_are_refused(rows: int, head_dim: int) -> None:
    with raises_exactly(
        ValueError, f"{rows} rows of rotary pairs: must be a multiple of head_dim {head_dim}, which must be even"
    ):
        split_rope_pairs(torch.zeros(rows, 4), head_dim=head_dim)


def test_params_of_2407_are_the_default_config_and_back() -> None:
    geometry = geometry_from_params(PARAMS_2407)
    assert geometry == PUBLISHED
    assert MistralLargeConfig.from_geometry(geometry).to_dict() == MistralLargeConfig().to_dict()
    assert params_from_geometry(geometry) == {**PARAMS_2407, "max_position_embeddings": 131072}
    assert geometry_from_params(params_from_geometry(geometry)) == geometry


def test_every_param_reaches_its_place_in_the_config(tiny_config: MistralLargeConfig) -> None:
    tiny_config.rope_parameters = {"rope_type": "default", "rope_theta": 12345.0}
    tiny_config.rms_norm_eps = 3e-6
    geometry = replace(geometry_of(tiny_config), rope_theta=12345.0)
    params = json.loads(json.dumps(params_from_geometry(geometry)))
    assert geometry_from_params(params) == geometry
    assert MistralLargeConfig.from_geometry(geometry).to_dict() == tiny_config.to_dict()


def test_keys_that_change_nothing_are_accepted() -> None:
    harmless = {"model_type": "transformer", "moe": None, "sliding_window": None, "tied_embeddings": False}
    assert geometry_from_params({**PARAMS_2407, **harmless, "max_batch_size": 4, "max_seq_len": 32768}) == PUBLISHED


WHOLE = "must be a whole number from 1 to 2147483647"
TAKE_THE_PUBLISHED = "no other architecture runs here; take the file that was published with the weights"
FINITE = "must be a finite number greater than 0"
RULES = {
    **dict.fromkeys(PARAMS_2407, WHOLE),
    "n_layers": "must be a whole number from 1 to 10000",
    "norm_eps": FINITE,
    "rope_theta": FINITE,
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *(({key: None}, f"{key} is None: {RULES[key]}") for key in PARAMS_2407),
        *(({key: 0}, f"{key} is 0: {RULES[key]}") for key in PARAMS_2407),
        *(({key: True}, f"{key} is True: {RULES[key]}") for key in PARAMS_2407),
        *(({key: "1"}, f"{key} is '1': {RULES[key]}") for key in PARAMS_2407),
        *(({key: float("nan")}, f"{key} is nan: {RULES[key]}") for key in PARAMS_2407),
        ({"dim": 12288.0}, f"dim is 12288.0: {WHOLE}"),
        ({"dim": -1}, f"dim is -1: {WHOLE}"),
        ({"n_layers": 10**9}, f"n_layers is 1000000000: {RULES['n_layers']}"),
        ({"hidden_dim": 10**30}, f"hidden_dim is 1000000000000000000000000000000: {WHOLE}"),
        ({"rope_theta": float("inf")}, f"rope_theta is inf: {FINITE}"),
        ({"norm_eps": -1e-5}, f"norm_eps is -1e-05: {FINITE}"),
        ({"max_position_embeddings": 0}, f"max_position_embeddings is 0: {WHOLE}"),
        ({"n_kv_heads": 7}, "n_heads 96 is not a multiple of n_kv_heads 7"),
        ({"head_dim": 127}, "head_dim 127 is odd: rope turns pairs"),
        ({"moe": {"num_experts": 8}}, "moe is {'num_experts': 8}: only None is this architecture"),
        ({"quantization": {}}, "quantization is {}: only None is this architecture"),
        ({"sliding_window": 4096}, "sliding_window is 4096: only None is this architecture"),
        ({"vision_encoder": {}}, "vision_encoder is {}: only None is this architecture"),
        ({"lora": {"rank": 8}}, "lora is {'rank': 8}: only None is this architecture"),
        ({"yarn": {}}, "yarn is {}: only None is this architecture"),
        ({"model_type": "mamba"}, "model_type is 'mamba': only 'transformer' is this architecture"),
        ({"tied_embeddings": True}, "tied_embeddings is True: only False is this architecture"),
        ({"use_biases": 0}, "use_biases is 0: only False is this architecture"),
        ({"q_lora_rank": 1536}, "'q_lora_rank' is unknown: it may change the architecture"),
    ],
)
def test_params_that_are_not_this_architecture_are_refused(change: dict[str, Any], problem: str) -> None:
    with raises_exactly(CheckpointError, f"params.json: not a Mistral Large geometry: {problem}; {TAKE_THE_PUBLISHED}"):
        geometry_from_params({**PARAMS_2407, **change})


@pytest.mark.parametrize("key", PARAMS_2407)
def test_every_param_must_be_there(key: str) -> None:
    assert params_problems({name: value for name, value in PARAMS_2407.items() if name != key}) == [f"{key} is missing"]


def test_keys_of_a_config_have_its_own_names() -> None:
    config = {"hidden_size": 12288, "num_attention_heads": 96, "num_key_value_heads": 7, "num_hidden_layers": 0}
    params, _ = params_from_hf_config(config)
    assert params_problems(params, names=TO_GEOMETRY) == [
        "num_hidden_layers is 0: must be a whole number from 1 to 10000",
        *(
            f"{name} is missing"
            for name in ("head_dim", "intermediate_size", "rms_norm_eps", "vocab_size", "rope_theta")
        ),
    ]
    whole = {**PARAMS_2407, "n_kv_heads": 7}
    assert params_problems(whole, names=TO_GEOMETRY) == [
        "num_attention_heads 96 is not a multiple of num_key_value_heads 7"
    ]


def test_all_problems_come_in_one_error() -> None:
    with raises_exactly(
        CheckpointError,
        f"params.json: not a Mistral Large geometry: dim is 0: {WHOLE}; head_dim is 'x': {WHOLE}; "
        f"moe is {{}}: only None is this architecture; {TAKE_THE_PUBLISHED}",
    ):
        geometry_from_params({**PARAMS_2407, "dim": 0, "head_dim": "x", "moe": {}})

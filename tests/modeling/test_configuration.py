"""The configuration: defaults, files, refusals."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from mistral_large_conversion.errors import CheckpointError, MistralLargeError
from modeling_mistral_large import (
    MODELS,
    MistralLargeConfig,
    MistralLargeForCausalLM,
    MistralLargeForSequenceClassification,
)
from modeling_mistral_large.errors import ConfigurationError
from tests.conftest import TINY
from tests.support.errors import raises_exactly

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
# Each is wrong whatever the other fields are, with what the error says of it.
NONE_OF_THIS = (
    "Mistral Large has none of this, only {} is possible; load such a checkpoint with transformers' own "
    "MistralForCausalLM"
)
SILU = "'silu'"
NO_SCALING = "only 'default' is possible; the model was trained on all of its context length and needs no scaling"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sliding_window": 4096}, f"sliding_window=4096: {NONE_OF_THIS.format(None)}"),
    ({"attention_chunk_size": 256}, f"attention_chunk_size=256: {NONE_OF_THIS.format(None)}"),
    ({"tie_word_embeddings": True}, f"tie_word_embeddings=True: {NONE_OF_THIS.format(False)}"),
    ({"attention_bias": True}, f"attention_bias=True: {NONE_OF_THIS.format(False)}"),
    ({"mlp_bias": True}, f"mlp_bias=True: {NONE_OF_THIS.format(False)}"),
    ({"partial_rotary_factor": 0.5}, f"partial_rotary_factor=0.5: {NONE_OF_THIS.format(1.0)}"),
    (
        {"per_layer_config": {"0": {"head_dim": 64}}},
        f"per_layer_config={{'0': {{'head_dim': 64}}}}: {NONE_OF_THIS.format(None)}",
    ),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types=['full_attention', 'sliding_attention']: every layer of Mistral Large has full attention; leave "
        "layer_types out",
    ),
    ({"hidden_act": "gelu"}, f"hidden_act='gelu': {NONE_OF_THIS.format(SILU)}"),
    ({"vocab_size": 0}, "vocab_size=0: must be greater than 0 and finite"),
    ({"hidden_size": -1}, "hidden_size=-1: must be greater than 0 and finite"),
    ({"intermediate_size": 0}, "intermediate_size=0: must be greater than 0 and finite"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be greater than 0 and finite"),
    ({"num_attention_heads": 0}, "num_attention_heads=0: must be greater than 0 and finite"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0: must be greater than 0 and finite"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0: must be greater than 0 and finite"),
    ({"head_dim": 0}, "head_dim=0: must be greater than 0 and finite"),
    ({"head_dim": 33}, "head_dim=33: must be even, because rope turns pairs"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be greater than 0 and finite"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf: must be greater than 0 and finite"),
    ({"rope_parameters": YARN}, f"rope_type='yarn': {NO_SCALING}"),
    ({"rope_parameters": {"type": "linear", "rope_theta": 1e6, "factor": 4.0}}, f"type='linear': {NO_SCALING}"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
        "rope_theta=0.0: must be greater than 0 and finite",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}},
        "rope_theta='1e6': must be greater than 0 and finite",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}},
        "rope_parameters['factor']=4.0: has no effect on the default rope; leave it out",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        "rope_parameters['partial_rotary_factor']=0.5: has no effect on the default rope; leave it out",
    ),
    ({"rope_scaling": YARN}, f"rope_type='yarn': {NO_SCALING}"),
    ({"rope_theta": -1.0}, "rope_theta=-1.0: must be greater than 0 and finite"),
]
UNEVEN = (
    {"num_key_value_heads": 4},
    "num_attention_heads=6: must be a multiple of num_key_value_heads=4, because each key head serves a whole group",
)


def name_of(value: Any) -> str:
    return str(value) if isinstance(value, dict) else ""


def test_config_round_trip_and_old_keys(tmp_path: Path) -> None:
    older_keys: dict[str, Any] = {"rope_theta": 5e5, "torch_dtype": "bfloat16"}
    config = MistralLargeConfig(head_dim=64, **older_keys)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert config.dtype is torch.bfloat16
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 1e6),
        ({"rope_parameters": {"rope_type": "default"}}, 1e6),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"type": "default", "rope_theta": 5e5}}, 5e5),
    ],
    ids=name_of,
)
def test_the_theta_of_older_files_is_kept(keys: dict[str, Any], theta: float) -> None:
    given = copy.deepcopy(keys)
    config = MistralLargeConfig(**keys)
    assert config.rope_parameters is not None
    assert config.rope_parameters["rope_theta"] == theta
    assert keys == given


def test_two_thetas_are_refused() -> None:
    with raises_exactly(
        ConfigurationError,
        "MistralLargeConfig rope_theta: is 500000.0 and 1000000.0; say it once, in rope_parameters",
    ):
        MistralLargeConfig(rope_theta=5e5, rope_parameters={"rope_theta": 1e6})  # type: ignore[call-arg]  # an old key


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_a_geometry_has_not_the_default_one(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}: neither params.json nor config.json has a geometry; pass the folder of a checkpoint, or make a "
        "MistralLargeConfig()",
    ):
        MistralLargeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("wrong", "problem"), [*WRONG, UNEVEN], ids=name_of)
def test_config_refuses_what_the_architecture_is_not(
    wrong: dict[str, Any], problem: str, tiny_config: MistralLargeConfig, tmp_path: Path
) -> None:
    fields = {**tiny_config.to_dict(), **wrong}
    if "rope_theta" in wrong or "rope_scaling" in wrong:
        del fields["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for refuse in (
        lambda: MistralLargeConfig(**fields),
        lambda: MistralLargeConfig.from_dict(fields),
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: AutoConfig.for_model(**fields),
    ):
        with raises_exactly(ConfigurationError, f"MistralLargeConfig {problem}"):
            refuse()
    assert issubclass(ConfigurationError, (MistralLargeError, ValueError))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    MistralLargeForCausalLM(MistralLargeConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [*WRONG[:3], *(pytest.param(*each, marks=pytest.mark.slow) for each in WRONG[3:]), UNEVEN],
    ids=name_of,
)
def test_an_override_is_refused_as_the_file_is(
    wrong: dict[str, Any], problem: str, tiny_config: MistralLargeConfig, saved: Path
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: MistralLargeConfig.from_dict(tiny_config.to_dict(), **wrong),
        lambda: MistralLargeConfig.from_pretrained(saved, **wrong),
        lambda: AutoConfig.from_pretrained(saved, **wrong),
        lambda: MistralLargeForCausalLM.from_pretrained(saved, **wrong),
        lambda: MistralLargeForSequenceClassification.from_pretrained(saved, **wrong),
        lambda: AutoModelForCausalLM.from_pretrained(saved, **wrong),
    ]
    for refuse in calls:
        with raises_exactly(ConfigurationError, f"MistralLargeConfig {problem}"):
            refuse()


def test_overrides_that_say_what_is_so_are_taken(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    MistralLargeForCausalLM(tiny_config).save_pretrained(tmp_path)
    same = {"sliding_window": None, "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **same)
    assert model.config.to_diff_dict() == AutoConfig.from_pretrained(tmp_path).to_diff_dict()
    for changed in (
        AutoConfig.from_pretrained(tmp_path, rope_theta=5e5),
        AutoConfig.from_pretrained(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ):
        assert changed.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    heads = AutoConfig.from_pretrained(tmp_path, num_attention_heads=9, num_key_value_heads=3)
    assert (heads.num_attention_heads, heads.num_key_value_heads) == (9, 3)


@pytest.mark.parametrize(("wrong", "problem"), WRONG, ids=name_of)
def test_an_assignment_is_refused(wrong: dict[str, Any], problem: str, tiny_config: MistralLargeConfig) -> None:
    before = tiny_config.to_dict()
    ((name, value),) = wrong.items()
    for assign in (lambda: setattr(tiny_config, name, value), lambda: tiny_config.update(wrong)):
        with pytest.raises((ConfigurationError, StrictDataclassFieldValidationError)) as error:
            assign()
        # Some versions say before it which field it is of.
        assert str(error.value).endswith(f"MistralLargeConfig {problem}")
    assert tiny_config.to_dict() == before


def test_an_older_name_of_the_theta_changes_it(tiny_config: MistralLargeConfig) -> None:
    tiny_config.rope_theta = 5e5
    assert tiny_config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    expected = MistralLargeConfig(**{**tiny_config.to_dict(), "rope_parameters": {"rope_theta": 5e5}})
    found = MistralLargeForCausalLM(tiny_config).model.rotary_emb.inv_freq
    assert torch.equal(found, MistralLargeForCausalLM(expected).model.rotary_emb.inv_freq)


def spoil_heads(config: MistralLargeConfig) -> None:
    config.num_key_value_heads = 4


def spoil_rope_type(config: MistralLargeConfig) -> None:
    assert config.rope_parameters is not None
    config.rope_parameters.update(YARN)


def spoil_theta(config: MistralLargeConfig) -> None:
    assert config.rope_parameters is not None
    del config.rope_parameters["rope_theta"]


def spoil_rope(config: MistralLargeConfig) -> None:
    config.rope_parameters = None


def spoil_field(config: MistralLargeConfig) -> None:
    # As pickles and copies bring fields, without an assignment.
    config.__dict__["sliding_window"] = 4096


@pytest.mark.parametrize("spoil", [spoil_heads, spoil_rope_type, spoil_theta, spoil_rope, spoil_field])
@pytest.mark.parametrize("duplicate", [None, copy.copy, copy.deepcopy])
def test_nothing_is_made_or_saved_of_a_config_that_was_spoiled(
    spoil: Callable[[Any], None],
    duplicate: Callable[[Any], Any] | None,
    tiny_config: MistralLargeConfig,
    tmp_path: Path,
) -> None:
    model = MistralLargeForCausalLM(copy.deepcopy(tiny_config))
    config = tiny_config
    spoil(config)
    spoil(model.config)
    if duplicate is not None:
        config = duplicate(config)
    repr(config)
    for refuse in (
        lambda: config.save_pretrained(tmp_path / "new"),
        lambda: config.to_json_file(tmp_path / "config.json"),
        lambda: model.save_pretrained(tmp_path / "new"),
        lambda: model.config.save_pretrained(tmp_path / "new"),
        *(lambda made=made: made(config) for made in MODELS.values()),
        *(lambda auto=auto: auto.from_config(config) for auto in MODELS),
    ):
        with pytest.raises(ConfigurationError):
            refuse()
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_class_makes_no_model() -> None:
    config: Any = MistralConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    with raises_exactly(
        ConfigurationError,
        "MistralConfig: a Mistral Large model is made of a MistralLargeConfig, because another one may ask for what "
        "it does not have; pass a MistralLargeConfig",
    ):
        MistralLargeForCausalLM(config)


def test_fields_that_go_together_are_changed_one_by_one(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    tiny_config.num_attention_heads = 9
    tiny_config.num_key_value_heads = 3
    tiny_config.num_hidden_layers = 2
    MistralLargeForCausalLM(tiny_config).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_key_value_heads == 3


def test_config_refuses_a_wrong_type() -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="head_dim"):
        MistralLargeConfig(head_dim="128")  # type: ignore[arg-type]  # that is the test

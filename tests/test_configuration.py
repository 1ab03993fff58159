"""The configuration: defaults, files, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.errors import CheckpointError


def test_config_round_trip_and_old_keys(tmp_path: Path) -> None:
    older_keys: dict[str, Any] = {"rope_theta": 5e5, "torch_dtype": "bfloat16"}
    config = MistralLargeConfig(head_dim=64, **older_keys)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert config.dtype is torch.bfloat16
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_a_geometry_has_not_the_default_one(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"neither params\.json nor config\.json has a geometry"):
        MistralLargeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 0}, "head_dim=0: must be greater than 0"),
        ({"head_dim": 33}, "head_dim=33: must be even"),
        ({"num_key_value_heads": 7}, "num_attention_heads=96: must be a multiple of num_key_value_heads=7"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be greater than 0"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type='yarn'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_config_refuses_what_the_architecture_is_not(wrong: dict[str, Any], finding: str) -> None:
    with pytest.raises(ValueError, match="MistralLargeConfig") as error:
        MistralLargeConfig(**wrong)
    assert finding in str(error.value)


def test_config_refuses_a_wrong_type() -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="head_dim"):
        MistralLargeConfig(head_dim="128")  # type: ignore[arg-type]  # that is the test

"""Configuration of Mistral Large; every default is the value of Mistral-Large-Instruct-2407."""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from mistral_large_conversion.checkpoint.auto_classes import is_another_model, is_named_mistral_large
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.hub import HUB_OPTIONS, find_consolidated, reachable_options, refuse_adapter
from mistral_large_conversion.checkpoint.params import ABSENT, read_params_file
from mistral_large_conversion.errors import CheckpointError
from modeling_mistral_large.errors import ConfigurationError
from modeling_mistral_large.peft_defaults import add_peft_defaults
from modeling_mistral_large.remote_code import ConfigWithRemoteCode
from modeling_mistral_large.stock_config import STOCK_TYPE, is_mistral_large, own_fields

ROPE_THETA = 1e6

# Options of `from_pretrained` that say where the files are, of the model as of the tokenizer.
OPTIONS_OF_BOTH = (*HUB_OPTIONS, "force_download", "proxies", "subfolder")
# Those that say how to come by the file: they are none of the config's own.
OPTIONS_OF_FILES = (*OPTIONS_OF_BOTH, "_from_auto", "_from_pipeline", "trust_remote_code")
# transformers leaves overrides of what is no field to the model, whose error does not say what is wrong.
OVERRIDES_WITHOUT_A_FIELD = (
    *(ABSENT.keys() - {"hidden_act", "tie_word_embeddings"}),
    "layer_types",
    "rope_scaling",
    "rope_theta",
)
POSITIVE = tuple(field.name for field in fields(Geometry) if field.name != "rope_theta")
# What `rope_parameters` may say; `type` is the older name of `rope_type`.
ROPE_TYPE_NAMES = ("rope_type", "type")


def field_problem(name: str, value: Any) -> str | None:
    """What keeps one field from describing Mistral Large, whatever the others say; None if nothing does."""
    if name in ABSENT:
        # None in a file says the same as leaving the key out.
        if value is None or value == ABSENT[name]:
            return None
        return (
            f"{name}={value!r}: Mistral Large has none of this, only {ABSENT[name]!r} is possible; load such a "
            "checkpoint with transformers' own MistralForCausalLM"
        )
    if name == "layer_types" and any(layer_type != "full_attention" for layer_type in value or ()):
        return f"{name}={value!r}: every layer of Mistral Large has full attention; leave {name} out"
    if name == "rope_parameters" and value is not None:
        return _rope_problem(value)
    if name in POSITIVE and not _is_positive(value):
        return f"{name}={value!r}: must be greater than 0 and finite"
    if name == "head_dim" and value % 2:
        return f"{name}={value}: must be even, because rope turns pairs"
    return None


def _rope_problem(parameters: Any) -> str | None:
    if not isinstance(parameters, dict):
        return f"rope_parameters={parameters!r}: must be a dict with rope_type and rope_theta"
    for name in ROPE_TYPE_NAMES:
        if parameters.get(name) not in (None, "default"):
            return (
                f"{name}={parameters[name]!r}: only 'default' is possible; the model was trained on all of its context "
                "length and needs no scaling"
            )
    if parameters.get("rope_theta") is not None and not _is_positive(parameters["rope_theta"]):
        return f"rope_theta={parameters['rope_theta']!r}: must be greater than 0 and finite"
    for name, value in parameters.items():
        is_known = name == "rope_theta" or name in ROPE_TYPE_NAMES
        if not is_known and not (name == "partial_rotary_factor" and value == ABSENT[name]):
            return f"rope_parameters[{name!r}]={value!r}: has no effect on the default rope; leave it out"
    return None


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A whole number may be too large for a float.
    return is_number and value > 0 and (isinstance(value, int) or math.isfinite(value))


@strict
class MistralLargeConfig(ConfigWithRemoteCode):
    """Geometry of a Mistral Large model.

    `hidden_size`, `intermediate_size` and `head_dim` count features, `max_position_embeddings` counts tokens.
    `head_dim` is given and never derived: `num_attention_heads * head_dim` need not be `hidden_size`.

    A field that no other can make right is refused when it is assigned. Fields that depend on one another may be
    assigned one after the other: they are checked when a model is made, and when anything is saved.

    Raises:
        ConfigurationError: a size that is not positive, query heads that the key-value heads do not divide, an odd
            `head_dim`, another rope than the default one, or a feature that the architecture does not have.
        StrictDataclassFieldValidationError: a value of another type, from huggingface_hub.
    """

    model_type = "mistral_large"
    # transformers 5.24 renamed it in the outputs.
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # For `rope_parameters` that do not say it.
    default_theta = ROPE_THETA
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32768
    hidden_size: int = 12288
    intermediate_size: int = 28672
    num_hidden_layers: int = 88
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    # [control_382], a control piece that never got a meaning: see MistralLargeTokenizer.
    pad_token_id: int | None = 384
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the keys of older config files (`rope_theta`, `torch_dtype`, …) and check what was asked for."""
        self.rope_parameters = self._merged_rope_parameters(kwargs)
        for name in ABSENT.keys() - self.__dataclass_fields__.keys():
            _refuse(field_problem(name, kwargs.pop(name, None)))
        # Of its own: quantizers of transformers add to the plan of a config, which would be that of all of them.
        vars(self)["base_model_tp_plan"] = dict(type(self).base_model_tp_plan)
        super().__post_init__(**kwargs)
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        # Older names of what is in `rope_parameters`: as attributes of their own they would change nothing.
        if name in ("rope_theta", "rope_scaling"):
            changed = {"rope_theta": value} if name == "rope_theta" else value
            name, value = "rope_parameters", {**(self.rope_parameters or {}), **(changed or {})}
        _refuse(field_problem(name, value))
        super().__setattr__(name, value)

    def _merged_rope_parameters(self, older: dict[str, Any]) -> dict[str, Any]:
        """`rope_parameters` with what older files say elsewhere, which is taken out of `older`."""
        scaling = older.pop("rope_scaling", None) or {}
        _refuse(field_problem("rope_parameters", scaling))
        merged: dict[str, Any] = {}
        for parameters in ({"rope_theta": older.pop("rope_theta", None)}, scaling, self.rope_parameters or {}):
            for name, value in parameters.items():
                if value is not None and merged.setdefault(name, value) != value:
                    raise ConfigurationError(
                        f"MistralLargeConfig {name}: is {merged[name]!r} and {value!r}; say it once, in rope_parameters"
                    )
        return {"rope_type": "default", "rope_theta": ROPE_THETA} | merged

    def check(self) -> None:
        """Check all fields, those that were assigned after construction included.

        Raises:
            ConfigurationError: no Mistral Large model has such a configuration.
        """
        for problem in self._problems():
            _refuse(problem)

    def _problems(self) -> Iterator[str | None]:
        for name in (*POSITIVE, *ABSENT, "layer_types", "rope_parameters"):
            # What transformers computes from the fields is none of them.
            if name in self.__dict__:
                yield field_problem(name, self.__dict__[name])
        if self.rope_parameters is None or self.rope_parameters.get("rope_theta") is None:
            yield f"rope_parameters={self.rope_parameters!r}: must have a rope_theta, such as {ROPE_THETA:.0f}"
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}, because each key head serves a whole group"
            )

    @classmethod
    def from_geometry(cls, geometry: Geometry) -> "MistralLargeConfig":
        """The config of a model with these sizes and constants; everything else is as in 2407."""
        sizes = asdict(geometry)
        rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
        return cls(**sizes, rope_parameters=rope)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the content of a file; what `kwargs` say of it has precedence.

        Raises:
            ConfigurationError: no Mistral Large model has such a configuration.
        """
        overrides = {name: kwargs.pop(name) for name in OVERRIDES_WITHOUT_A_FIELD if name in kwargs}
        found: Any = super().from_dict(config_dict, **kwargs)
        config = found[0] if kwargs.get("return_unused_kwargs") else found
        for name, value in overrides.items():
            _refuse(field_problem(name, value))
            if name.startswith("rope_"):
                setattr(config, name, value)
        config.check()
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json.

        Raises:
            ConfigurationError: fields were assigned that could not be loaded; nothing was written.
        """
        self.check()
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the fields to a file.

        Raises:
            ConfigurationError: fields were assigned that could not be loaded; nothing was written.
        """
        self.check()
        super().to_json_file(json_file_path, use_diff)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json or, of a checkpoint in the consolidated layout, params.json; and what `kwargs` remain.

        A config.json of type `mistral` is read as what it says of a Mistral Large.

        Raises:
            CheckpointError: no config.json, one of type `mistral` that leaves sizes out, or a params.json that is not
                a Mistral Large geometry.
        """
        kwargs = reachable_options(pretrained_model_name_or_path, kwargs)
        found = read_consolidated(pretrained_model_name_or_path, kwargs)
        if found is not None:
            return found, {name: value for name, value in kwargs.items() if name not in OPTIONS_OF_FILES}
        found, remaining = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not found.keys() - {"_commit_hash"}:
            refuse_adapter(Path(pretrained_model_name_or_path))
            # The defaults would be taken for the geometry of that checkpoint.
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: neither params.json nor config.json has a geometry; pass the "
                "folder of a checkpoint, or make a MistralLargeConfig()"
            )
        if found.get("model_type") == STOCK_TYPE:
            found = own_fields(found, pretrained_model_name_or_path)
        return found, remaining

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the model type."""
        # PEFT asks a model for this before it looks up its defaults, and may have been imported after us.
        add_peft_defaults()
        found: dict[str, Any] = super().to_dict()
        return found


def read_consolidated(source: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """The fields that params.json says, or None where `source` is no checkpoint in the consolidated layout.

    Raises:
        CheckpointError: a params.json that is not a Mistral Large geometry.
    """
    folder = find_consolidated(source, options)
    if folder is None:
        return None
    # As every config.json says it: pipelines and TRL look for the class of this name.
    config = MistralLargeConfig.from_geometry(read_params_file(folder))
    return {**config.to_dict(), "architectures": ["MistralLargeForCausalLM"]}


def read_for_auto_classes(found: dict[str, Any], source: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """What the Auto classes take for the config of `source`, whose config.json says `found`; None: just that.

    Of a config.json of type `mistral` they take our config where the geometry is one of ours and the name of the
    repository or the folder says Mistral Large, or a folder holds both layouts in sizes of no other model of the
    vendor, which publishes Mistral-7B, Nemo and Codestral in both layouts as well. All others stay transformers' own.

    Raises:
        CheckpointError: a params.json that is not a Mistral Large geometry.
    """
    if not found.keys() - {"_commit_hash"}:
        return read_consolidated(source, options)
    if found.get("model_type") != STOCK_TYPE or not is_mistral_large(found):
        return None
    if is_named_mistral_large(source):
        return read_consolidated(source, options) or own_fields(found, source)
    return read_consolidated(source, options) if Path(source).is_dir() and not is_another_model(found) else None


def check_config(config: Any) -> None:
    """Check the config that a model is made of or saved with.

    Raises:
        ConfigurationError: one of another class, or with fields that no Mistral Large model has.
    """
    if not isinstance(config, MistralLargeConfig):
        raise ConfigurationError(
            f"{type(config).__name__}: a Mistral Large model is made of a MistralLargeConfig, because another one may "
            "ask for what it does not have; pass a MistralLargeConfig"
        )
    config.check()


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise ConfigurationError(f"MistralLargeConfig {problem}")


__all__ = ["MistralLargeConfig"]

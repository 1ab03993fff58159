"""Configuration of Mistral Large; every default is the value of Mistral-Large-Instruct-2407."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ROPE_THETA = 1e6
# Positions of a prompt that `generate` reads at once.
PREFILL_CHUNK = 2048

# What 2407 does not have, and the one value that says so: another value would need a different model.
ABSENT = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
# Options of `from_pretrained` that say how to come by the file: they are none of the config's own.
OPTIONS_OF_FILES = (
    "_from_auto",
    "_from_pipeline",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
)


@strict
class MistralLargeConfig(PreTrainedConfig):
    """Geometry of a Mistral Large model.

    `hidden_size`, `intermediate_size` and `head_dim` count features, `max_position_embeddings` counts tokens.
    `head_dim` is given and never derived: `num_attention_heads * head_dim` need not be `hidden_size`.

    Raises:
        ValueError: a size that is not positive, query heads that the key-value heads do not divide, an odd
            `head_dim`, another rope than the default one, or a feature that the architecture does not have.
        StrictDataclassFieldValidationError: a value of another type, from huggingface_hub.
    """

    model_type = "mistral_large"
    # transformers 5.24 renamed it in the outputs.
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
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
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": kwargs.pop("rope_theta", ROPE_THETA)}
        for name, value in ABSENT.items():
            # None in a file says the same as leaving the key out.
            found = kwargs.pop(name, None) if name not in self.__dataclass_fields__ else getattr(self, name)
            if found is not None and found != value:
                raise ValueError(
                    f"MistralLargeConfig {name}={found!r}: Mistral Large has none of this, only {value!r} is possible; "
                    "load such a checkpoint with transformers' own MistralForCausalLM"
                )
        super().__post_init__(**kwargs)
        self._check_geometry(self.rope_parameters)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json or, of a checkpoint in the consolidated layout, params.json; and what `kwargs` remain.

        Raises:
            CheckpointError: no config.json, or a params.json that is not a Mistral Large geometry.
        """
        # Imported here, because importing the package loads no more than stock Mistral does.
        from .consolidated_loading import find_consolidated, read_config
        from .errors import CheckpointError

        folder = find_consolidated(pretrained_model_name_or_path, kwargs)
        if folder is None:
            found, remaining = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not found.keys() - {"_commit_hash"}:
                # The defaults would be taken for the geometry of that checkpoint.
                raise CheckpointError(
                    f"{pretrained_model_name_or_path}: neither params.json nor config.json has a geometry; pass the "
                    "folder of a checkpoint, or make a MistralLargeConfig()"
                )
            return found, remaining
        remaining = {name: value for name, value in kwargs.items() if name not in OPTIONS_OF_FILES}
        return read_config(folder).to_dict(), remaining

    def _check_geometry(self, rope_parameters: dict[str, Any]) -> None:
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"MistralLargeConfig {name}={getattr(self, name)!r}: must be greater than 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"MistralLargeConfig num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}, because each key head serves a whole group"
            )
        if self.head_dim % 2:
            raise ValueError(f"MistralLargeConfig head_dim={self.head_dim}: must be even, because rope turns pairs")
        rope_type = rope_parameters["rope_type"]
        if rope_type != "default":
            raise ValueError(
                f"MistralLargeConfig rope_type={rope_type!r}: only 'default' is possible; the model was trained on all "
                f"{self.max_position_embeddings} positions and needs no scaling"
            )


__all__ = ["MistralLargeConfig"]

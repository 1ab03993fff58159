"""A config.json of type `mistral`, transformers' own: what it says of a Mistral Large, and whether it is one's.

The vendor's repository, fine-tunes and merges carry this type.
"""

from collections.abc import Mapping
from typing import Any

from mistral_large_conversion.checkpoint.params import TO_GEOMETRY, params_from_hf_config, params_problems
from mistral_large_conversion.errors import CheckpointError

STOCK_TYPE, OWN_TYPE = "mistral", "mistral_large"
STOCK_PREFIX, OWN_PREFIX = "Mistral", "MistralLarge"
HEADS = ("ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification", "Model")
# What a file may leave out, and our config has a value for that stock has as well.
MAY_BE_ABSENT = ("max_position_embeddings",)


def own_fields(found: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return the fields of our config that a config.json of type `mistral` says.

    Files of 2024 have no `head_dim`, which is then hidden_size / num_attention_heads for every reader.

    Raises:
        CheckpointError: a file that leaves out what stock Mistral and Mistral Large take different values for.
    """
    fields = with_head_dim(found)
    absent = [name for name in TO_GEOMETRY.values() if name not in MAY_BE_ABSENT and fields.get(name) is None]
    ropes = (fields, fields.get("rope_parameters"), fields.get("rope_scaling"))
    if not any(isinstance(rope, Mapping) and rope.get("rope_theta") is not None for rope in ropes):
        absent.append("rope_theta")
    if absent:
        raise CheckpointError(
            f"{source}: config.json of type {STOCK_TYPE!r} has no {', '.join(absent)}; a geometry is given whole, "
            "since stock Mistral's defaults are those of another model; add what the weights have"
        )
    architectures = [_own_architecture(name) for name in fields.get("architectures") or ()]
    return {**fields, "model_type": OWN_TYPE, "architectures": architectures or [f"{OWN_PREFIX}ForCausalLM"]}


def with_head_dim(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json with the `head_dim` that a file without one stands for."""
    fields = dict(found)
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if fields.get("head_dim") is None and type(width) is int and type(heads) is int and heads > 0:
        fields["head_dim"] = width // heads
    return fields


def is_mistral_large(found: Mapping[str, Any]) -> bool:
    """Whether a config.json of type `mistral` has an architecture and a geometry of ours, whatever its sizes."""
    fields = {name: value for name, value in with_head_dim(found).items() if name != "quantization_config"}
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list) or any(_own_architecture(name) == name for name in architectures):
        return False
    params, problems = params_from_hf_config(fields)
    return not problems and not params_problems(params)


def _own_architecture(name: Any) -> Any:
    """Return the name of our class for that of a stock one, or the name itself where there is none."""
    head = name.removeprefix(STOCK_PREFIX) if isinstance(name, str) else name
    return f"{OWN_PREFIX}{head}" if head in HEADS and head != name else name

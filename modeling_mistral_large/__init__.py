"""Mistral-Large-Instruct-2407 for Hugging Face transformers.

Importing this package registers `MistralLargeConfig`, the models and `MistralLargeTokenizer` with transformers' Auto
classes, with the module `transformers` and with PEFT's defaults; it does nothing else. The converter is
`mistral_large_conversion`.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto

from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig, read_for_auto_classes
from modeling_mistral_large.modeling_mistral_large import (
    MistralLargeForCausalLM,
    MistralLargeForQuestionAnswering,
    MistralLargeForSequenceClassification,
    MistralLargeForTokenClassification,
    MistralLargeModel,
    MistralLargePreTrainedModel,
)
from modeling_mistral_large.moved_modules import find_moved_modules
from modeling_mistral_large.peft_defaults import add_peft_defaults
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.transformers_api.registration import (
    export_names,
    prefer_tokenizer,
    read_config_dict_with,
    register_pipeline,
    warn_outside_range,
)

if TYPE_CHECKING:
    from modeling_mistral_large.any_folder import load, pipeline

__version__ = "0.1.0"

__all__ = [
    "MistralLargeConfig",
    "MistralLargeForCausalLM",
    "MistralLargeForQuestionAnswering",
    "MistralLargeForSequenceClassification",
    "MistralLargeForTokenClassification",
    "MistralLargeModel",
    "MistralLargePreTrainedModel",
    "MistralLargeTokenizer",
    "load",
    "pipeline",
]

MODELS = {
    AutoModel: MistralLargeModel,
    AutoModelForCausalLM: MistralLargeForCausalLM,
    AutoModelForQuestionAnswering: MistralLargeForQuestionAnswering,
    AutoModelForSequenceClassification: MistralLargeForSequenceClassification,
    AutoModelForTokenClassification: MistralLargeForTokenClassification,
}
# By model type, in the order of `MODELS`.
NAMES_OF_MODELS: tuple[Any, ...] = (
    modeling_auto.MODEL_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)


def __getattr__(name: str) -> Any:
    """Import what loads any folder when it is asked for: importing this package registers and does nothing else."""
    if name in ("load", "pipeline"):
        from modeling_mistral_large import any_folder

        return getattr(any_folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    """Make the Auto classes know Mistral Large; may run any number of times."""
    AutoConfig.register(MistralLargeConfig.model_type, MistralLargeConfig, exist_ok=True)
    AutoTokenizer.register(MistralLargeConfig, MistralLargeTokenizer, exist_ok=True)
    prefer_tokenizer(MistralLargeConfig.model_type, MistralLargeTokenizer)
    for (auto_class, model_class), names in zip(MODELS.items(), NAMES_OF_MODELS, strict=True):
        auto_class.register(MistralLargeConfig, model_class, exist_ok=True)
        # Pipelines and trainers read these names: a class that is not among them is said not to do its task.
        names[MistralLargeConfig.model_type] = model_class.__name__
    export_names([MistralLargeConfig, MistralLargePreTrainedModel, MistralLargeTokenizer, *MODELS.values()])
    read_config_dict_with(read_for_auto_classes)
    add_peft_defaults()
    find_moved_modules()
    register_pipeline(
        "text-generation", f"{__name__}.generation.text_generation_pipeline", "MistralLargeTextGenerationPipeline"
    )


warn_outside_range()
_register()

"""Mistral-Large-Instruct-2407 for Hugging Face transformers.

Importing this package registers `MistralLargeConfig`, the models and `MistralLargeTokenizer` with transformers' Auto
classes; it does nothing else. The converter is `modeling_mistral_large.conversion`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_mistral_large import MistralLargeConfig
from .modeling_mistral_large import (
    MistralLargeForCausalLM,
    MistralLargeForQuestionAnswering,
    MistralLargeForSequenceClassification,
    MistralLargeForTokenClassification,
    MistralLargeModel,
    MistralLargePreTrainedModel,
)
from .tokenization_mistral_large import MistralLargeTokenizer
from .transformers_api import register_pipeline

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
]

MODELS = {
    AutoModel: MistralLargeModel,
    AutoModelForCausalLM: MistralLargeForCausalLM,
    AutoModelForQuestionAnswering: MistralLargeForQuestionAnswering,
    AutoModelForSequenceClassification: MistralLargeForSequenceClassification,
    AutoModelForTokenClassification: MistralLargeForTokenClassification,
}


def _register() -> None:
    """Make the Auto classes know Mistral Large; may run any number of times."""
    AutoConfig.register(MistralLargeConfig.model_type, MistralLargeConfig, exist_ok=True)
    AutoTokenizer.register(MistralLargeConfig, MistralLargeTokenizer, exist_ok=True)
    for auto_class, model_class in MODELS.items():
        auto_class.register(MistralLargeConfig, model_class, exist_ok=True)
    # pipeline("text-generation") reads this table of names and logs an error for a class it does not find.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MistralLargeConfig.model_type] = MistralLargeForCausalLM.__name__
    register_pipeline("text-generation", f"{__name__}.text_generation_pipeline", "MistralLargeTextGenerationPipeline")


_register()

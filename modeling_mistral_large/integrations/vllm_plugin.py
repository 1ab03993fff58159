"""What vLLM runs in each of its processes, by the entry point `vllm.general_plugins`: it makes our folders known.

The config and the tokenizer are ours, registered by importing this package; the decoder is vLLM's own Mistral, which
computes the same and has its kernels, quantization and parallelism. Prompts are built by our tokenizer, as ids: by
itself, vLLM renders them to a string, and a control string that a user writes becomes a control token.

vLLM skips a plugin that it cannot import, and serves other models as before. So its modules are imported here, not in
`register`.
"""

from typing import TYPE_CHECKING

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

if TYPE_CHECKING:
    from vllm.config import ModelConfig

ARCHITECTURE = "MistralLargeForCausalLM"
# vLLM's name for a tokenizer class together with a renderer, the option --tokenizer-mode.
TOKENIZER_MODE = "mistral_large"


class MistralLargeDefaults(VerifyAndUpdateConfig):  # type: ignore[misc, unused-ignore]
    """What vLLM asks about models of our architecture before it loads one."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Choose our prompts, unless another --tokenizer-mode is given."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE


def register() -> None:
    """Make vLLM serve the architecture of our folders; may run any number of times."""
    # Classes by name: importing the model's here would initialize CUDA before vLLM starts its workers.
    ModelRegistry.register_model(ARCHITECTURE, "vllm.model_executor.models.mistral:MistralForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = MistralLargeDefaults
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = (f"{__package__}.vllm_renderer", "VllmTokenizer")
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = (f"{__package__}.vllm_renderer", "MistralLargeRenderer")

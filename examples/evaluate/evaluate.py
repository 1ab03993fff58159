"""The command of lm-evaluation-harness, with this package's model type and prompts.

    python examples/evaluate/evaluate.py --model mistral-large --model_args pretrained=MODEL --tasks gsm8k \
        --apply_chat_template

takes the arguments of `lm-eval`. MODEL: a converted folder or repository.
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

# Registers the architecture with transformers; imported by a task it would come too late.
import modeling_mistral_large  # noqa: F401

END_OF_PROMPT = "[/INST]"


@register_model("mistral-large")
class MistralLargeLM(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """transformers, with every choice encoded as the model would say it."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt and of a choice.

        With a chat template the harness drops the space between them, and `[/INST]A` would be scored for the piece
        `A` inside a word; the model's responses begin with `▁A`.
        """
        if context.endswith(END_OF_PROMPT) and not continuation.startswith(" "):
            continuation = f" {continuation}"
        ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return ids


if __name__ == "__main__":
    cli_evaluate()

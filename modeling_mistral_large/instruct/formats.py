"""The instruct formats as data: what differs between the prompts of the 2407 and the 2411 model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mistral_large_conversion.vocabulary import VOCABULARIES, Vocabulary
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.json_text import show

# What may come after a message of each role, in both formats.
_NEXT_ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "system": ("system", "user", "assistant"),
        "user": ("system", "user", "assistant"),
        "assistant": ("user", "assistant", "tool"),
        "tool": ("user", "assistant", "tool"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructFormat:
    """How a conversation is written as a prompt.

    name: what `build_prompt`, the tokenizer and tokenizer_config.json call it.
    system_tokens: the control tokens around a system message, which stays where it is; None: all system messages are
        joined and go before the text of the last user message.
    begins_with_user: whether a conversation that begins with another role gets an empty user message first.
    tool_content_token: the control token between the id of a tool call and the text of its result, which is not
        changed; None: id and result are one JSON object, and a text that is JSON is its value.
    takes_text_with_calls: whether the reference takes text and tool calls in one turn of the assistant. It then looks
        at the turn as a whole: a message of it may be empty, or hold the text after the calls of another.
    separator: between the texts of one message's chunks, and of messages that are merged.
    stripped: characters that the assistant's text does not end with.
    next_roles: what may come after a message of each role.
    """

    name: str
    system_tokens: tuple[str, str] | None
    begins_with_user: bool
    tool_content_token: str | None
    takes_text_with_calls: bool
    separator: str = "\n\n"
    stripped: str = " "
    next_roles: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NEXT_ROLES)


FORMATS: Mapping[str, InstructFormat] = MappingProxyType(
    {
        # Mistral-Large-Instruct-2407
        "v3": InstructFormat(
            name="v3",
            system_tokens=None,
            begins_with_user=True,
            tool_content_token=None,
            takes_text_with_calls=False,
        ),
        # Mistral-Large-Instruct-2411
        "v7": InstructFormat(
            name="v7",
            system_tokens=("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            begins_with_user=False,
            tool_content_token="[TOOL_CONTENT]",
            takes_text_with_calls=True,
        ),
    }
)


def find_format(name: str) -> InstructFormat:
    """Return the format of this name, or raise ConversationError."""
    found = FORMATS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ConversationError(
            f"prompt_format {show(name)}: the instruct formats are {', '.join(FORMATS)}; choose the one the model was "
            "trained on"
        )
    return found


def format_problem(prompt_format: str | None, vocabulary: Vocabulary) -> str | None:
    """Return what keeps prompts of a format from being written in a vocabulary: the problem, the rule, the way out."""
    wanted = VOCABULARIES[prompt_format].control_tokens if prompt_format is not None else {}
    if not (missing := [token for token in wanted if token not in vocabulary.control_tokens]):
        return None
    return (
        f"the vocabulary is {vocabulary.name}'s, which has no {', '.join(missing)}; a prompt format needs its control "
        f"tokens; choose {vocabulary.name}, or take a model that was trained on {prompt_format} with its tokenizer"
    )

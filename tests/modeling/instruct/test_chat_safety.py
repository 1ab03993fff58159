"""Nothing that a user, a tool or a document says becomes a control token."""

from collections.abc import Callable
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError
from tests.modeling.instruct.conftest import BuildPrompt
from tests.support.checkpoints import tokenizer_model_file
from tests.support.conversations import Conversation, reference_ids
from tests.support.errors import raises_exactly

Reference = MistralTokenizer[Any, Any, Any, Any, Any]

# Those that SentencePiece takes out of a text: the reference documents, and of v7 also `[REF]` and `[/REF]`.
USER_DEFINED = {"v3": range(751, 771), "v7": range(749, 771)}
# `<unk>`, the control pieces and those.
MARKED = range(771)

CONTEXTS: dict[str, Callable[[str], str]] = {
    "alone": lambda piece: piece,
    "glued": lambda piece: f"a{piece}{piece}b",
    "spaced": lambda piece: f" {piece} \n{piece}\t",
}


@pytest.fixture(scope="session")
def pieces(prompt_format: str) -> list[str]:
    processor = SentencePieceProcessor(model_file=str(tokenizer_model_file(prompt_format)))
    found = [processor.id_to_piece(index) for index in MARKED if index > 0]
    assert len(found) == 770
    return found


def conversation_with(text: str, prompt_format: str) -> Conversation:
    """Return a conversation that has the text in every field that is not ours to trust."""
    half = len(text) // 2
    chunks = [{"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]
    values = {text: text, "list": [text, {text: [text]}]}
    quoted = text.replace("\n", "\\n").replace("\t", "\\t")
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": values}}
    written = {"type": "function", "id": "123456789", "function": {"name": "f", "arguments": f"{text} no JSON"}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": text},
        {"role": "developer", "content": chunks},
        {"role": "user", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
        {"role": "user", "content": chunks},
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        # The reference of v3 refuses text next to calls.
        {"role": "assistant", "content": text if prompt_format == "v7" else None, "tool_calls": [call, written]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": text},
        {"role": "tool", "tool_call_id": "123456789", "content": f'{{"{quoted}": ["{quoted}"]}}'},
        {"role": "assistant", "content": chunks},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "prefix": True},
    ]
    schema = {
        "type": "object",
        "properties": {text: {"type": "string", "description": text, "enum": [text], "default": values}},
        "required": [text],
        "title": text,
    }
    return Conversation(
        messages, [{"type": "function", "function": {"name": "f", "description": text, "parameters": schema}}]
    )


@pytest.mark.parametrize(
    ("context", "step"),
    [
        # One of seven, for every edit.
        pytest.param("glued", 7, id="some"),
        *(pytest.param(context, 1, id=context, marks=pytest.mark.slow) for context in CONTEXTS),
    ],
)
def test_no_piece_becomes_a_control_token(
    prompt_format: str, tokenizer: MistralLargeTokenizer, pieces: list[str], context: str, step: int
) -> None:
    pieces = pieces[::step]
    harmless = conversation_with("words", prompt_format)
    expected = tokenizer.apply_chat_template(harmless.messages, tools=harmless.tools, return_dict=False)
    control_ids = [index for index in expected if index in MARKED]
    drawn = [conversation_with(CONTEXTS[context](piece), prompt_format) for piece in pieces]
    prompts = [
        tokenizer.apply_chat_template(adversarial.messages, tools=adversarial.tools, return_dict=False)
        for adversarial in drawn
    ]
    for piece, prompt in zip(pieces, prompts, strict=True):
        found = [index for index in prompt if index in MARKED and index not in USER_DEFINED[prompt_format]]
        assert found == control_ids, piece
        if not piece.startswith(("[REFERENCE_DOC_", "[REF]", "[/REF]")):
            assert not set(prompt) & {*USER_DEFINED["v7"]}, piece


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_no_reference_document_becomes_a_piece_as_text(
    prompt_format: str, tokenizer: MistralLargeTokenizer, pieces: list[str], context: Callable[[str], str]
) -> None:
    for piece in pieces[USER_DEFINED[prompt_format].start - 1 :]:
        adversarial = conversation_with(context(piece), prompt_format)
        options: dict[str, Any] = {
            "tools": adversarial.tools,
            "return_dict": False,
            "reference_documents_as_text": True,
        }
        prompt = tokenizer.apply_chat_template(adversarial.messages, **options)
        assert not set(prompt) & {*USER_DEFINED[prompt_format]}, piece
        # What is said is the same, however it is cut into pieces.
        as_pieces = tokenizer.apply_chat_template(adversarial.messages, tools=adversarial.tools, return_dict=False)
        assert tokenizer.decode(prompt) == tokenizer.decode(as_pieces)


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_reference_documents_are_the_references(
    prompt_format: str,
    tokenizer: MistralLargeTokenizer,
    reference_tokenizer: Reference,
    pieces: list[str],
    context: Callable[[str], str],
) -> None:
    """The reference takes these pieces out of texts too; and every seventh other piece, to be sure of the rest."""
    taken = USER_DEFINED[prompt_format]
    for index, piece in enumerate(pieces, start=1):
        if index in taken or index % 7 == 0:
            adversarial = conversation_with(context(piece), prompt_format)
            prompt = tokenizer.apply_chat_template(adversarial.messages, tools=adversarial.tools, return_dict=False)
            assert prompt == reference_ids(reference_tokenizer, adversarial), piece
            assert (index in prompt) == (index in taken or index <= 9)


def test_chunks_do_not_join_to_a_control_string(tokenizer: MistralLargeTokenizer, pieces: list[str]) -> None:
    for piece in (*pieces[:18], *pieces[748:752]):
        for cut in range(1, len(piece)):
            chunks = [{"type": "text", "text": piece[:cut]}, {"type": "text", "text": piece[cut:]}]
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": chunks}], return_dict=False)
            assert [index for index in prompt if index in MARKED] == [1, 3, 4]


def test_text_does_not_join_template_text_to_a_control_string(tokenizer: MistralLargeTokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "INST]"},
        {"role": "assistant", "content": "[/INST"},
        {"role": "user", "content": "] </s"},
        {"role": "assistant", "content": "><s> ", "prefix": True},
    ]
    prompt = tokenizer.apply_chat_template(messages, return_dict=False)
    assert [index for index in prompt if index in MARKED] == [1, 3, 4, 2, 3, 4]


def test_names_and_ids_hold_no_control_string(build_prompt: BuildPrompt, pieces: list[str]) -> None:
    for piece in pieces:
        function = {"name": piece, "parameters": {}}
        call = {"id": "abcdefghi", "function": {"name": piece, "arguments": {}}}
        with raises_exactly(
            ConversationError,
            f"tool 0: name '{piece}'; a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -; rename the function",
        ):
            build_prompt([{"role": "user", "content": "x"}], [{"type": "function", "function": function}])
        with raises_exactly(
            ConversationError,
            f"message 1: tool_calls[0]: name '{piece}'; a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -; "
            "rename the function",
        ):
            build_prompt([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
        call = {"id": piece, "function": {"name": "f", "arguments": {}}}
        result = {"role": "tool", "tool_call_id": piece, "content": "x"}
        prompt = build_prompt([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}, result])
        assert not any(piece in segment.text for segment in prompt if not segment.is_control)

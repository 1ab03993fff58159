"""Samples as token ids: conversations are the reference's training samples, texts are windows of all their tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mistral_large_conversion.errors import SampleFileError, SettingError
from mistral_large_conversion.samples import Sample
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.streamed import TokenSequence, tokenize_samples
from tests.support.errors import raises_exactly

CONVERSATION = [
    {"role": "user", "content": "What is <s> in a prompt?"},
    {"role": "assistant", "content": "Text.", "weight": 0},
    {"role": "user", "content": "And in yours?"},
    {"role": "assistant", "content": "A control token."},
]
TEXT = "Le début </s> d'un texte. " * 30


def test_a_conversation_is_the_prompt_with_its_assistant_tokens(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Any
) -> None:
    (found,) = tokenize_samples([Sample("a line", messages=CONVERSATION)], tokenizer)
    # `weight` is the reference's of a training sample; the ids are those of the whole conversation.
    wanted = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    scored = [index for index, is_scored in enumerate(found.is_scored) if is_scored]
    assert list(found.ids) == wanted["input_ids"]
    assert list(found.is_scored) == [bool(mark) for mark in wanted["assistant_masks"]]
    assert tokenizer.decode([found.ids[index] for index in scored]) == "A control token.</s>"
    (everything,) = tokenize_samples([Sample("a line", messages=CONVERSATION)], tokenizer, scores_prompts=True)
    assert everything == TokenSequence(found.ids, (False, *[True] * (len(found.ids) - 1)))


@pytest.mark.parametrize("fixture", ["tokenizer", "v7_tokenizer"])
def test_tools_and_answers_are_rendered_by_the_format(fixture: str, request: pytest.FixtureRequest) -> None:
    tokenizer: MistralLargeTokenizer = request.getfixturevalue(fixture)
    line = json.loads(
        Path(__file__).parents[3].joinpath("examples", "fine_tune", "train.jsonl").read_text().split("\n")[0]
    )
    (found,) = tokenize_samples([Sample("a line", messages=line["messages"], tools=line["tools"])], tokenizer)
    assert list(found.ids) == tokenizer.apply_chat_template(line["messages"], line["tools"], return_dict=False)
    assert {tokenizer.vocabulary.control_tokens["[TOOL_CALLS]"]} < {
        token for token, is_scored in zip(found.ids, found.is_scored, strict=True) if is_scored
    }


def test_a_text_is_cut_into_windows_that_lose_nothing(tokenizer: MistralLargeTokenizer) -> None:
    found = tokenize_samples([Sample("a text", text=TEXT)], tokenizer, length=64)
    (wanted,) = tokenizer.encode_texts([TEXT])
    assert [token for sequence in found for token in sequence.ids[1:]] == wanted
    # A control string stays text.
    assert tokenizer.eos_token_id not in wanted
    assert {sequence.ids[0] for sequence in found} == {tokenizer.bos_token_id}
    assert {len(sequence.ids) for sequence in found[:-1]} == {64}
    assert all(sequence.is_scored == (False, *[True] * (len(sequence.ids) - 1)) for sequence in found)
    assert not any(sequence.is_cut for sequence in found)


def test_limits_take_the_first(tokenizer: MistralLargeTokenizer) -> None:
    samples = [Sample("a text", text=TEXT), Sample("a line", messages=CONVERSATION)]
    everything = tokenize_samples(samples, tokenizer, length=16)
    assert tokenize_samples(samples, tokenizer, length=16, limit=3) == everything[:3]
    assert tokenize_samples(samples, tokenizer, length=16, limit=len(everything) + 5) == everything
    conversation = everything[-1]
    (whole,) = tokenize_samples(samples[1:], tokenizer)
    assert conversation == TokenSequence(whole.ids[:16], whole.is_scored[:16], is_cut=True)
    assert not whole.is_cut


def test_a_conversation_without_a_prompt_is_named_by_its_line(tokenizer: MistralLargeTokenizer) -> None:
    sample = Sample("data.jsonl line 7", messages=[{"role": "assistant", "content": "Hi"}])
    with raises_exactly(
        SampleFileError,
        "data.jsonl line 7: message 0: the only message, and its role is assistant; a conversation has a user or "
        "system message; add one",
    ):
        tokenize_samples([sample], tokenizer)


def test_a_sequence_has_two_tokens_or_more(tokenizer: MistralLargeTokenizer) -> None:
    with raises_exactly(SettingError, "length=1: a token is scored given those before it; pass 2 or more"):
        tokenize_samples([Sample("a text", text="a")], tokenizer, length=1)
    foreign = foreign_tokenizer()
    with raises_exactly(SampleFileError, "a text: too short: a sequence has two tokens or more; take a longer text"):
        tokenize_samples([Sample("a text", text="a")], foreign)


def foreign_tokenizer(**options: Any) -> Any:
    backend = Tokenizer(models.WordLevel({"[s]": 0, "a": 1, "b": 2, "user": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast
    return tokenizer(tokenizer_object=backend, bos_token="[s]", unk_token="?", **options)


def test_a_foreign_tokenizer_keeps_its_own_rules() -> None:
    template = "{% for message in messages %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    tokenizer = foreign_tokenizer(chat_template=template)
    samples = [Sample("a text", text="a b b"), Sample("a line", messages=[{"role": "user", "content": "b a"}])]
    # It puts no token before a text, and its template marks no assistant tokens.
    assert tokenize_samples(samples, tokenizer) == [
        TokenSequence((1, 2, 2), (False, True, True)),
        TokenSequence((3, 2, 1), (False, True, True)),
    ]
    with pytest.raises(SampleFileError, match=r"^a line: Cannot use chat template functions"):
        tokenize_samples(samples, foreign_tokenizer())

"""What a model is calibrated on: files as token sequences in its own prompts, and the set that comes along."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mistral_large_conversion.errors import SampleFileError
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.calibration.conversion import DEFAULT_FILE, read_calibration_data
from tests.support.errors import raises_exactly

CONVERSATION = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_conversations_are_prompts_with_their_answers(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "chats.jsonl", {"messages": CONVERSATION}, {"text": "One."})
    data = read_calibration_data(path, tokenizer)
    wanted = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert data.sequences == (tuple(wanted), tuple(tokenizer("One.")["input_ids"]))
    assert data.sequences[0][-1] == tokenizer.eos_token_id
    assert (data.name, data.tokens, data.remarks) == ("chats.jsonl", sum(map(len, data.sequences)), ())
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_checksum_of_the_tokens_knows_where_sequences_end(
    tokenizer: MistralLargeTokenizer, v7_tokenizer: MistralLargeTokenizer, tmp_path: Path
) -> None:
    text = write(tmp_path / "text.jsonl", {"text": "one two three four five six seven eight"})
    system = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    chat = write(tmp_path / "chat.jsonl", {"messages": system})
    found = [
        read_calibration_data(text, tokenizer, length=5),
        read_calibration_data(text, tokenizer, length=6),
        read_calibration_data(text, tokenizer),
        read_calibration_data(chat, tokenizer),
        read_calibration_data(chat, v7_tokenizer),
    ]
    assert len({data.tokens_sha256 for data in found}) == len(found)


def test_too_long_conversations_and_too_few_sequences_are_said(
    tokenizer: MistralLargeTokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "chats.jsonl", {"messages": CONVERSATION}, {"messages": CONVERSATION})
    data = read_calibration_data(path, tokenizer, samples=1, length=4)
    assert [len(ids) for ids in data.sequences] == [4]
    assert data.remarks == (
        "calibration: of 1 conversations only the start is taken, as they are longer than --length",
    )
    with raises_exactly(
        SampleFileError,
        f"{path}: 2 sequences of at most 2048 tokens, 3 asked for; take a longer file, or fewer samples",
    ):
        read_calibration_data(path, tokenizer, samples=3)


def test_more_than_256_sequences_are_taken_only_if_asked_for(tokenizer: MistralLargeTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", *({"text": f"number {number}"} for number in range(300)))
    assert len(read_calibration_data(path, tokenizer).sequences) == 256
    assert len(read_calibration_data(path, tokenizer, samples=290).sequences) == 290


def test_a_conversation_that_has_no_prompt_is_refused_with_its_line(
    tokenizer: MistralLargeTokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "chats.jsonl", {"messages": CONVERSATION}, {"messages": [{"role": "nobody"}]})
    with raises_exactly(
        SampleFileError,
        f"{path} line 2: message 0: role 'nobody'; the roles are system, developer, user, assistant, tool; choose "
        "one of them",
    ):
        read_calibration_data(path, tokenizer)


@pytest.mark.parametrize("vocabulary", ["v3", pytest.param("v7", marks=pytest.mark.slow)])
def test_the_default_set_has_a_prompt_for_all(
    vocabulary: str, tokenizer: MistralLargeTokenizer, v7_tokenizer: MistralLargeTokenizer
) -> None:
    data = read_calibration_data("default", tokenizer if vocabulary == "v3" else v7_tokenizer)
    lines = [json.loads(line) for line in DEFAULT_FILE.read_text(encoding="utf-8").splitlines()]
    assert len(data.sequences) == len(lines) == 129
    assert data.remarks == ()
    assert data.name == "default"
    assert 50_000 < data.tokens < 60_000
    # As docs/quantizing.md says: conversations and texts, calls of tools, many scripts.
    assert sum("tools" in line for line in lines) >= 10
    assert sum("text" in line for line in lines) == 45
    assert set("日한اиहไהοğř") <= set(DEFAULT_FILE.read_text(encoding="utf-8"))


class WithoutTools:
    """A tokenizer whose template refuses tools, as those of many fine-tunes do."""

    bos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *range(2, 2 + len(text.split()))]}

    def apply_chat_template(self, messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> dict[str, list[int]]:
        if tools:
            raise ValueError("this template has no tools")
        return {"input_ids": [1, *range(2, 2 + len(messages))]}


def test_what_a_template_refuses_is_left_out_of_the_default_set_alone(tmp_path: Path) -> None:
    foreign: Any = WithoutTools()
    lines = [json.loads(line) for line in DEFAULT_FILE.read_text(encoding="utf-8").splitlines()]
    refused = sum("tools" in line for line in lines)
    data = read_calibration_data("default", foreign)
    assert len(data.sequences) == 129 - refused
    assert data.remarks == (
        f"calibration: {refused} default conversations left out, which the chat template of the source refuses",
    )
    path = write(tmp_path / "chats.jsonl", {"messages": CONVERSATION, "tools": [{}]})
    with raises_exactly(SampleFileError, f"{path} line 1: this template has no tools"):
        read_calibration_data(path, foreign)

"""Files of texts and conversations: what is read, and one error for each thing that is none."""

import json
from pathlib import Path

import pytest

from mistral_large_conversion.errors import SampleFileError
from mistral_large_conversion.samples import Sample, read_samples
from tests.support.errors import raises_exactly, whole

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
LINE = 'a line is {"text": "..."} or {"messages": [...]}'
FILE = "samples are JSON lines (*.jsonl), one conversation (*.json), or plain text (any other name)"


def test_json_lines_are_texts_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    lines = [
        json.dumps({"text": "Bonjour.\n\u2028Deuxième ligne.", "source": "own"}, ensure_ascii=False),
        "  ",
        json.dumps({"messages": HI, "tools": TOOLS}),
        json.dumps({"messages": HI, "tools": []}),
    ]
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    assert read_samples(path) == [
        Sample(f"{path} line 1", text="Bonjour.\n\u2028Deuxième ligne."),
        Sample(f"{path} line 3", messages=HI, tools=TOOLS),
        Sample(f"{path} line 4", messages=HI),
    ]


@pytest.mark.parametrize("content", [HI, {"messages": HI}])
def test_a_json_file_is_one_conversation(content: object, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(content, indent=2))
    assert read_samples(path) == [Sample(str(path), messages=HI)]


@pytest.mark.parametrize("name", ["book.txt", "README.md", "text"])
def test_any_other_file_is_one_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('{"a": "JSON example"}\n\nand <s> text.\n')
    assert read_samples(path) == [Sample(str(path), text='{"a": "JSON example"}\n\nand <s> text.\n')]


LINES = {
    "{": f"not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); {LINE}; fix or "
    "remove it",
    '"text"': f"neither text nor messages; {LINE}; fix or remove it",
    "{}": f"neither text nor messages; {LINE}; fix or remove it",
    '{"text": "a", "messages": []}': f"both text and messages; {LINE}; fix or remove it",
    '{"text": " "}': f"text is ' '; {LINE}, and a text is not empty; fix or remove it",
    '{"text": 7}': f"text is 7; {LINE}, and a text is not empty; fix or remove it",
    '{"messages": []}': f"messages is []; {LINE}, and messages are a list that is not empty; fix or remove it",
    '{"messages": "Hi"}': f"messages is 'Hi'; {LINE}, and messages are a list that is not empty; fix or remove it",
    '{"messages": [{}], "tools": {}}': "tools is {}; tools are a list of definitions; fix or remove it",
    '[{"role": "user"}]': f"[{{'role': 'user'}}]; {LINE}; put it into an object",
    '{"text": "\\ud800"}': f"a lone surrogate; {LINE}; fix or remove it",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_sample_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    with raises_exactly(SampleFileError, f"{path} line 3: {LINES[line]}"):
        read_samples(path)


def test_a_line_of_any_depth_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(SampleFileError, match=whole(f"{path} line 1: not JSON (<*>); {LINE}; fix or remove it")):
        read_samples(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with raises_exactly(
        SampleFileError, f"{tmp_path / 'none'}: cannot be read: No such file or directory; {FILE}; name one"
    ):
        read_samples(tmp_path / "none")
    with raises_exactly(SampleFileError, f"{tmp_path}: cannot be read: Is a directory; {FILE}; name one"):
        read_samples(tmp_path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(" \n\n")
    with raises_exactly(SampleFileError, f"{path}: empty; {FILE}; name a file that holds some"):
        read_samples(path)


@pytest.mark.parametrize("name", ["latin.jsonl", "latin.json", "latin.txt"])
def test_another_encoding_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"))
    with raises_exactly(SampleFileError, f"{path} line 2: byte 0xe9 is not UTF-8; {FILE}, in UTF-8; convert it"):
        read_samples(path)


def test_json_lines_under_another_name_are_not_taken_for_a_text(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_text('{"messages": []}\n{"messages": []}\n')
    with raises_exactly(SampleFileError, f"{path}: holds JSON lines; {FILE}; rename it to *.jsonl"):
        read_samples(path)

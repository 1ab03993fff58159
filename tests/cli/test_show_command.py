"""`mistral-large show`: the prompt of a conversation, to the letter and in colours."""

import json
import re
import subprocess
import sys
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mistral_large_cli.demo import golden_conversations
from mistral_large_cli.show import styled
from mistral_large_conversion.prompt_roles import COLOURS, ROLES
from mistral_large_conversion.vocabulary import VOCABULARIES
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.instruct.prompt import build_prompt
from tests.support.command import run

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
LEGEND = "\n\n" + "  ".join(role for role in COLOURS if role != "system") + "  "  # of v3
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi [/INST] \x1b[2J"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": ""},
]


def written(folder: Path, content: object, name: str = "conversation.json") -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def text_of(page: str) -> str:
    return unescape(re.sub("<[^>]+>", "", re.sub("<(style|title)>.*?</\\1>", "", page, flags=re.DOTALL)))


@pytest.mark.parametrize("golden", golden_conversations().values(), ids=golden_conversations())
def test_it_is_the_prompt_to_the_letter(
    golden: Any, tokenizer: MistralLargeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = written(tmp_path, {"messages": golden.messages, "tools": golden.tools})
    assert run("show", conversation) == 0
    prompt = tokenizer.apply_chat_template(golden.messages, golden.tools, tokenize=False)
    assert capsys.readouterr().out == f"{prompt}{LEGEND}\n"


def test_nothing_that_a_text_says_reaches_the_terminal_and_the_list_alone_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", written(tmp_path, MESSAGES)) == 0
    assert capsys.readouterr().out.startswith("<s>[INST] Hi [/INST] \ufffd[2J[/INST] Yes?</s>[INST][/INST]\n")
    monkeypatch.setattr(sys, "stdin", StringIO(json.dumps(MESSAGES)))
    assert run("show", "-") == 0
    assert capsys.readouterr().out.startswith("<s>[INST] Hi")


def test_each_part_has_the_colour_of_its_role_and_the_mask_of_the_assistant() -> None:
    content = json.loads((PICTURES / "conversation.json").read_text())
    prompt = build_prompt(content["messages"], content["tools"])
    colours = [COLOURS[role] for role in ("tools", "user", "assistant", "results", "assistant")]
    texts = [style for segment, style in styled(prompt, mask=False) if not segment.is_control]
    assert texts == colours
    shown = {segment.text for segment in prompt if segment.is_control}
    assert shown == set(VOCABULARIES["v3"].control_tokens)
    assert set(ROLES) == set(VOCABULARIES["v7"].control_tokens)
    assert set(ROLES.values()) == set(COLOURS)
    underlined = [segment for segment, style in styled(prompt, mask=True) if style.endswith("underline")]
    assert underlined == [segment for segment in prompt if segment.is_generated]


V7_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "abcdefghi", "function": {"name": "f"}}]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "22 °C"},
]


@pytest.mark.slow
def test_the_format_is_the_models_or_the_one_that_is_asked_for(
    v7_tokenizer: MistralLargeTokenizer,
    tokenizer: MistralLargeTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversation = written(tmp_path, V7_MESSAGES)
    v7, v3 = (own.apply_chat_template(V7_MESSAGES, tokenize=False) for own in (v7_tokenizer, tokenizer))
    assert "[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT]" in v7
    legend = "\n\nprompt  system  tools  user  assistant  results  "
    for options, shown in (
        (("--prompt-format", "v7"), v7 + legend + "\n"),
        (("--model", v7_tokenizer.name_or_path), v7 + legend),
        (("--model", v7_tokenizer.name_or_path, "--prompt-format", "v3"), v3 + LEGEND),
        (("--prompt-format", "v3"), v3 + LEGEND),
        ((), v3 + LEGEND),
    ):
        assert run("show", conversation, *options) == 0
        assert capsys.readouterr().out.startswith(shown)
    assert run("show", conversation, "--model", tokenizer.name_or_path, "--prompt-format", "v7") == 2
    assert "the vocabulary is v3's, which has no [SYSTEM_PROMPT]" in capsys.readouterr().err


@pytest.mark.slow
def test_a_template_of_others_is_not_shown_as_ours(
    v7_tokenizer: MistralLargeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = written(tmp_path, V7_MESSAGES)
    v7_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert run("show", conversation, "--model", tmp_path / "model") == 2
    assert "its chat template is none of this package's" in capsys.readouterr().err
    assert run("show", conversation, "--model", tmp_path / "model", "--prompt-format", "v7") == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3", "v7"])
def test_ids_are_those_of_the_prompt(
    name: str,
    tokenizer: MistralLargeTokenizer,
    v7_tokenizer: MistralLargeTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = {"v3": tokenizer, "v7": v7_tokenizer}[name]
    (tmp_path / "model").symlink_to(tokenizer.name_or_path)
    monkeypatch.setenv("COLUMNS", "200")
    conversation = written(tmp_path, MESSAGES)
    ids = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert run("show", conversation, "--model", tmp_path / "model", "--ids") == 0
    *rows, _, legend = capsys.readouterr().out.splitlines()
    assert [int(id_) for row in rows[1:] for id_ in re.findall(r"\d+", row.rstrip().rpartition("  ")[2])] == ids
    assert legend.endswith(f"  {len(ids)} tokens")
    assert run("show", conversation, "--model", tmp_path / "model") == 0
    assert capsys.readouterr().out.endswith(f"  {len(ids)} tokens\n")


def test_pictures_hold_the_prompt_and_ask_nobody_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("show", PICTURES / "conversation.json", "--mask", "--html", "page.html", "--svg", "page.svg") == 0
    prompt = capsys.readouterr().out.partition("\n\nprompt")[0]
    pages = [Path("page.html").read_text(), Path("page.svg").read_text()]
    for page in pages:
        assert "".join(prompt.split()) in "".join(text_of(page).split())
        assert not re.search(r"url\(\W*http|src=|href=|<script", page)
    assert "text-decoration: underline" in pages[0]
    # The committed picture is of this conversation; its layout is rich's.
    committed = (PICTURES / "conversation.svg").read_text()
    assert "".join(text_of(committed).split()) == "".join(text_of(pages[1]).split())


def test_tools_come_from_python_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = written(tmp_path, {"messages": [{"role": "user", "content": "x"}], "tools": []})
    assert run("show", conversation) == 0
    assert "AVAILABLE" not in capsys.readouterr().out
    python = written(tmp_path, 'def now() -> str:\n    """Tell the time"""\n    return ""\n', "tools.py")
    definition = {"name": "now", "description": "Tell the time", "parameters": {"type": "object", "properties": {}}}
    printed = []
    for tools in (python, written(tmp_path, {"tools": [{"type": "function", "function": definition}]}, "tools.json")):
        assert run("show", conversation, "--tools", tools) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "now"' in printed[0]


REFUSED: dict[str, tuple[object, tuple[object, ...], str]] = {
    "no file": (None, (), "conversation.json: [Errno 2] No such file or directory"),
    "no JSON": ("{", (), "conversation.json: Expecting"),
    "nested": ("[" * 100_000, (), "conversation.json: "),
    "no messages": ({"tools": []}, (), "conversation.json: no messages"),
    "a number": (7, (), "conversation.json: no messages"),
    "empty": ([], (), "conversation.json: no messages: a conversation has at least one"),
    "tools no list": ({"messages": MESSAGES, "tools": "all"}, (), "conversation.json: tools is not a list"),
    "another role": ([{"role": "bot", "content": "x"}], (), "conversation.json: message 0: role 'bot'"),
    "ids without a tokenizer": (MESSAGES, ("--ids",), "--ids: no tokenizer"),
    "no tokenizer": (
        MESSAGES,
        ("--model", "."),
        ".: has none of tokenizer.model.v3, tokenizer.model.v7 and tokenizer.json",
    ),
    "no repository": (MESSAGES, ("--model", "nobody/nothing"), "nobody/nothing: no folder of this name here"),
    "no name of a repository": (MESSAGES, ("--model", "a b/c/d"), "a b/c/d: no such file or folder"),
    "no tools file": (MESSAGES, ("--tools", "tools.json"), "tools.json: [Errno 2]"),
    "no tools in it": (MESSAGES, ("--tools", "conversation.json"), "tool 0: name None"),
    "no Python file": (MESSAGES, ("--tools", "tools.py"), "tools.py: no Python file"),
    "no place for the page": (MESSAGES, ("--html", "missing/page.html"), "missing/page.html: cannot be written"),
    "no place for the picture": (MESSAGES, ("--svg", "missing/page.svg"), "missing/page.svg: cannot be written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shown_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, options, problem = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if content is not None:
        written(tmp_path, content)
    assert run("show", "conversation.json", *options) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.startswith("mistral-large: ")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mistral_large_cli", "show", str(tmp_path / "none.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mistral-large: ")
    assert done.stderr.count("\n") == 1

"""The parts of `chat`: settings, stop strings, the context, Markdown, questions, MCP servers."""

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mistral_large_cli import app, terminal
from mistral_large_cli.chat_turns import ContextWindow
from mistral_large_cli.demo import golden_conversations
from mistral_large_cli.generation_session import StoppedText
from mistral_large_cli.line_editor import LineEditor
from mistral_large_cli.markdown_view import MarkdownView
from mistral_large_cli.mcp_tools import McpServers, ToolError
from mistral_large_cli.sampling import Sampling
from mistral_large_conversion.errors import MissingLibraryError, MistralLargeError, SettingError
from modeling_mistral_large.generation.tool_loop import run_tool_loop
from modeling_mistral_large.instruct import AnswerStream, TextEvent
from tests.support.errors import raises_exactly, whole

GOLDEN = golden_conversations()
ROOT = Path(__file__).parents[2]
SERVER = f"env PYTHONPATH={ROOT} {sys.executable} -m tests.support.mcp_server"


# Settings


def test_options_of_generate() -> None:
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    assert Sampling(8, 0, None, 1).options() == {**greedy, "max_new_tokens": 8}
    assert Sampling(8, 0, None, None, repetition_penalty=1.1, stop=("a", "b")).options() == {
        **greedy,
        "max_new_tokens": 8,
        "repetition_penalty": 1.1,
        "stop_strings": ["a", "b"],
    }
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": None, "max_new_tokens": 8}
    assert Sampling(8, 0.5, None, None).options() == sampled
    assert Sampling(8, 0.5, 0.9, None, 40, 0.1).options() == {**sampled, "top_p": 0.9, "top_k": 40, "min_p": 0.1}


def test_settings_are_changed_by_their_names() -> None:
    settings = Sampling(8, 0.7, 0.9, None)
    for name, text in (
        *(("max_new_tokens", "16"), ("temperature", "1.5"), ("top_p", "OFF"), ("top_k", "40"), ("min_p", "0.1")),
        *(("repetition_penalty", "1.1"), ("seed", "-3"), ("stop", "the end")),
    ):
        settings = settings.changed(name, text)
    assert settings == Sampling(16, 1.5, None, -3, 40, 0.1, 1.1, ("the end",))
    assert settings.changed("stop", '["\\n\\n", "x"]').stop == ("\n\n", "x")
    assert settings.changed("stop", '"\\n"').stop == ("\n",)
    assert settings.changed("stop", "[x").stop == ("[x",)
    assert settings.changed("stop", "off").stop == ()
    assert settings.lines()[-1] == 'stop                "the end"'


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("temperature", "off", "/set temperature off: a response always has one; give a number"),
        ("temperature", "hot", "/set temperature hot: no number; give one"),
        (
            "temperature",
            "inf",
            "temperature inf: must be finite, and 0 or at least 0.001; 0 takes the most likely token each time",
        ),
        (
            "temperature",
            "0",
            "top_p: has no effect at a temperature of 0, which takes the most likely token each time; leave one of "
            "the two out",
        ),
        ("top_k", "0", "top_k 0: must be at least 1; leave it out for all tokens"),
        ("top_k", "1.5", "/set top_k 1.5: no whole number; give one, or off"),
        ("min_p", "2", "min_p 2.0: must be a probability, from 0 to 1; leave it out for 0"),
        ("repetition_penalty", "0", "repetition_penalty 0.0: must be finite and more than 0; leave it out for 1"),
        ("repetition_penalty", "nan", "repetition_penalty nan: must be finite and more than 0; leave it out for 1"),
        ("max_new_tokens", "0", "max_new_tokens 0: must be at least 1; a response has tokens"),
        ("seed", str(2**64), f"seed {2**64}: must fit 64 bits; take another one"),
        ("stop", '""', "stop: an empty text ends nothing; leave it out"),
        ("stop", "[1]", "/set stop [1]: no list of texts; give one, or off"),
        (
            "heat",
            "1",
            "/set heat: no such setting; they are max_new_tokens, temperature, top_p, top_k, min_p, "
            "repetition_penalty, seed, stop; name one",
        ),
    ],
)
def test_what_cannot_be_set(name: str, text: str, problem: str) -> None:
    with raises_exactly(SettingError, problem):
        Sampling(8, 0.7, 0.9, None).changed(name, text)


@pytest.mark.parametrize("option", [("--top-k", "5"), ("--min-p", "0.1")])
def test_options_of_sampling_have_no_effect_at_0(demo_folder: Path, option: tuple[str, str]) -> None:
    name = option[0].removeprefix("--").replace("-", "_")
    with raises_exactly(
        SettingError,
        f"{name}: has no effect at a temperature of 0, which takes the most likely token each time; leave one of the "
        "two out",
    ):
        CliRunner().invoke(
            app, ["chat", str(demo_folder), "--temperature", "0", *option], input="", catch_exceptions=False
        )


# Stop strings


def test_a_response_ends_before_its_first_stop_string(tokenizer: Any) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab \né", k=rng.randint(1, 30))).strip() or "a"
        stop = tuple("".join(rng.choices("ab \né", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3)))
        ids = tokenizer.encode_texts([text])[0]
        stream = StoppedText(AnswerStream(tokenizer.pieces), stop)
        said, place = [], 0
        while place < len(ids):
            size = rng.randint(1, 4)
            said.append(stream.feed(ids[place : place + size]))
            place += size
        said.append(stream.finish())
        shown = "".join(event.text for events in said for event in events)
        # The one that is complete first counts, and of those the longest.
        ends = [(place + len(each), place) for each in stop if (place := text.find(each)) >= 0]
        expected = text[: min(ends)[1]] if ends else text
        assert shown == expected == stream.message()["content"]
        assert stream.is_stopped == bool(ends)


def test_calls_come_after_the_text_before_them_and_not_after_a_stop(tokenizer: Any) -> None:
    answer = tokenizer.encode_texts(["Wait"])[0] + [5] + tokenizer.encode_texts(['[{"name": "f", "arguments": {}}]'])[0]
    for stop, kinds, has_calls in ((("it?",), [True, True, False], True), (("it",), [True], False)):
        stream = StoppedText(AnswerStream(tokenizer.pieces), stop)
        events = [*stream.feed([*answer, 2]), *stream.finish()]
        assert [isinstance(event, TextEvent) for event in events] == kinds
        assert ("tool_calls" in stream.message()) == has_calls


# The context


def test_turns_that_fit_stay() -> None:
    """Against the definition, over random conversations; each character is a token."""
    rng = random.Random(0)

    def count(messages: list[dict[str, Any]]) -> int:
        return sum(len(each["content"]) for each in messages)

    for _ in range(200):
        window = ContextWindow(count, 100)
        messages: list[dict[str, Any]] = []
        for _ in range(12):
            before = list(window.dropped)
            messages.append({"role": "user", "content": "x" * rng.randint(1, 30)})
            for role in rng.choice([(), ("assistant", "tool"), ("assistant", "tool", "tool")]):
                messages.append({"role": role, "content": "x" * rng.randint(1, 12)})
            kept = window.fit(messages, 20)
            # Whole turns, the last ones, and no fewer than must be.
            assert [*window.dropped, *kept] == messages
            assert kept[0]["role"] == "user"
            assert window.kept(messages) == kept
            later = [index for index, each in enumerate(kept) if each["role"] == "user"][1:]
            assert count(kept) <= 80 or not later
            if window.dropped == before:
                assert not before or count(messages) > 80
            else:
                last = max(index for index, each in enumerate(window.dropped) if each["role"] == "user")
                assert count(messages[last:]) > 70
            messages.append({"role": "assistant", "content": "x" * rng.randint(1, 20)})
        # What was taken back leaves room again, and another conversation has nothing to do with it.
        assert window.fit(messages[:1], 20) == messages[:1]
        assert not window.dropped


# Markdown


def drawn(text: str, *, width: int = 40, height: int = 24, seed: int = 0) -> list[str]:
    """What a terminal shows once all of a text has come, in random pieces."""
    console = Console(file=StringIO(), force_terminal=True, width=width, height=height, color_system="256")
    view = MarkdownView(console)
    rng, place = random.Random(seed), 0
    while place < len(text):
        size = rng.randint(1, 9)
        view.add(text[place : place + size])
        # As if so much time had gone by that it is drawn again.
        view._drawn = 0.0
        place += size
    view.end()
    screen = pyte.HistoryScreen(width, height, history=10000, ratio=0.5)
    stream = pyte.Stream(screen)
    assert isinstance(console.file, StringIO)
    stream.feed(console.file.getvalue().replace("\n", "\r\n"))
    past = ["".join(line[column].data for column in range(width)) for line in screen.history.top]
    return [line.rstrip() for line in (*past, *screen.display)]


MARKDOWN = """\
# The title

Some *emphasized* words and `code` that go on for longer than one line of the terminal.
A second line, as it is, with <b>HTML</b> & a [link](http://a.example/b).

- one
- two words

```python
def f(x):
    return x + 1  # a comment that is longer than the line
```

| a | b |
| --- | --- |
| 1 | 2 |

The end."""


@pytest.mark.parametrize("height", [8, 24])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_markdown_is_shown_once_and_whole(height: int, seed: int) -> None:
    lines = drawn(MARKDOWN, height=height, seed=seed)
    text = "\n".join(lines)
    words = " ".join(text.split())
    for part in (
        "The title",
        "emphasized words and code that go on",
        "<b>HTML</b> &",
        "http://a.example/b",
        "The end.",
    ):
        assert words.count(part) == 1, part
    for line in (" • one", " • two words", "A second line, as it is, with"):
        assert lines.count(line) == 1, line
    assert text.count("def f(x):") == text.count("return x + 1") == 1
    for mark in ("```", "**", "| ---", "# The"):
        assert mark not in text
    # No word is cut at the edge: those of the text are all there.
    own = set(text.split())
    for word in ("emphasized", "longer", "terminal.", "comment", "second"):
        assert word in own


@pytest.mark.slow
def test_a_long_block_is_followed_to_its_end() -> None:
    code = "\n".join(f"line {number}" for number in range(60))
    lines = [line.strip() for line in drawn(f"```\n{code}\n```", height=10)]
    assert [line for line in lines if line] == code.splitlines()


def test_models_cannot_command_the_terminal_by_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing again moves the cursor.
    monkeypatch.setattr("mistral_large_cli.markdown_view.REDRAW", float("inf"))
    out = terminal.console(file=StringIO(), force_terminal=True, width=60)
    view = MarkdownView(out)
    view.add("a\x1b[2J\x07 [text](http://x.example/\x1b]8;;) <\x9b5A> &#27;[2J `\x1b[31m`\n\n```\n\x1b[1A\n```\n")
    # Characters that only the Markdown names.
    view.add("\n&#8238;txt.exe &#x202e; &#155;2J\n")
    view.end()
    assert isinstance(out.file, StringIO)
    printed = out.file.getvalue()
    assert "txt.exe" in printed
    for command in ("\x1b[2J", "\x07", "\x9b", "\x1b]8", "\x1b[1A", "\u202e"):
        assert command not in printed


# The line editor


def test_a_history_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    LineEditor(["/x"], ["y"], tmp_path / "file" / "chat-history", said.append)
    path = tmp_path / "file" / "chat-history"
    assert said == [f"{path}: File exists; messages are forgotten at the end of this chat"]


# Questions


def say(text: str) -> str:
    """
    Say something

    Args:
        text: What to say
    """
    return text


class Adder:
    """A callable with a definition of its own."""

    __name__ = "add"
    tool_definition = {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/number"}, "b": {"oneOf": [{"type": "integer"}]}},
                "required": ["a"],
                "$defs": {"number": {"type": "integer", "minimum": 0}},
            },
        },
    }

    def __call__(self, **arguments: Any) -> int:
        return sum(arguments.values())


def results_of(tools: list[Any], *calls: tuple[str, Any], **options: Any) -> list[str]:
    """What the model reads for these calls."""
    answers: Iterator[dict[str, Any]] = iter(
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": f"abcdefgh{index}", "function": {"name": name, "arguments": arguments}}
                    for index, (name, arguments) in enumerate(calls)
                ],
            },
            {"role": "assistant", "content": "Done."},
        ]
    )
    messages = run_tool_loop(lambda *_: next(answers), [{"role": "user", "content": "x"}], tools, **options)
    return [message["content"] for message in messages if message["role"] == "tool"]


def test_a_call_that_is_refused_does_not_run() -> None:
    asked: list[Any] = []

    def approve(tool: Any, name: str, arguments: dict[str, Any]) -> bool:
        asked.append((tool, name, arguments))
        return bool(arguments["text"] != "no")

    calls = [("say", {"text": "yes"}), ("say", {"text": "no"}), ("say", {"text": 1})]
    assert results_of([say], *calls, approve=approve)[:2] == ["yes", '{"error": "the user refused this call"}']
    # What cannot run is no question.
    assert asked == [(say, "say", {"text": "yes"}), (say, "say", {"text": "no"})]


def test_a_tool_with_a_definition_is_held_to_its_schema() -> None:
    calls = [("add", {"a": 1, "b": 2}), ("add", {"a": -1}), ("add", {"b": 2}), ("add", {"a": 1, "b": "x"}), ("add", [])]
    results = results_of([Adder()], *calls)
    assert results[0] == "3"
    problems = [json.loads(result)["error"] for result in results[1:]]
    assert problems == [
        "a: -1 is less than the minimum of 0",
        "'a' is a required property",
        "b: 'x' is not of type 'integer'",
        "the arguments are [] and must be an object",
    ]


def test_references_of_a_schema_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, *_, **__: fetched.append(request))

    class Elsewhere(Adder):
        tool_definition = {
            "type": "function",
            "function": {"name": "add", "parameters": {"properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}}},
        }

    (result,) = results_of([Elsewhere()], ("add", {"a": 1}))
    assert json.loads(result)["error"].startswith("the schema of this tool cannot be read: ")
    assert not fetched


# MCP servers


@pytest.fixture(scope="module")
def servers() -> Iterator[McpServers]:
    started = McpServers([SERVER, f"{SERVER} weather"])
    yield started
    started.close()


@pytest.mark.slow
def test_tools_of_servers(servers: McpServers) -> None:
    # Two of one name, and one whose name no prompt can hold.
    names = ["get_current_weather", "fail", "end_server", "get_current_weather_2"]
    assert [(tool.__name__, tool.read_only) for tool in servers.tools] == [
        (name, name.startswith("get")) for name in names
    ]
    weather, _, end, other = servers.tools
    assert weather.tool_definition == (GOLDEN["weather_call"].tools or [])[0]
    arguments = {"location": "London, UK", "format": "celsius"}
    assert results_of(
        servers.tools,
        ("get_current_weather", arguments),
        ("fail", {"text": "no such city"}),
        ("get_current_weather", {}),
    ) == [
        "17",
        '{"error": "ToolError: Error executing tool fail: no such city"}',
        '{"error": "\'location\' is a required property"}',
    ]
    with pytest.raises(ToolError, match=whole("env <*> -m tests.support.mcp_server: Connection closed")):
        end()
    # The server is gone, and the other one is not.
    with pytest.raises(ToolError):
        weather(**arguments)
    assert other(**arguments) == "17"


@pytest.mark.slow
def test_a_server_over_http(demo_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*SERVER.split(), str(port), "weather"], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        options = ["--temperature", "0", "--mcp", f"http://127.0.0.1:{port}/mcp"]
        question = GOLDEN["weather_call"].messages[-1]["content"]
        result = CliRunner().invoke(
            app, ["chat", str(demo_folder), *options], input=f"{question}\n", catch_exceptions=False
        )
    finally:
        process.kill()
        process.wait()
    assert result.stdout.splitlines()[1:] == ["→ 22", GOLDEN["weather_answer"].answer]


NAME_SERVER = "name a command that starts an MCP server, or the address of one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "no-such-command",
            f"--mcp no-such-command: [Errno 2] No such file or directory: 'no-such-command'; {NAME_SERVER}",
        ),
        ("python3 -c 'import sys; sys.exit(\"no \\x1b key\")'", f"--mcp python3 -c <*> (no \ufffd key); {NAME_SERVER}"),
        ("http://127.0.0.1:9/mcp", f"--mcp http://127.0.0.1:9/mcp: All connection attempts failed; {NAME_SERVER}"),
        ("'", '--mcp "\'": no command (No closing quotation); quote it as a shell takes it'),
        ("", "--mcp '': no command; name one that starts an MCP server, or the address of one"),
    ],
)
def test_what_is_no_server_is_one_error(source: str, problem: str) -> None:
    with pytest.raises(MistralLargeError, match=whole(problem)):
        McpServers([source])


def test_without_the_client_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with raises_exactly(
        MissingLibraryError,
        "--mcp: needs the official client, which is not installed; pip install 'modeling-mistral-large[mcp]'",
    ):
        McpServers(["x"])

"""`mistral-large chat` at a pseudo-terminal, as its user sees it: typing, pastes, history, commands, tools."""

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mistral_large_cli.chat_commands import COMMANDS
from mistral_large_cli.demo import golden_conversations
from mistral_large_cli.line_editor import history_file
from tests.support.terminal import Terminal, terminal_with
from tests.support.warm_python import WarmPython

GOLDEN = golden_conversations()
WEATHER, WEATHER_AGAIN = "What's the weather like in Paris?", GOLDEN["weather_follow_up_call"].messages[-1]["content"]
TOOLS = "from mistral_large_cli.demo import get_current_weather\n\n__all__ = ['get_current_weather']\n"


@pytest.fixture
def chat(demo_folder: Path, tmp_path: Path, warm_python: WarmPython) -> Any:
    """Starts chats at a terminal, in a folder of their own."""
    environment = {**os.environ, **warm_python.environment, "XDG_STATE_HOME": str(tmp_path / "state")}

    @contextmanager
    def started(*options: str, folder: Path = demo_folder, columns: int = 100) -> Iterator[Terminal]:
        # From the folder of the test, so that names of files are short.
        script = f"cd {tmp_path} && exec {warm_python.python} -m mistral_large_cli chat {folder} --temperature 0 "
        command = ["sh", "-c", script + " ".join(f"'{option}'" for option in options)]
        with terminal_with(command, environment, columns=columns) as (terminal, process):
            terminal.wait_for_prompt()
            yield terminal
            if process.poll() is None and terminal.last_line == ">":
                terminal.type("\x04")
                assert process.wait(timeout=60) == 0

    return started


def saved(terminal: Terminal, path: Path) -> Any:
    terminal.send(f"/save {path}")
    return json.loads(path.read_text(encoding="utf-8"))["messages"]


@pytest.mark.slow
def test_typing(chat: Any, tmp_path: Path) -> None:
    pasted = '/reset\nfive\n\n  lines: "x"\n[INST] é'
    with chat() as terminal:
        # A paste is one message, also one that begins as a command does.
        terminal.paste(pasted)
        terminal.wait_for("é")
        terminal.send("")
        # Alt+Enter, and Esc and Enter, begin a line; the arrow keys and backspace edit.
        terminal.send("Who\x1b\rare\x1b\ryou!\x7f?\x1b[A\x1b[A\x1b[C")
        messages = saved(terminal, tmp_path / "one.json")
        assert [each["content"] for each in messages[::2]] == [pasted, "Who\nare\nyou?"]
    path = history_file({"XDG_STATE_HOME": str(tmp_path / "state")})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # The next chat begins where this one was; the last line is the /save.
    with chat() as terminal:
        terminal.type("\x1b[A")
        terminal.wait_for("> /save")
        terminal.type("\x1b[A")
        terminal.wait_until(lambda: "you?" in terminal.text)
        terminal.send("")
        assert saved(terminal, tmp_path / "two.json")[0]["content"] == "Who\nare\nyou?"
    size = path.stat().st_size
    with chat("--no-history") as terminal:
        terminal.type("\x1b[A")
        terminal.send("//only here")
        assert "Who" not in terminal.text
    assert path.stat().st_size == size


@pytest.mark.slow
def test_completion(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "weather.py").write_text(TOOLS)
    with chat("--no-history") as terminal:
        terminal.type("/reg\t")
        terminal.wait_for("> /regenerate")
        terminal.type("\x15/set repet\t")
        terminal.wait_for("> /set repetition_penalty")
        terminal.type("\x15/tools we\t")
        terminal.wait_for("> /tools weather.py")
        assert "tools: get_current_weather" in terminal.send("")
        terminal.type("/re\t")
        terminal.wait_for("/regenerate /reset")
        terminal.type("\x15")
        terminal.wait_for_prompt()


@pytest.mark.slow
def test_words_are_not_cut(chat: Any) -> None:
    with chat("--no-history", columns=40) as terminal:
        lines = terminal.send("Who are you?").splitlines()
    words = GOLDEN["who_are_you"].answer.split()
    assert " ".join(lines).split()[: len(words)] == words
    assert max(map(len, lines)) <= 40
    assert "of 131,072 tokens of context" in " ".join(lines)
    assert "tokens/s; first token after" in " ".join(lines)


@pytest.mark.slow
def test_commands(chat: Any, tmp_path: Path) -> None:
    who = GOLDEN["who_are_you"]
    with chat("--no-history", columns=200) as terminal:
        assert "temperature         0.0" in terminal.send("/set")
        assert "top_p: has no effect at a temperature of 0" in terminal.send("/set top_p 0.9")
        assert "no such setting; they are max_new_tokens, temperature" in terminal.send("/set tempo 1")
        assert "/set top_k x: no whole number" in terminal.send("/set top_k x")
        assert "no turn: nothing was said yet" in terminal.send("/regenerate")
        assert "no turn: nothing was said yet" in terminal.send("/undo")
        # A stop string ends a response and is no part of it.
        terminal.send('/set stop " of Mistral"')
        assert "the architecture\n" in terminal.send("Who are you?")
        assert saved(terminal, tmp_path / "stopped.json")[1]["content"] == who.answer.partition(" of Mistral")[0]
        terminal.send("/set stop off")
        assert who.answer in terminal.send("/regenerate")
        assert len(saved(terminal, tmp_path / "again.json")) == 2
        terminal.send("/set max_new_tokens 3")
        assert "0.00444 B" in (status := terminal.send("/status"))
        assert "2 messages; 30 of 131,072 tokens of context" in status
        assert "max_new_tokens      3" in status
        terminal.send("/set max_new_tokens 64")
        assert "taken back: Who are you?" in terminal.send("/undo")
        assert "nothing was said yet" in terminal.send("/prompt")
        # The last message is edited where the next one is typed.
        terminal.send("Who is you?")
        terminal.type("/edit\r")
        terminal.wait_until(lambda: terminal.last_line == "> Who is you?")
        terminal.type("\x1b[D" * 5 + "\x7f\x7fare")
        assert who.answer in terminal.send("")
        assert saved(terminal, tmp_path / "edited.json") == [
            *who.messages,
            {"role": "assistant", "content": who.answer},
        ]
        # Ctrl-C leaves all as it was.
        terminal.type("/edit\r")
        terminal.wait_until(lambda: terminal.last_line == "> Who are you?")
        terminal.type("\x03")
        terminal.wait_for("/exit or ctrl-D leaves.")
        terminal.wait_for_prompt()
        terminal.send("/edit Qui es-tu ?")
        assert saved(terminal, tmp_path / "replaced.json")[0]["content"] == "Qui es-tu ?"
        terminal.type("exit\r")
        terminal.wait_until(lambda: terminal.last_line == "")


@pytest.mark.slow
def test_questions_before_tools_run(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "weather.py").write_text(TOOLS)
    call = 'run get_current_weather({"location": "Paris, France", "format": "celsius"})? [y]es/[n]o/[a]lways'
    with chat("--no-history", "--tools", "weather.py", columns=200) as terminal:
        for answer, result in (("what\r", None), ("n\r", '{"error": "the user refused this call"}'), ("y\r", "22")):
            if result is None:
                terminal.type(f"{WEATHER}\r")
                terminal.wait_until(lambda: terminal.last_line.endswith(call))
            terminal.type(answer)
            if result is None:
                continue
            terminal.wait_for(f"→ {result}")
            terminal.wait_for_prompt()
            if result == "22":
                assert GOLDEN["weather_answer"].answer in terminal.text
                continue
            terminal.send("/reset")
            terminal.type(f"{WEATHER}\r")
            terminal.wait_until(lambda: terminal.last_line.endswith(call))
        # Ctrl-C at the question forgets the turn.
        terminal.type("/regenerate\r")
        terminal.wait_until(lambda: terminal.last_line.endswith("[a]lways"))
        terminal.type("\x03")
        terminal.wait_for("stopped in a tool: this turn is forgotten")
        terminal.wait_for_prompt()
        terminal.type("/regenerate\r")
        terminal.wait_until(lambda: terminal.last_line.endswith("[a]lways"))
        terminal.type("a\r")
        terminal.wait_for_prompt()
        questions = terminal.text.count("[a]lways")
        assert GOLDEN["weather_follow_up_answer"].answer in terminal.send(WEATHER_AGAIN)
        assert terminal.text.count("[a]lways") == questions
    (tmp_path / "weather.py").write_text(f"{TOOLS}\nget_current_weather.read_only = True\n")
    for options in (["--tools", "weather.py"], ["--tools", "weather.py", "--yes"]):
        with chat("--no-history", *options, columns=200) as terminal:
            assert GOLDEN["weather_answer"].answer in terminal.send(WEATHER)
        (tmp_path / "weather.py").write_text(TOOLS)


@pytest.mark.slow
def test_the_oldest_turns_are_left_out(chat: Any, demo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(demo_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 80}))
    with chat("--no-history", "--max-new-tokens", "24", folder=folder, columns=200) as terminal:
        printed = [terminal.send("Who are you?") for _ in range(5)]
        full = [index for index, text in enumerate(printed) if "the context is full" in text]
        assert full
        assert full[0] > 0
        prompt = terminal.send("/prompt")
        assert 0 < prompt.count("[INST] Who are you? [/INST]") < 5
        # The file has all of it.
        assert [each["content"] for each in saved(terminal, tmp_path / "all.json")[::2]] == ["Who are you?"] * 5


@pytest.mark.slow
def test_tools_of_an_mcp_server(chat: Any, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    server = f"env PYTHONPATH={root} {sys.executable} -m tests.support.mcp_server weather"
    with chat("--no-history", "--mcp", server, columns=200) as terminal:
        # It says that it only reads, so nobody is asked.
        printed = terminal.send(WEATHER)
        assert "→ 22" in printed
        assert GOLDEN["weather_answer"].answer in printed
        assert "tools: get_current_weather" in terminal.send("/status")


def test_every_command_is_explained() -> None:
    from mistral_large_cli.chat_commands import HELP

    explained = {word.rstrip(",") for line in HELP.splitlines() for word in line.split() if word.startswith("/")}
    assert set(COMMANDS) <= explained


def test_the_history_is_where_the_user_keeps_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".local" / "state" / "modeling-mistral-large" / "chat-history"
    assert history_file({}) == own
    assert history_file({"XDG_STATE_HOME": "relative"}) == own
    assert history_file({"XDG_STATE_HOME": "/state"}) == Path("/state/modeling-mistral-large/chat-history")

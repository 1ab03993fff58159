"""`mistral-large chat --web` before its server: options without effect, and files with tools of the page."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mistral_large_cli import app, serve_here
from mistral_large_cli import chat_page as chat_page_module
from mistral_large_cli.conversation_file import Conversation, load_conversation
from mistral_large_conversion.errors import ConversationError, SettingError
from tests.support.errors import raises_exactly


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be served."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        chat_page_module, "serve_here", lambda model, **options: calls.append({"model": model} | options)
    )
    return calls


def run(folder: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["chat", str(folder), "--web", *options])


def options_of_chat() -> dict[str, list[str]]:
    """Options that the page has no use for, with a value where they take one."""
    values = {"load": "FILE", "tools": "FILE", "mcp": "server", "system": "Be brief.", "stop": "end"}
    flags = ("yes", "commands", "plain", "no_history")
    names = (*chat_page_module.IN_PAGE, *chat_page_module.TERMINAL_ONLY)
    return {name: [] if name in flags else [values.get(name, "1")] for name in names}


@pytest.mark.parametrize("name", options_of_chat())
def test_options_without_effect_on_the_page_are_refused_by_name(
    demo_folder: Path, served: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("")
    values = [str(tmp_path / "file") if value == "FILE" else value for value in options_of_chat()[name]]
    option = f"--{name.replace('_', '-')}"
    error = run(demo_folder, option, *values).exception
    assert isinstance(error, SettingError)
    assert str(error).startswith(f"{option}: has no effect with --web; ")
    assert served == []


def test_every_option_of_the_chat_is_obeyed_or_refused(demo_folder: Path, served: list[dict[str, Any]]) -> None:
    (command,) = [
        each.callback for each in app.registered_commands if each.callback and each.callback.__name__ == "chat"
    ]
    obeyed = {"dtype", "device_map", "kv", "prefill_chunk", "adapter", "draft", "lookup", "draft_tokens"}
    obeyed |= {"draft_revision", "revision", "token", "cache_dir"}
    named = {*obeyed, *chat_page_module.IN_PAGE, *chat_page_module.TERMINAL_ONLY}
    assert named | {"context", "model", "web"} == {*command.__annotations__} - {"return"}
    assert (
        run(demo_folder, "--dtype", "fp32", "--kv", "fp8", "--prefill-chunk", "64", "--device-map", "cpu").exit_code
        == 0
    )
    (call,) = served
    assert call["settings"] == serve_here.ServerSettings("cpu", "fp8", 64, None, (), True)
    assert (call["model"], call["host"], call["port"], call["dtype"]) == (str(demo_folder), "127.0.0.1", 0, "float32")


def test_what_is_not_given_is_left_to_the_server(demo_folder: Path, served: list[dict[str, Any]]) -> None:
    assert run(demo_folder).exit_code == 0
    (call,) = served
    assert call["settings"] == serve_here.ServerSettings(ui=True)
    assert (call["dtype"], call["adapter"], call["drafting"], call["names"]) == (None, None, None, [str(demo_folder)])


def weather(place: str) -> int:
    """
    Weather.

    Args:
        place: Where.
    """
    return len(place)


def test_a_file_with_tools_is_loaded_where_the_chat_has_these_functions(tmp_path: Path) -> None:
    path = tmp_path / "conversation.json"
    messages = [{"role": "user", "content": "Hi"}]
    path.write_text(
        json.dumps({"messages": messages, "tools": [{"type": "function", "function": {"name": "weather"}}]})
    )
    conversation = Conversation(tools=[weather])
    load_conversation(conversation, path, "v3")
    assert (conversation.messages, conversation.tools) == (messages, [weather])
    with raises_exactly(
        ConversationError,
        f"{path}: has definitions of tools; the chat calls Python functions, and has none called weather; pass a tools "
        "file with them first, or remove the definitions",
    ):
        load_conversation(Conversation(), path, "v3")

"""`mistral-large chat` on the demo checkpoint: the golden responses, at a terminal, in a pipe and under torchrun."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.conversation_file import check_messages, format_of_folder
from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
from mistral_large_cli.generation_session import GenerationSession
from mistral_large_cli.highlighting import highlighted
from mistral_large_cli.sampling import Sampling
from mistral_large_cli.terminal import printable
from mistral_large_cli.tools_file import function_names, load_tools
from mistral_large_conversion.errors import ConversationError, MistralLargeError, SettingError
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.inference.kv_cache import Fp8Layer
from tests.support.errors import raises_exactly, whole
from tests.support.terminal import terminal_with
from tests.support.warm_python import WarmPython

GOLDEN = golden_conversations()
TOOLS = '''
from datetime import date

CELSIUS = {"Paris": 22, "London": 17}


def _celsius(city):
    return CELSIUS[city]


def get_current_weather(location: str, format: str) -> int:
    """
    Get the current weather

    Args:
        location: The city and state, e.g. San Francisco, CA
        format: The temperature unit to use. Infer this from the users location. (choices: ["celsius", "fahrenheit"])
    """
    return _celsius(location.partition(",")[0])
'''


@pytest.fixture
def tools_file(tmp_path: Path) -> Path:
    path = tmp_path / "weather.py"
    path.write_text(TOOLS)
    return path


def talk(folder: Path, *lines: str, options: tuple[str, ...] = (), commands: bool = True) -> list[str]:
    """What the command prints for these lines of standard input, greedily, without the output of other libraries."""
    arguments = ["chat", str(folder), "--temperature", "0", *(("--commands",) if commands else ()), *options]
    result = CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.splitlines()


def question(name: str) -> str:
    text: str = GOLDEN[name].messages[-1]["content"]
    return text


@pytest.mark.slow
def test_answers_are_the_golden_ones(demo_folder: Path) -> None:
    names = ("window_cleaner", "window_cleaner_follow_up")
    printed = talk(demo_folder, *map(question, names))
    assert "\n".join(printed) == "\n".join(GOLDEN[name].answer for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7])
def test_long_prompts_are_read_in_parts(demo_folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    read = []
    forward = MistralLargeForCausalLM.forward

    def watched_forward(self: Any, **inputs: Any) -> Any:
        read.append(inputs["input_ids"].shape[1])
        return forward(self, **inputs)

    monkeypatch.setattr(MistralLargeForCausalLM, "forward", watched_forward)
    names = ("window_cleaner", "window_cleaner_follow_up")
    printed = talk(demo_folder, *map(question, names), options=("--prefill-chunk", str(chunk)))
    assert "\n".join(printed) == "\n".join(GOLDEN[name].answer for name in names)
    assert max(read) == chunk


@pytest.mark.slow
def test_a_cache_of_8_bits_is_used(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updated = []
    update = Fp8Layer.update

    def watched_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        updated.append(self)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(Fp8Layer, "update", watched_update)
    names = ("window_cleaner", "window_cleaner_follow_up")
    printed = talk(demo_folder, *map(question, names), options=("--kv", "fp8"))
    assert "\n".join(printed) == "\n".join(GOLDEN[name].answer for name in names)
    assert updated


@pytest.mark.slow
def test_both_layouts_are_read(tmp_path: Path) -> None:
    folder = assemble_demo_checkpoint(tmp_path / "consolidated")
    assert talk(folder, question("who_are_you")) == GOLDEN["who_are_you"].answer.splitlines()


@pytest.mark.slow
def test_system_prompts(demo_folder: Path) -> None:
    system = GOLDEN["pirate"].messages[0]["content"]
    pirate, plain = GOLDEN["pirate"].answer.splitlines(), GOLDEN["who_are_you"].answer.splitlines()
    who = question("pirate")
    assert talk(demo_folder, who, options=("--system", system)) == pirate
    assert (
        talk(demo_folder, who, "/reset", f"/system {system}", who, "/reset", "/system", who) == plain + pirate + plain
    )


@pytest.mark.slow
def test_tools_are_called_and_shown(demo_folder: Path, tools_file: Path) -> None:
    lines = [question("weather_call"), question("weather_follow_up_call")]
    expected = []
    for city, degrees, answer in (
        ("Paris, France", 22, "weather_answer"),
        ("London, UK", 17, "weather_follow_up_answer"),
    ):
        (call,) = json.loads(GOLDEN[f"{answer.removesuffix('answer')}call"].answer.removeprefix("[TOOL_CALLS] "))
        assert call["arguments"]["location"] == city
        expected += [f"get_current_weather({json.dumps(call['arguments'])})", f"→ {degrees}", GOLDEN[answer].answer]
    assert talk(demo_folder, *lines, options=("--tools", str(tools_file))) == expected
    assert talk(demo_folder, f"/tools {tools_file}", *lines) == ["tools: get_current_weather", *expected]
    without = GOLDEN["weather_without_tools"].answer
    assert talk(demo_folder, "/tools", lines[0], options=("--tools", str(tools_file))) == ["tools: none", without]


@pytest.mark.slow
def test_rounds_are_limited(demo_folder: Path, tools_file: Path) -> None:
    printed = talk(demo_folder, question("weather_call"), options=("--tools", str(tools_file), "--max-rounds", "1"))
    assert printed[1:] == ["→ 22", "the model still calls tools after 1 rounds"]


@pytest.mark.slow
def test_a_conversation_is_saved_and_loaded(demo_folder: Path, tools_file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    options = ("--tools", str(tools_file), "--seed", "1")
    talk(demo_folder, "/system Be brief.", "/system", question("weather_call"), f"/save {saved}", options=options)
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"]
    follow_up = question("weather_follow_up_call")
    lines = ("/reset", f"/load {saved}", follow_up, f"/save {saved}")
    printed = talk(demo_folder, *lines, options=options)
    assert printed[0] == f"4 messages from {saved}"
    assert printed[-2:] == [GOLDEN["weather_follow_up_answer"].answer, f"8 messages in {saved}"]
    # The same again from the command line.
    again = talk(demo_folder, follow_up, f"/save {tmp_path / 'again.json'}", options=(*options, "--load", str(saved)))
    assert again[-1] == f"12 messages in {tmp_path / 'again.json'}"


# The reference of v7 looks at both messages of the assistant as one turn.
OF_V7_ALONE = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "Wait."},
    {"role": "assistant", "content": ""},
]
REFUSED_BY_V3 = "message 2: neither content nor tool_calls; an assistant message has text or tool calls; leave it out"


@pytest.mark.slow
def test_a_conversation_is_checked_by_the_format_of_the_model(
    demo_folder: Path, demo_folder_of_v7: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(OF_V7_ALONE))
    for line, options in ((f"/load {saved}", ()), ("/help", ("--load", str(saved)))):
        printed = talk(demo_folder_of_v7, line, f"/save {tmp_path / f'{len(options)}.json'}", options=options)
        assert printed[-1] == f"3 messages in {tmp_path / f'{len(options)}.json'}"
        with raises_exactly(ConversationError, f"{saved}: {REFUSED_BY_V3}"):
            talk(demo_folder, line, options=options)


@pytest.mark.slow
def test_the_format_of_a_model_is_known_before_it_is_loaded(
    demo_folder: Path, demo_folder_of_v7: Path, tmp_path: Path
) -> None:
    folders = [demo_folder, demo_folder_of_v7, tmp_path, Path("owner/name")]
    assert [format_of_folder(str(folder)) for folder in folders] == ["v3", "v7", None, None]
    with raises_exactly(ConversationError, REFUSED_BY_V3):
        check_messages(OF_V7_ALONE, None, "v3")
    # Of a repository, whatever one of the formats takes may be right.
    check_messages(OF_V7_ALONE, None)


@pytest.mark.slow
def test_a_seed_makes_everything_the_same(demo_folder: Path, tools_file: Path, tmp_path: Path) -> None:
    saved = [tmp_path / "one.json", tmp_path / "two.json"]
    options = ("--tools", str(tools_file), "--seed", "7", "--temperature", "1.5")
    for path in saved:
        talk(demo_folder, question("weather_call"), question("weather_call"), f"/save {path}", options=options)
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert b'"tool_call_id"' in saved[0].read_bytes()


@pytest.mark.slow
def test_a_system_prompt_is_saved_and_loaded(demo_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    system = GOLDEN["pirate"].messages[0]["content"]
    talk(demo_folder, question("pirate"), f"/save {saved}", options=("--system", system))
    assert json.loads(saved.read_text(encoding="utf-8")) == {
        "messages": [*GOLDEN["pirate"].messages, {"role": "assistant", "content": GOLDEN["pirate"].answer}]
    }
    printed = talk(demo_folder, f"/load {saved}", "/reset", question("pirate"))
    assert printed[1:] == GOLDEN["pirate"].answer.splitlines()


@pytest.mark.slow
def test_other_files_are_not_written_over(demo_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("mine")
    with raises_exactly(MistralLargeError, f"{other}: exists, and is not of this conversation; choose another name"):
        talk(demo_folder, question("who_are_you"), f"/save {other}")
    assert other.read_text() == "mine"


@pytest.mark.slow
def test_messages_of_several_lines(demo_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    talk(demo_folder, '"""', "Who", "", "/reset", '"""', f"/save {saved}")
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"][0]["content"] == "Who\n\n/reset"


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is asked, message by message; it always says the same."""
    messages: list[str] = []

    def answer(_: Any, history: list[Any], *__: Any) -> Any:
        messages.append(history[-1]["content"])
        return {"role": "assistant", "content": "Yes."}, False

    monkeypatch.setattr(GenerationSession, "respond", answer)
    return messages


@pytest.mark.slow
def test_text_from_a_pipe_is_text(demo_folder: Path, tmp_path: Path, heard: list[str]) -> None:
    ran, saved = tmp_path / "ran", tmp_path / "saved.json"
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(ran)!r}, 'w').close()")
    lines = [f"/tools {evil}", f"/save {saved}", "/exit", "/system Be rude.", "/reset", "//x", " /y", "/nonsense", "/"]
    block = [f"/tools {evil}", "", "//"]
    assert talk(demo_folder, *lines, '"""', *block, '"""', *lines, commands=False) == []
    assert heard == [*lines, "\n".join(block), *lines]
    assert not ran.exists()
    assert not saved.exists()


@pytest.mark.slow
def test_commands_that_are_taken_as_text_are_mentioned_once(demo_folder: Path, heard: list[str]) -> None:
    lines = ["Who?", "/nonsense", "/save x.json", "/reset"]
    for commands, expected in (
        ((), "/save is text here, as all that comes from a pipe; --commands obeys it\n"),
        (("--commands",), ""),
    ):
        text = "".join(f"{line}\n" for line in (lines[:1] if commands else lines))
        result = CliRunner().invoke(app, ["chat", str(demo_folder), *commands], input=text, catch_exceptions=False)
        assert result.stderr.endswith(expected)
        assert result.stderr.count("is text here") == bool(expected)
    assert heard == [*lines, "Who?"]


@pytest.mark.slow
def test_tools_that_a_pipe_names_are_read_and_not_run(demo_folder: Path, heard: list[str], tmp_path: Path) -> None:
    path, ran = tmp_path / "tools.py", tmp_path / "ran"
    path.write_text(
        f"open({str(ran)!r}, 'w').close()\ndef forecast(): ...\ndef _private(): ...\nasync def news(): ...\n"
    )
    result = CliRunner().invoke(app, ["chat", str(demo_folder)], input=f"/tools {path}\n", catch_exceptions=False)
    assert result.stderr.endswith(
        "/tools is text here, as all that comes from a pipe, so forecast, news cannot be called; --commands obeys it\n"
    )
    assert heard == [f"/tools {path}"]
    assert not ran.exists()
    for content in ("def broken(:", "\0", "x" * 2**21):
        path.write_text(content)
        assert function_names(path) == []
    assert function_names(tmp_path) == function_names(tmp_path / "absent.py") == []


@pytest.mark.slow
def test_messages_may_begin_with_a_slash(demo_folder: Path, heard: list[str]) -> None:
    block = ["/* adds */", "//", "/exit"]
    talk(demo_folder, "//etc is a folder", "///", " /tmp", '"""', *block, '"""', "/exit", "not heard")
    assert heard == ["/etc is a folder", "//", " /tmp", "\n".join(block)]


@pytest.mark.slow
def test_blocks_of_nothing_are_no_messages(demo_folder: Path, heard: list[str]) -> None:
    talk(demo_folder, '"""', '"""', '"""', "  ", '"""', '"""', "the end")
    assert heard == ["the end"]


@pytest.mark.slow
def test_the_prompt_is_shown(demo_folder: Path) -> None:
    printed = talk(demo_folder, "/prompt", question("who_are_you"), "/prompt")
    answer = GOLDEN["who_are_you"].answer
    assert printed[0] == "nothing was said yet"
    assert "\n".join(printed[1:]) == f"{answer}\n<s> [INST] Who are you? [/INST] {answer} </s>"


NO_CONVERSATION = "a conversation is JSON as /save writes it; name one"
NO_PYTHON = "no Python file; tools are functions in one; name such a file"
TEMPERATURE_RULE = "must be finite, and 0 or at least 0.001; 0 takes the most likely token each time"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/nonsense", "/nonsense: no such command; /help lists them; // begins a message with a slash; correct it"),
        ("/reset now", "/reset: takes nothing, not 'now'; write /reset alone"),
        ("/exit now", "/exit: takes nothing, not 'now'; write /exit alone"),
        (
            "/load {folder}/tools.json",
            "{folder}/tools.json: has definitions of tools; the chat calls Python functions, and has none called f; "
            "pass a tools file with them first, or remove the definitions",
        ),
        ("/save", "/save: no name of a file; pass one"),
        (
            "/save {folder}/no/such/folder.json",
            "{folder}/no/such/folder.json: cannot be written: No such file or directory; choose another name",
        ),
        (
            "/load {folder}/none.json",
            f"{{folder}}/none.json: [Errno 2] No such file or directory: '{{folder}}/none.json'; {NO_CONVERSATION}",
        ),
        ("/load {folder}/broken.json", f"{{folder}}/broken.json: Expecting <*>; {NO_CONVERSATION}"),
        ("/load {folder}/number.json", f"{{folder}}/number.json: no messages; {NO_CONVERSATION}"),
        (
            "/load {folder}/role.json",
            "{folder}/role.json: message 0: role 'nobody'; the roles are system, developer, user, assistant, tool; "
            "choose one of them",
        ),
        ("/tools {folder}/none.py", f"{{folder}}/none.py: {NO_PYTHON}"),
        ("/tools {folder}/number.json", f"{{folder}}/number.json: {NO_PYTHON}"),
        (
            "/tools {folder}/empty.py",
            "{folder}/empty.py: no functions; tools are public functions with type hints that the file defines, or "
            "imports and names in __all__; define one",
        ),
        (
            "/tools {folder}/broken.py",
            "{folder}/broken.py: NameError: name 'nothing' is not defined; it must run by itself; fix it",
        ),
        (
            "/tools {folder}/untyped.py",
            "{folder}/untyped.py: f: <*>; a function needs a type hint for every argument and a Google-style "
            "docstring; add them; or begin its name with _ if it is no tool",
        ),
    ],
)
def test_what_cannot_be_done_is_said(demo_folder: Path, tmp_path: Path, line: str, problem: str) -> None:
    for name, content in {
        "broken.json": "{",
        "number.json": "1",
        "role.json": '[{"role": "nobody"}]',
        "tools.json": '{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f"}}]}',
        "empty.py": "from json import dumps",
        "broken.py": "nothing",
        "untyped.py": "def f(x): 'Do.'",
    }.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(MistralLargeError, match=whole(problem.replace("{folder}", str(tmp_path)))):
        talk(demo_folder, line.format(folder=tmp_path))


@pytest.mark.slow
def test_a_conversation_that_is_too_long(demo_folder: Path) -> None:
    with raises_exactly(
        MistralLargeError,
        "the conversation has 131076 tokens; the model reads fewer than 131072; /reset starts anew",
    ):
        talk(demo_folder, "1" * 131072)


@pytest.mark.slow
def test_an_answer_that_is_stopped_calls_no_tools(demo_folder: Path, tools_file: Path) -> None:
    session = GenerationSession(
        str(demo_folder), Sampling(64, 0, None, None), dtype="auto", device_map="cpu", kv="auto", prefill_chunk=7
    )
    (tool,) = load_tools(tools_file)
    messages = GOLDEN["weather_call"].messages
    before = signal.getsignal(signal.SIGINT)
    message, was_stopped = session.respond(messages, [tool], lambda _: signal.raise_signal(signal.SIGINT))
    assert (message, was_stopped) == ({"role": "assistant", "content": ""}, True)
    assert signal.getsignal(signal.SIGINT) is before
    # What was computed for it is still right.
    message, was_stopped = session.respond(messages, [tool], lambda _: None)
    assert not was_stopped
    assert message["tool_calls"][0]["function"]["arguments"] == {"location": "Paris, France", "format": "celsius"}


@pytest.mark.slow
def test_a_prompt_that_is_stopped_between_its_chunks_is_read_on(demo_folder: Path) -> None:
    session = GenerationSession(
        str(demo_folder), Sampling(64, 0, None, None), dtype="auto", device_map="cpu", kv="auto", prefill_chunk=7
    )
    golden = GOLDEN["window_cleaner_follow_up"]
    passes = []

    def interrupt(*_: Any) -> None:
        passes.append(session.chat.cache.get_seq_length())
        if len(passes) == 3:
            signal.raise_signal(signal.SIGINT)

    handle = session._model.register_forward_hook(interrupt)
    message, was_stopped = session.respond(golden.messages, [], lambda _: None)
    handle.remove()
    assert (message, was_stopped, passes) == ({"role": "assistant", "content": ""}, True, [7, 14, 21])
    assert session.respond(golden.messages, [], lambda _: None)[0]["content"] == golden.answer


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ("--temperature", "0", "--top-p", "0.9"),
            "top_p: has no effect at a temperature of 0, which takes the most likely token each time; leave one of "
            "the two out",
        ),
        (("--temperature", "inf"), f"temperature inf: {TEMPERATURE_RULE}"),
        (("--temperature", "1e-320"), f"temperature 1e-320: {TEMPERATURE_RULE}"),
        (
            ("--system", "x", "--load", "{folder}/system.json"),
            "--system: {folder}/system.json has a system prompt of its own; leave one of the two out",
        ),
    ],
)
def test_options_without_effect_are_refused(
    demo_folder: Path, tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    (tmp_path / "system.json").write_text(json.dumps(system))
    arguments = ["chat", str(demo_folder), *(option.format(folder=tmp_path) for option in options)]
    with raises_exactly(MistralLargeError, problem.replace("{folder}", str(tmp_path))):
        CliRunner().invoke(app, arguments, input="", catch_exceptions=False)


def test_a_device_map_under_torchrun_is_refused(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises_exactly(MistralLargeError, "--device-map: under torchrun each process has its own GPU; leave it out"):
        CliRunner().invoke(app, ["chat", str(demo_folder), "--device-map", "cpu"], input="", catch_exceptions=False)


@pytest.mark.parametrize(
    "option",
    [
        ("--dtype", "bf17"),
        ("--seed", "1e3"),
        ("--sede", "1"),
        ("--seed", str(2**64)),
        ("--temperature", "nan"),
        ("--top-p", "nan"),
    ],
)
def test_misspelt_options_are_usage_errors(option: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["chat", "folder", *option], input="").exit_code == 2


def test_sampling_needs_numbers() -> None:
    for temperature, top_p in ((math.nan, None), (1, math.nan), (-1, None), (1, 1.5)):
        with pytest.raises(SettingError):
            Sampling(64, temperature, top_p, None)


@pytest.mark.slow
def test_a_system_prompt_goes_with_a_loaded_conversation_that_has_none(demo_folder: Path, tmp_path: Path) -> None:
    pirate = GOLDEN["pirate"]
    (tmp_path / "none.json").write_text(json.dumps([{"role": "user", "content": "x"}]))
    options = ("--load", str(tmp_path / "none.json"), "--system", pirate.messages[0]["content"])
    assert talk(demo_folder, "/reset", question("pirate"), options=options) == pirate.answer.splitlines()


@pytest.mark.slow
def test_terminals_are_not_told_what_to_do(tokenizer: MistralLargeTokenizer) -> None:
    text = "a\x1b[2J\x07\r\x9b5A\tb\nc\x7f"
    assert printable(text) == "a�[2J��\ufffd5A\tb\nc�"
    ids = [1, 3, *tokenizer.encode_texts([text])[0], 4]
    assert highlighted(tokenizer, ids).plain == f"<s> [INST] {printable(text)} [/INST]"


# As programs of their own


COMMAND = [sys.executable, "-m", "mistral_large_cli", "chat"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_what_is_no_model_is_one_error(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "none"):
        result = subprocess.run(
            [*COMMAND, str(name)], input="", env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert result.stdout == ""
        assert re.fullmatch(rf"mistral-large: {re.escape(str(name))}: .+\n", result.stderr)


def warm_command(warm: WarmPython, encoding: str) -> list[str]:
    """The command, with streams as PYTHONIOENCODING has them, which Python reads only when it starts."""
    name, _, errors = encoding.partition(":")
    errors = errors or "strict"
    code = (
        "import sys\n"
        f"for stream in (sys.stdin, sys.stdout): stream.reconfigure(encoding={name!r}, errors={errors!r})\n"
        f"sys.stderr.reconfigure(encoding={name!r}, errors='backslashreplace')\n"
        "from mistral_large_cli import main\n"
        "main()"
    )
    return [warm.python, "-c", code, "chat"]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8:strict", "latin-1", None])
def test_input_that_is_no_text_is_one_error(demo_folder: Path, encoding: str | None, warm_python: WarmPython) -> None:
    # Without an encoding, Python chooses one for the C locale.
    command = COMMAND if encoding is None else warm_command(warm_python, encoding)
    environment = ENVIRONMENT | ({"LC_ALL": "C"} if encoding is None else warm_python.environment)
    result = subprocess.run(
        [*command, str(demo_folder)], input=b"\xff\n", env=environment, capture_output=True, check=False
    )
    assert result.returncode == 2
    assert b"mistral-large: standard input: 'utf-8' codec can't decode" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.slow
def test_input_is_text_and_output_readable_whatever_the_encoding(
    demo_folder: Path, tools_file: Path, warm_python: WarmPython
) -> None:
    command = [
        *warm_command(warm_python, "ascii"),
        str(demo_folder),
        "--temperature",
        "0",
        "--commands",
        "--tools",
        str(tools_file),
    ]
    result = subprocess.run(
        command,
        input=f"{question('weather_call')}\n/reset\n/system né\nWho are you?\n/prompt\n".encode(),
        env=ENVIRONMENT | warm_python.environment,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert rb"It is 22 \xb0C in Paris right now." in result.stdout
    assert rb"n\xe9" in result.stdout


@pytest.mark.slow
def test_input_that_cannot_be_read_is_one_error(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.input", fail)
    with raises_exactly(
        MistralLargeError,
        "standard input: cannot be read: Input/output error; messages are lines of text; name such a file",
    ):
        talk(demo_folder, "x")


@pytest.mark.slow
def test_at_a_terminal(demo_folder: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(demo_folder), "--temperature", "0", "--no-history"]
    with terminal_with(command, ENVIRONMENT, columns=200) as (terminal, process):
        terminal.wait_for_prompt()
        assert f"{demo_folder}: 0.00444 B parameters" in terminal.text
        assert "/help lists the commands." in terminal.text
        assert GOLDEN["who_are_you"].answer in terminal.send(question("who_are_you"))
        # An error is no end.
        assert "no such command" in terminal.send("/nonsense")
        assert "/reset         forget the conversation" in terminal.send("/help")
        # A block is no command, and neither is a line that begins with two slashes.
        terminal.send("/system")
        terminal.type('"""\r/nonsense\r"""\r//etc\r')
        terminal.wait_for("> //etc")
        terminal.wait_for_prompt()
        shown = terminal.send("/prompt")
        assert "[INST] /nonsense [/INST]" in shown
        assert "[INST] /etc [/INST]" in shown
        # Ctrl-C at the prompt neither, as a key and as a signal.
        terminal.type("\x03")
        terminal.wait_for("/exit or ctrl-D leaves.")
        terminal.wait_for_prompt()
        process.send_signal(signal.SIGINT)
        terminal.wait_until(lambda: terminal.text.count("/exit or ctrl-D leaves.") == 2)
        terminal.wait_for_prompt()
        terminal.type("\x04")
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer(demo_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    # So hot that any token is as likely as `</s>`: the answer would take minutes.
    options = ("--temperature", "1e6", "--max-new-tokens", "100000", "--seed", "1", "--no-history")
    with terminal_with([*COMMAND, str(demo_folder), *options], ENVIRONMENT) as (terminal, process):
        terminal.wait_for_prompt()
        terminal.type("Who are you?\r")
        received = len(terminal.received)
        terminal.wait_until(lambda: len(terminal.received) > received + 2000)
        # The terminal's own ctrl-C.
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.wait_for_prompt()
        assert "2 messages in" in terminal.send(f"/save {saved}")
        assert process.poll() is None
    question, answer = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert question == {"role": "user", "content": "Who are you?"}
    assert answer["role"] == "assistant"
    assert len(answer["content"]) > 100


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "consolidated"])
def test_under_torchrun(
    demo_folder: Path, tools_file: Path, tmp_path: Path, layout: str, warm_python: WarmPython
) -> None:
    folder = demo_folder if layout == "hf" else assemble_demo_checkpoint(tmp_path / "consolidated")
    arguments = ["--nproc-per-node", "2", "-m", "mistral_large_cli", "chat", str(folder), "--temperature", "0"]
    result = subprocess.run(
        [warm_python.python, "-m", "torch.distributed.run", *arguments, "--tools", str(tools_file)],
        input=f"{question('weather_call')}\n{question('weather_follow_up_call')}\n",
        env=ENVIRONMENT | warm_python.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers: list[Any] = [GOLDEN[name].answer for name in ("weather_answer", "weather_follow_up_answer")]
    assert [line for line in result.stdout.splitlines() if line.startswith("It is")] == answers

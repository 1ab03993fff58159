"""Where text leaves the program: what a checkpoint says commands no terminal, and no stream ends in a traceback."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from mistral_large_cli.terminal import console, one_line, print_json, printable, write_picture
from mistral_large_conversion.errors import DestinationError
from tests.support.command import run
from tests.support.errors import raises_exactly

# Titles, clearing of the screen, the clipboard, a line to be overwritten, 8-bit controls, letters turned around.
ATTACK = "a\x1b]0;owned\x07\x1b[2J\x1b]52;c;ZXZpbA==\x07\r\x08\x7f\x9b2J\u202eb\u2066\x00c\udc9bd"
HARMLESS = "a�]0;owned��[2J�]52;c;ZXZpbA==�����2J�b��c�d"
# What no output may hold, whatever goes in.
COMMANDS = [*map(chr, [*range(9), *range(11, 32), *range(127, 160)]), "\u202e", "\u2066", "\udc9b"]


def is_harmless(printed: str) -> bool:
    return not any(command in printed for command in COMMANDS)


def test_controls_become_visible_and_letters_stay() -> None:
    assert printable(ATTACK) == HARMLESS
    text = "çà ▁ 日本 \U0001f469\u200d\U0001f467 עברית \t\n"
    assert printable(text) == text
    assert one_line("model type x\nproblems    none\u2028\t") == "model type x�problems    none��"


def test_a_console_keeps_its_own_colours_and_nobody_elses() -> None:
    for forced in (True, False):
        out = console(file=io.StringIO(), width=200, force_terminal=forced, color_system="standard" if forced else None)
        table = Table("name", box=None)
        table.add_row(Text(ATTACK, style="red"))
        out.print(ATTACK)
        out.print(Text(ATTACK, style="green"), soft_wrap=True)
        out.print(table)
        out.out(ATTACK)
        printed = out.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
        coloured = printed.count("\x1b[31m") + printed.count("\x1b[32m")
        assert coloured == (2 if forced else 0)
        for own in ("\x1b[31m", "\x1b[32m", "\x1b[1m", "\x1b[0m"):
            printed = printed.replace(own, "")
        assert is_harmless(printed)
        assert printed.count("]0;owned") == 4


def test_json_is_ascii_without_controls_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": ATTACK})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert is_harmless(printed)
    assert json.loads(printed) == {"name": ATTACK}


def edit(name: str, **changes: object) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return act


def name_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    name = json.dumps(ATTACK.replace("\udc9b", "")).encode()
    header = data[8 : 8 + length].replace(b'"model.norm.weight"', name)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


# Names on Linux are bytes; a slash and a zero are in none.
NAME = ATTACK.replace("\x00", "")
TEXTS: dict[str, Callable[[Path], object]] = {
    "model_type": edit("config.json", model_type=ATTACK),
    "a setting that forges a line": edit("config.json", model_type="x\nproblems    none"),
    "dtype": edit("config.json", dtype=ATTACK),
    "architectures": edit("config.json", architectures=[ATTACK]),
    "rope_type": edit("config.json", rope_parameters={"rope_type": ATTACK}),
    "quant_method": edit("config.json", quantization_config={"quant_method": ATTACK}),
    "an id": edit("generation_config.json", eos_token_id=ATTACK),
    "a name of a file": lambda folder: (folder / f"{NAME}.partial").touch(),
    "a name of a file of weights": lambda folder: (folder / f"model{NAME}.safetensors").touch(),
    "a name of a tensor": name_a_tensor,
    "not JSON": lambda folder: (folder / "config.json").write_bytes(ATTACK.encode("utf-8", "surrogateescape")),
    "a licence": lambda folder: (folder / "LICENSE").write_bytes(ATTACK.encode("utf-8", "surrogateescape")),
    "an adapter's base": lambda folder: (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": ATTACK})
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("text", [*TEXTS, "the folder's name"])
def test_no_text_of_a_checkpoint_commands_the_terminal(
    demo_folder: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(demo_folder, tmp_path / ("hf" if text in TEXTS else f"{NAME}\nmistral-large: ok")))
    if text in TEXTS:
        TEXTS[text](folder)
    commands: list[tuple[object, ...]] = [
        ("inspect", folder),
        ("inspect", folder, "--json"),
        ("verify", folder),
        ("plan", folder, "--gpus", "80GB"),
        ("convert", folder, tmp_path / "out", "--to", "consolidated", "--dry-run"),
        ("retag", folder, "--as", "mistral"),
    ]
    for command in commands:
        run(*command)
        printed = capsys.readouterr()
        assert is_harmless(printed.out + printed.err), command
        assert "Traceback" not in printed.err
        lines = (printed.out + printed.err).splitlines()
        if command[0] in ("inspect", "verify", "plan"):
            assert "problems    none" not in lines or text != "a setting that forges a line"
            assert "mistral-large: ok" not in lines


def test_what_was_typed_is_quoted_without_its_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A pattern of the shell puts names of files into the command line.
    for arguments in (("inspect", tmp_path, NAME), ("inspect", f"--{NAME}"), (NAME,), ("inspect", tmp_path / NAME)):
        assert run(*arguments) == 2
        printed = capsys.readouterr()
        assert is_harmless(printed.out + printed.err)
        assert "owned" in printed.err


def test_logs_and_warnings_of_libraries_are_harmless_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(*_: Any) -> tuple[str, ...]:
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("library")
        logger.addHandler(handler)
        logger.warning("You are using a model of type %s", ATTACK)
        logger.removeHandler(handler)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            sys.stderr.write(warnings.formatwarning(ATTACK, UserWarning, "file", 1))
        return ()

    factory, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    monkeypatch.setattr("mistral_large_conversion.retag.retag_checkpoint", talk)
    assert run("retag", "folder", "--as", "mistral") == 0
    printed = capsys.readouterr().err
    assert is_harmless(printed)
    assert printed.count("owned") == 2
    # The program that calls the command has its own back.
    assert (logging.getLogRecordFactory(), warnings.formatwarning) == (factory, format_warning)


def test_logs_keep_the_arguments_that_formatters_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Requests(logging.Formatter):
        """Writes a log as uvicorn's formatter for requests does."""

        def format(self, record: logging.LogRecord) -> str:
            assert isinstance(record.args, tuple)
            path, status = record.args
            return f"{path} {status:d}"

    def talk(*_: Any) -> list[str]:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Requests())
        logger = logging.getLogger("server")
        logger.addHandler(handler)
        for path in ("/health", ATTACK):
            logger.warning("%s %d", path, 200)
        logger.removeHandler(handler)
        return []

    monkeypatch.setattr("mistral_large_conversion.retag.retag_checkpoint", talk)
    assert run("retag", "folder", "--as", "mistral") == 0
    printed = capsys.readouterr().err
    assert is_harmless(printed)
    assert printed.startswith("/health 200\n")
    assert printed.endswith(" 200\n")
    assert printed.count("owned") == 1


def fail_on(errno: int) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno, os.strerror(errno))

    return fail


def test_a_full_output_is_one_line(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run("inspect", demo_folder, "--json") == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == (
        "mistral-large: the output cannot be written: No space left on device; make room or send it elsewhere\n"
    )


# What the shell does with the streams, the settings, and what is expected: exit code, stdout, and stderr.
STREAMS: dict[str, tuple[str, dict[str, str], int, bytes, bytes]] = {
    "full": ("> /dev/full", {}, 2, b"", b"mistral-large: the output cannot be written: No space left on device; make"),
    "a reader that is gone": ("| true; exit ${PIPESTATUS[0]}", {}, 1, b"", b""),
    "closed": ("<&- >&-", {}, 0, b"", b""),
    "errors closed": ("2>&-", {}, 0, b"problems    none", b""),
    "ASCII only": ("", {"PYTHONIOENCODING": "ascii"}, 0, rb"caf\xe9", b""),
}


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_no_stream_ends_in_a_traceback(demo_folder: Path, tmp_path: Path, stream: str) -> None:
    (tmp_path / "café").symlink_to(demo_folder)
    redirection, settings, code, printed, error = STREAMS[stream]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mistral_large_cli inspect café {redirection}"],
        capture_output=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore", **settings},
    )
    assert done.returncode == code, done.stderr
    assert printed in done.stdout
    assert done.stderr[: len(error)] == error
    assert bool(done.stderr) == bool(error)


def test_a_picture_replaces_a_name_and_not_what_else_has_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    os.link(tmp_path / "precious", tmp_path / "picture.svg")
    (tmp_path / "picture.svg.partial").symlink_to("precious")
    write_picture(tmp_path / "picture.svg", "<svg/>")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "picture.svg").read_text() == "<svg/>"
    # A link is a name for another place, where the picture is wanted.
    (tmp_path / "link.svg").symlink_to("picture.svg")
    write_picture(tmp_path / "link.svg", "<svg>2</svg>")
    assert (tmp_path / "picture.svg").read_text() == "<svg>2</svg>"
    assert (tmp_path / "link.svg").is_symlink()
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/precious/picture.svg: cannot be written: Not a directory; choose another name",
    ):
        write_picture(tmp_path / "precious" / "picture.svg", "")

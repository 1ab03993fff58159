"""A tools file runs as Python would run an import of it, and nothing of it is offered or left out without a word."""

import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_large_cli import tools_file
from mistral_large_cli.tools_file import load_tools, tool_names
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.generation.tool_loop import run_tool_loop
from tests.support.errors import raises_exactly, whole

DOCUMENTED = "    '''\n    Do {name}\n\n    Args:\n        x: a number\n    '''\n"


def function(name: str, body: str = "return x", before: str = "def") -> str:
    return f"{before} {name}(x: int) -> int:\n{DOCUMENTED.format(name=name)}    {body}\n\n\n"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Forget what a test has loaded."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - modules:
        del sys.modules[name]
    tools_file._InUse.folder, tools_file._InUse.before = None, frozenset()


def write(folder: Path, *parts: str, name: str = "station.py") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(parts), encoding="utf-8")
    return path


def call(tools: list[Any], name: str, x: int = 3) -> str:
    """The result that the model gets for a call."""
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": {"x": x}}}]
    asked: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
    answers = iter([asked, {"role": "assistant", "content": "Done."}])
    said = run_tool_loop(lambda *_: next(answers), [{"role": "user", "content": "x"}], tools)
    content: str = said[2]["content"]
    return content


def test_it_runs_as_python_runs_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "from __future__ import annotations\n\nimport pickle\nimport sys\nimport typing\n",
        "from dataclasses import dataclass, field\n\n\n@dataclass\nclass Reading:\n    celsius: float\n",
        "    unit: str = field(default='C')\n\n\n",
        function("first", "return pickle.loads(pickle.dumps(Reading(x))).celsius"),
        function("second", "return len(typing.get_type_hints(Reading))"),
        function("third", "return [__name__, __file__, sys.modules[__name__].third is third]"),
        "if __name__ == '__main__':\n    raise SystemExit(0)\n",
    )
    assert subprocess.run([sys.executable, str(path)], check=False).returncode == 0
    tools = load_tools(path)
    assert tool_names(tools) == ["first", "second", "third"]
    assert [call(tools, "first"), call(tools, "second")] == ["3", "2"]
    assert call(tools, "third") == f'["station", "{path}", true]'
    assert pickle.loads(pickle.dumps(tools[0])) is tools[0]


def test_modules_next_to_it_are_found_also_when_a_tool_is_called(tmp_path: Path) -> None:
    write(tmp_path / "my tools", "READING = 22\n", name="keys.py")
    write(tmp_path / "my tools", "READING = 23\n", name="later.py")
    path = write(
        tmp_path / "my tools",
        "import keys\n\n\n",
        function("now", "return keys.READING"),
        function("then", "import later\n    return later.READING"),
    )
    link = tmp_path / "station.py"
    link.symlink_to(path)
    for each in (path, link):
        tools = load_tools(each)
        assert [call(tools, "now"), call(tools, "then")] == ["22", "23"]


def test_each_file_has_its_own_modules(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, f"READING = '{name}'\n", name="keys.py")
        write(tmp_path / name, "import keys\n\n\n", function("now", "return keys.READING"))
        assert call(load_tools(tmp_path / name / "station.py"), "now") == name
    assert [folder for folder in sys.path if folder.startswith(str(tmp_path))] == [str(tmp_path / "two")]


def test_loading_it_again_reads_it_again(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, f"READING = {number}\n", "#" * number, name="keys.py")
        path = write(tmp_path, "import keys\n\n\n", function("now", f"return [{number}, keys.READING]"))
        assert call(load_tools(path), "now") == f"[{number}, {number}]"


def test_libraries_stay_loaded(tmp_path: Path) -> None:
    """An environment may lie in the folder of the tools file."""
    packages = tmp_path / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    write(packages, "", name="some_library_of_tests.py")
    sys.path.append(str(packages))
    path = write(tmp_path, "import some_library_of_tests\n\n\n", function("now"))
    load_tools(path)
    library = sys.modules["some_library_of_tests"]
    load_tools(path)
    assert sys.modules["some_library_of_tests"] is library


def test_what_was_loaded_before_stays_loaded(tmp_path: Path) -> None:
    """A program may load a tools file of its own folder."""
    write(tmp_path, "", name="some_module_of_the_program.py")
    sys.path.append(str(tmp_path))
    module = importlib.import_module("some_module_of_the_program")
    for _ in range(2):
        load_tools(write(tmp_path, function("now")))
    assert sys.modules["some_module_of_the_program"] is module


def test_a_file_that_fails_leaves_the_one_in_use(tmp_path: Path) -> None:
    write(tmp_path / "good", "READING = 'good'\n", name="keys.py")
    good = load_tools(write(tmp_path / "good", function("now", "import keys\n    return keys.READING")))
    write(tmp_path / "bad", "READING = 'bad'\n", name="keys.py")
    with raises_exactly(
        ConversationError,
        f"{tmp_path}/bad/station.py: ZeroDivisionError: division by zero; it must run by itself; fix it",
    ):
        load_tools(write(tmp_path / "bad", "import keys\n1 / 0\n"))
    assert call(good, "now") == "good"
    assert sys.modules["station"].__file__ == str(tmp_path / "good" / "station.py")


EVERY_KIND = """
from functools import lru_cache, partial
from typing import Annotated, Literal, NewType

Number = NewType("Number", int)
Unit = Literal["C", "F"]
Numbers = list[int]
Marked = Annotated[int, "x"]


def _unnamed(function):
    def inner(x: int) -> int:
        '''
        Inner

        Args:
            x: a number
        '''
        return function(x)

    return inner


class Station:
    def read(self, x: int) -> int:
        '''
        Read

        Args:
            x: a number
        '''
        return x

    __call__ = read


def two(x: int, y: int) -> int:
    '''
    Two

    Args:
        x: a number
        y: a number
    '''
    return x + y


bound = Station().read
thing = Station()
part = partial(two, y=4)


"""


def test_every_kind_of_function_is_a_tool(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        EVERY_KIND,
        function("cached", before="@lru_cache\ndef"),
        function("waiting", before="async def"),
        function("_hidden"),
        function("decorated", before="@_unnamed\ndef"),
        "also_cached = cached\n",
    )
    tools = load_tools(path)
    assert tool_names(tools) == ["two", "read", "thing", "part", "cached", "waiting", "inner"]
    results = {"read": "3", "thing": "3", "part": "7", "cached": "3", "waiting": "3", "inner": "3"}
    assert {name: call(tools, name) for name in results} == results


def test_what_is_imported_is_no_tool_unless_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, function("near"), function("far"), "thing = near\n", name="others.py")
    imports = "from others import *\nfrom others import far as away, thing\nfrom json import dumps\n\n\n"
    assert tool_names(load_tools(write(tmp_path, imports, function("own")))) == ["own"]
    with raises_exactly(
        ConversationError,
        f"{tmp_path}/station.py: no functions; tools are public functions with type hints that the file defines, or "
        "imports and names in __all__; define one",
    ):
        load_tools(write(tmp_path, imports))
    named = write(tmp_path, imports, function("own"), function("other"), "__all__ = ['away', 'own']\n")
    assert tool_names(load_tools(named)) == ["far", "own"]


HINTS = (
    "a function needs a type hint for every argument and a Google-style docstring; add them; or begin its name with _ "
    "if it is no tool"
)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "import sys\nsys.exit(3)\n",
            'ends the program with SystemExit(3); a tools file is imported; put that under if __name__ == "__main__":',
        ),
        ("def f(:\n", "SyntaxError: <*>; it must run by itself; fix it"),
        (
            "import no_such_module_at_all\n",
            "ModuleNotFoundError: No module named 'no_such_module_at_all'; it must run by itself; fix it",
        ),
        ("# coding: utf-8\ns = '\xff'\n".encode("latin-1"), "<*>Error: <*>; it must run by itself; fix it"),
        ("\0", "<*>Error: <*>; it must run by itself; fix it"),
        ("import json\n\n\ndef f(x): 'Do.'\n", f"f: <*>; {HINTS}"),
        ("from random import Random\n\n\nchoose = Random().choice\n", f"choose: <*>; {HINTS}"),
        (
            function("f") + function("g") + "g.__name__ = 'f'\n",
            "f and g are both called f; the model calls tools by name; rename one",
        ),
        ("__all__ = ['f']\n", "__all__ names 'f', which is no function here; correct __all__"),
        ("__all__ = ['x']\nx = 1\n", "__all__ names 'x', which is no function here; correct __all__"),
        ("import json\n", "a module json is loaded already, and Python would take that one; rename <*>/json.py"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: str | bytes, problem: str) -> None:
    (tmp_path / "station.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    if content == "import json\n":
        # Python would import this one.
        write(tmp_path, "", name="json.py")
    modules, path = dict(sys.modules), list(sys.path)
    with pytest.raises(ConversationError, match=whole(f"{tmp_path}/station.py: {problem}")):
        load_tools(tmp_path / "station.py")
    assert (sys.modules, sys.path) == (modules, path)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    with raises_exactly(
        ConversationError,
        f"{tmp_path}/json.py: a module json is loaded already, and Python would take that one; rename "
        f"{tmp_path}/json.py",
    ):
        load_tools(write(tmp_path, function("f"), name="json.py"))


@pytest.mark.parametrize("name", ["none.py", "folder.py", "tools.txt"])
def test_what_is_no_python_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.py").mkdir()
    write(tmp_path, function("f"), name="tools.txt")
    with raises_exactly(
        ConversationError,
        f"{tmp_path}/{name}: no Python file; tools are functions in one; name such a file",
    ):
        load_tools(tmp_path / name)

"""Tools in a Python file: it runs as an import of it would, and its functions are what the model may call."""

import ast
import importlib.util
import symtable
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NewType, get_origin

from mistral_large_conversion.errors import ConversationError

Tool = Callable[..., Any]


class _InUse:
    """Where the last tools file imports from, also later, when its functions are called."""

    folder: Path | None = None
    # Top-level modules that were there before it.
    before: frozenset[str] = frozenset()


def load_tools(path: Path) -> list[Tool]:
    """Run a Python file and return the tools it defines.

    The file runs as if it were imported: its folder is the first of `sys.path`, it is in `sys.modules` under its own
    name, and what stands under `if __name__ == "__main__"` does not run. Loading it once more reads it and the modules
    next to it again. Tools are its public functions, also decorated, cached, bound and partial ones, and its callable
    objects. What it imports is none, nor are classes and types; with an `__all__`, what that names and nothing else.

    Raises:
        ConversationError: no such file, it fails, it defines no tool, one that no schema can be made of, or two of one
            name. The tools file that was in use stays in use.
    """
    if path.suffix != ".py" or not path.is_file():
        raise ConversationError(f"{path}: no Python file; tools are functions in one; name such a file")
    with _instead_of_the_last(path.resolve().parent):
        tools = _find_tools(path, *_run(path))
        if not tools:
            raise ConversationError(
                f"{path}: no functions; tools are public functions with type hints that the file defines, or imports "
                "and names in __all__; define one"
            )
        _check_descriptions(path, tools)
    return list(tools.values())


def function_names(path: Path) -> list[str]:
    """Return the public functions at the top of a Python file, which is read and not run; none of what is no such file.

    A file of any other kind, or of more than a megabyte, is not read.
    """
    try:
        if path.suffix != ".py" or not path.is_file() or path.stat().st_size > 2**20:
            return []
        tree = ast.parse(path.read_bytes())
    except (OSError, RecursionError, SyntaxError, ValueError):
        return []
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    ]


def tool_names(tools: Sequence[Tool]) -> list[str]:
    """Return the names by which the model calls tools."""
    from modeling_mistral_large.instruct.tool_schemas import describe_function

    return [describe_function(tool, f"tool {index}")["function"]["name"] for index, tool in enumerate(tools)]


@contextmanager
def _instead_of_the_last(folder: Path) -> Iterator[None]:
    """Import from `folder` and forget the modules of the last tools file; where that fails, all is as before."""
    path, last = list(sys.path), _own_modules()
    if _InUse.folder is not None and str(_InUse.folder) in sys.path:
        sys.path.remove(str(_InUse.folder))
    for name in last:
        del sys.modules[name]
    was_in_use = _InUse.folder, _InUse.before
    _InUse.folder, _InUse.before = folder, frozenset(map(_top, sys.modules))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    except BaseException:
        for name in _own_modules():
            del sys.modules[name]
        sys.modules.update(last)
        sys.path[:] = path
        _InUse.folder, _InUse.before = was_in_use
        raise


def _own_modules() -> dict[str, ModuleType]:
    """The tools file in use as a module, and the modules next to it that were imported for it."""
    folder = _InUse.folder
    if folder is None:
        return {}
    modules = {name: module for name, module in sys.modules.items() if _top(name) not in _InUse.before}
    own = {_top(name) for name in modules if name == _top(name) and _is_in(folder, modules[name])}
    return {name: module for name, module in modules.items() if _top(name) in own}


def _top(module_name: str) -> str:
    return module_name.partition(".")[0]


def _is_in(folder: Path, module: ModuleType) -> bool:
    """Return whether a module is a file or a package of the folder itself; libraries of an environment lie deeper."""
    paths = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    return any(isinstance(path, str) and Path(path).resolve().parent == folder for path in paths)


def _run(path: Path) -> tuple[ModuleType, set[str]]:
    """Run a file as a module, and return it with the names that its statements bind, those of imports left out."""
    try:
        source = path.read_bytes()
        _check_module_names(path, ast.parse(source, str(path)))
        # Bytes are taken as well, as by `compile`: with the encoding that the file declares.
        table = symtable.symtable(source, str(path), "exec")  # type: ignore[arg-type]  # typeshed has text only
        spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses, pickles and type hints look a module up by its name.
        sys.modules[path.stem] = module
        # Not by the loader, which takes what __pycache__ has of a file that was changed in the same second.
        exec(compile(source, str(path.absolute()), "exec"), vars(module))
    except ConversationError:
        raise
    except SystemExit as error:
        raise ConversationError(
            f"{path}: ends the program with SystemExit({error}); a tools file is imported; put that under "
            'if __name__ == "__main__":'
        ) from error
    # The file is the user's own program.
    except Exception as error:
        raise ConversationError(f"{path}: {type(error).__name__}: {error}; it must run by itself; fix it") from error
    return module, {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}


def _check_module_names(path: Path, tree: ast.Module) -> None:
    """Refuse a file whose own module, or one next to it that it imports, Python would take from elsewhere."""
    folder = path.resolve().parent
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {_top(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(_top(node.module))
    own = {name for name in imported if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()}
    for name in sorted(own | {path.stem}):
        if name in sys.modules:
            raise ConversationError(
                f"{path}: a module {name} is loaded already, and Python would take that one; rename {folder / name}.py"
            )


def _find_tools(path: Path, module: ModuleType, assigned: set[str]) -> dict[str, Tool]:
    """Return the tools of a file by the names it gives them."""
    values = vars(module)
    if "__all__" in values:
        for name in values["__all__"]:
            if not callable(values.get(name)):
                raise ConversationError(f"{path}: __all__ names {name!r}, which is no function here; correct __all__")
        found = {name: values[name] for name in values["__all__"]}
    else:
        found = {
            name: value
            for name, value in values.items()
            if not name.startswith("_")
            and _may_be_tool(value)
            and (name in assigned or getattr(value, "__module__", None) == module.__name__)
        }
    # A function with two names is one tool, under its first name.
    first = {id(value): name for name, value in reversed(found.items())}
    return {name: value for name, value in found.items() if first[id(value)] == name}


def _may_be_tool(value: Any) -> bool:
    """Return whether a value can be called and is not a class or a type alias, which can be called as well."""
    return callable(value) and not isinstance(value, type | NewType) and get_origin(value) is None


def _check_descriptions(path: Path, tools: dict[str, Tool]) -> None:
    from modeling_mistral_large.instruct.tool_schemas import describe_function

    described: dict[str, str] = {}
    for name, tool in tools.items():
        if not hasattr(tool, "__name__"):
            # A partial function or an object has no name but the one the file gives it.
            with suppress(AttributeError):
                tool.__name__ = name
        try:
            tool_name = describe_function(tool, f"{path}: {name}")["function"]["name"]
        except ConversationError as error:
            raise ConversationError(f"{error}; or begin its name with _ if it is no tool") from error
        if tool_name in described:
            raise ConversationError(
                f"{path}: {described[tool_name]} and {name} are both called {tool_name}; the model calls tools by "
                "name; rename one"
            )
        described[tool_name] = name

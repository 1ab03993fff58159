"""Tool definitions: Python callables and OpenAI dicts become the JSON the model reads before `[INST]`."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, get_type_hints

from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.json_text import as_mapping, is_list, shorten, show, write_json

ToolDefinition: TypeAlias = Mapping[str, Any] | Callable[..., Any]

# The reference matches with `$`, which also lets one final newline through.
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}\n?")
FUNCTION_NAME_RULE = "a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -"


def list_tools(tools: Any) -> Sequence[Any]:
    """Return the tools of a request, none for None, or raise if they are no list."""
    if tools is None:
        return ()
    if not is_list(tools):
        raise ConversationError(f"tools {show(tools)}: tools are a list, even if there is one; pass tools=[…]")
    return tools


def write_tools(tools: Sequence[ToolDefinition], *, strict: bool = False) -> str:
    """Return the tools as the JSON list of the prompt: fixed keys in a fixed order, and nothing else.

    Raises ConversationError for a tool without a valid name or with parameters that are no JSON schema (draft 7).
    """
    texts = []
    for index, tool in enumerate(tools):
        where = f"tool {index}"
        try:
            texts.append(write_json(_read_tool(tool, where, strict=strict), where))
        except RecursionError as error:
            raise ConversationError(f"{where}: {error}; a schema has fewer levels; make it flatter") from error
    return f"[{', '.join(texts)}]"


def _read_tool(tool: ToolDefinition, where: str, *, strict: bool) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        fields = None if callable(tool) else as_mapping(tool)
        tool = describe_function(tool, where) if fields is None else fields
    if tool.get("type", "function") != "function":
        raise ConversationError(
            f"{where}: type {show(tool['type'])}; the only tools of this format are functions; leave it out"
        )
    # A definition without its wrapper is an older habit of transformers users.
    function = as_mapping(tool.get("function", None if strict else tool))
    if function is None:
        raise ConversationError(f'{where}: no "function"; write {{"type": "function", "function": {{"name": …}}}}')
    name = read_function_name(function, where)
    description = function.get("description")
    if description is None:
        description = ""
    if not isinstance(description, str):
        raise ConversationError(f"{where} ({name}): description {show(description)}; it must be text or left out")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise ConversationError(
            f"{where} ({name}): parameters {show(parameters)}; they must be a JSON schema object; convert them"
        )
    if problem := find_schema_error(parameters, "parameters"):
        raise ConversationError(f"{where} ({name}): {problem}; the parameters must be a JSON schema (draft 7)")
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def read_function_name(function: Mapping[str, Any], where: str) -> str:
    """Return the name of a function that is defined or called, or raise for one that no prompt has."""
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise ConversationError(f"{where}: name {show(name)}; {FUNCTION_NAME_RULE}; rename the function")
    return name


def describe_function(tool: Any, where: str) -> dict[str, Any]:
    """Return the definition transformers derives from a function's type hints and Google-style docstring.

    tool: a function, also an async or decorated one, a bound method, a `functools.partial`, whose arguments are not the
        model's to choose, or an object with `__call__`. One whose attribute `tool_definition` is a definition as
        OpenAI has it is described by that.
    """
    if not callable(tool):
        raise ConversationError(f"{where}: {show(tool)}; pass an OpenAI tool definition or a Python function")
    if (definition := own_definition(tool)) is not None:
        return definition
    # Slow to import, and only needed here.
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(tool if isinstance(tool, type) else _as_function(tool, where))
    except ConversationError:
        raise
    # Its hints are the user's own expressions.
    except Exception as error:
        raise ConversationError(
            f"{where}: {error}; a function needs a type hint for every argument and a Google-style docstring; add them"
        ) from error
    return schema


def own_definition(tool: Any) -> dict[str, Any] | None:
    """Return the definition that a callable brings in `tool_definition`, None where type hints describe it."""
    definition = getattr(tool, "tool_definition", None)
    return dict(definition) if isinstance(definition, Mapping) else None


def find_function(tool: Any) -> Any:
    """Return the function that a callable runs in the end, behind partials, methods and decorators."""
    while True:
        if isinstance(tool, partial):
            tool = tool.func
        elif inspect.ismethod(tool):
            tool = tool.__func__
        elif hasattr(tool, "__wrapped__"):
            tool = tool.__wrapped__
        elif inspect.isroutine(tool) or isinstance(tool, type):
            return tool
        else:
            tool = type(tool).__call__


def parameters_of(tool: Any) -> list[inspect.Parameter]:
    """Return the parameters that a call may set; what a `functools.partial` has set is not among them."""
    if not isinstance(tool, partial):
        return list(inspect.signature(tool).parameters.values())
    # A new one, as one that is dressed up as its function would have that function's signature.
    parameters = inspect.signature(partial(tool.func, *tool.args, **tool.keywords)).parameters
    return [parameter for name, parameter in parameters.items() if name not in tool.keywords]


def _as_function(tool: Any, where: str) -> Callable[..., Any]:
    """Return a function with the name, docstring, hints and parameters of a callable of any kind, for transformers."""
    source = find_function(tool)
    named = tool
    while isinstance(named, partial) and "__name__" not in vars(named):
        named = named.func
    name = getattr(named, "__name__", type(named).__name__)
    own = vars(tool).get("__doc__") if isinstance(tool, partial) else None
    doc = own or source.__doc__ or inspect.getdoc(named)
    if not doc:
        raise ConversationError(f"{where}: {name} has no docstring; the model reads what a function does; write one")
    parameters = parameters_of(tool)
    for number, parameter in enumerate(parameters):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConversationError(
                f"{where} ({name}): {parameter}; the arguments of a call are one object, each by its name; "
                "name them, or take a list or a dict"
            )
        if number == 0 and parameter.name in ("self", "cls") and parameter.annotation is parameter.empty:
            raise ConversationError(f"{where} ({name}): {parameter.name} is not bound; pass the method of an object")

    def function() -> None: ...

    function.__name__, function.__doc__ = name, doc
    hints = get_type_hints(source)
    # The hint of the result describes nothing that the model writes.
    function.__annotations__ = {given.name: hints[given.name] for given in parameters if given.name in hints}
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by `inspect.signature`
    return function


def find_schema_error(schema: Mapping[str, Any], name: str) -> str | None:
    """Return where and why a schema called `name` breaks the meta-schema of draft 7, or None."""
    # What differs in validity differs in this text: a tuple is no list, and True no number.
    text = repr(schema)
    if text not in _SCHEMA_ERRORS:
        if len(_SCHEMA_ERRORS) >= MOST_SCHEMAS:
            _SCHEMA_ERRORS.clear()
        _SCHEMA_ERRORS[text] = _check_schema(schema)
    error = _SCHEMA_ERRORS[text]
    return None if error is None else f"{name}{error}"


# Checking takes milliseconds, and requests come with the same tools again and again.
MOST_SCHEMAS = 1024
_SCHEMA_ERRORS: dict[str, str | None] = {}


def _check_schema(schema: Mapping[str, Any]) -> str | None:
    # Slow to import, and only needed here.
    from jsonschema import Draft7Validator, FormatChecker
    from jsonschema.exceptions import best_match

    # Only patterns: which other formats are checked depends on what is installed.
    validator = Draft7Validator(Draft7Validator.META_SCHEMA, format_checker=FormatChecker(["regex"]))
    error = best_match(validator.iter_errors(schema))
    if error is None:
        return None
    if error.context:
        # A `type` that is neither a name nor a list of names; the first lists the names.
        error = error.context[0]
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error.absolute_path)
    return f"{path}: {shorten(error.message)}"

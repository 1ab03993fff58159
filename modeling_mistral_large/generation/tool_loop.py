"""The complete tool cycle: the model calls functions, gets their results, and responds."""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.formats import InstructFormat, find_format
from modeling_mistral_large.instruct.json_text import json_value, rewrite_json, shorten, show
from modeling_mistral_large.instruct.tool_schemas import (
    describe_function,
    find_function,
    list_tools,
    own_definition,
    parameters_of,
)

Message: TypeAlias = dict[str, Any]
Generate: TypeAlias = Callable[[list[Message], Sequence[Callable[..., Any]]], Message]
Approve: TypeAlias = Callable[[Callable[..., Any], str, dict[str, Any]], bool]

# What Python calls the types of JSON schemas. A boolean is an integer to Python, but not to JSON.
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class _Tool(NamedTuple):
    """A function that the model may call."""

    function: Callable[..., Any]
    schema: Mapping[str, Any]
    # Arguments that Python takes by their place only, with their defaults.
    positional: Sequence[inspect.Parameter]
    # Any JSON schema, and not what type hints make.
    has_own_schema: bool


def run_tool_loop(
    generate: Generate,
    messages: Sequence[Message],
    tools: Sequence[Callable[..., Any]],
    *,
    max_rounds: int = 8,
    prompt_format: str | None = None,
    approve: Approve | None = None,
) -> list[Message]:
    """Return the messages with the model's calls, the tools' results and the final response appended.

    generate: returns the assistant's next message for these messages and tools; `generate_with` makes one.
    tools: functions with type hints and Google-style docstrings, also async ones, which are awaited. What a call does
        wrong, and what a function raises, goes back to the model as the call's result. A result is text, or what JSON
        can hold: see `json_text.json_value`.
    max_rounds: how many responses the model may give. If the last of them still calls tools, the list ends with their
        results.
    prompt_format: `v3` or `v7`, how the model reads results: v7 any text unchanged, v3 as JSON where it is JSON.
        Without it, that of the tokenizer that `generate_with` was given, else v3.
    approve: called with each function, its name and the arguments of a call before it runs; where it returns False, the
        function does not run and the model reads that the user refused.

    A callable with a `tool_definition`, a definition as OpenAI has it, is described by that, and its arguments are held
    to that schema.

    Raises ConversationError for a function whose schema cannot be read, a generator, or two of one name, before the
    model is asked; and for a result that is no JSON value, before the model reads it.
    """
    form = find_format(prompt_format or getattr(generate, "prompt_format", None) or "v3")
    tools = list_tools(tools)
    named: dict[str, _Tool] = {}
    for index, function in enumerate(tools):
        schema = describe_function(function, f"tool {index}")["function"]
        name = schema["name"]
        source = find_function(function)
        if inspect.isasyncgenfunction(source) or inspect.isgeneratorfunction(source):
            raise ConversationError(f"tool {index} ({name}): a generator has no one result; return a list of its items")
        if name in named:
            raise ConversationError(
                f"tools {name}, {name}: two have one name; the model calls tools by name; rename one"
            )
        parameters = [] if isinstance(function, type) else parameters_of(function)
        positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
        is_own = own_definition(function) is not None
        named[name] = _Tool(function, schema.get("parameters") or {}, positional, has_own_schema=is_own)
    conversation = list(messages)
    event_loop = _EventLoop()
    try:
        for _ in range(max_rounds):
            answer = generate(conversation, tools)
            conversation.append(answer)
            calls = answer.get("tool_calls")
            if not calls:
                break
            for call in calls:
                function = call["function"]
                result = _run_call(function["name"], function["arguments"], named, event_loop, form, approve)
                conversation.append(
                    {"role": "tool", "tool_call_id": call.get("id"), "name": function["name"], "content": result}
                )
    finally:
        event_loop.close()
    return conversation


def generate_with(model: Any, tokenizer: Any, **generation: Any) -> Generate:
    """Return a `generate` for `run_tool_loop` from a model, its tokenizer and arguments for `model.generate`."""

    return _Generator(model, tokenizer, generation)


@dataclass(frozen=True)
class _Generator:
    """A model that responds to messages."""

    model: Any
    tokenizer: Any
    generation: Mapping[str, Any]

    @property
    def prompt_format(self) -> str | None:
        return getattr(self.tokenizer, "prompt_format", None)

    def __call__(self, messages: list[Message], tools: Sequence[Callable[..., Any]]) -> Message:
        inputs = self.tokenizer.apply_chat_template(messages, tools=list(tools), return_tensors="pt")
        prompt = inputs["input_ids"][0]
        output = self.model.generate(**inputs.to(self.model.device), **self.generation)[0]
        answer: Message = self.tokenizer.parse_response(output[len(prompt) :].tolist(), prefix=prompt.tolist())
        return answer


class _EventLoop:
    """The event loop of async tools: in this thread, or in one of its own where this one runs a loop already."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: ThreadPoolExecutor | None = None

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Return what an awaitable gives."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()

        async def result() -> Any:
            return await awaitable

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._loop.run_until_complete(result())
        self._thread = self._thread or ThreadPoolExecutor(1)
        future = self._thread.submit(copy_context().run, self._loop.run_until_complete, result())
        try:
            return future.result()
        except KeyboardInterrupt:
            for task in asyncio.all_tasks(self._loop):
                self._loop.call_soon_threadsafe(task.cancel)
            raise

    def close(self) -> None:
        """End what the tools have left running."""
        if self._loop is None:
            return
        self.run(_cancel_all())
        self._loop.close()
        if self._thread:
            self._thread.shutdown()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _run_call(
    name: str,
    arguments: Any,
    named: Mapping[str, _Tool],
    event_loop: _EventLoop,
    form: InstructFormat,
    approve: Approve | None,
) -> str:
    """Return the result of a call as the content of a tool message."""
    if name not in named:
        return _write_error(f"there is no tool {show(name)}; the tools are {', '.join(named)}", form)
    if not isinstance(arguments, dict):
        return _write_error(f"the arguments are {show(arguments)} and must be an object", form)
    tool = named[name]
    check = _find_schema_error if tool.has_own_schema else _find_argument_error
    if problem := check(arguments, tool.schema):
        return _write_error(problem, form)
    if approve is not None and not approve(tool.function, name, dict(arguments)):
        return _write_error("the user refused this call", form)
    by_name = dict(arguments)
    by_place = [by_name.pop(parameter.name, parameter.default) for parameter in tool.positional]
    where = f"the result of tool {name}"
    try:
        result = tool.function(*by_place, **by_name)
        if inspect.isawaitable(result) and not isinstance(result, asyncio.Future):
            result = event_loop.run(result)
    # Whatever a tool does wrong is for the model to deal with.
    except Exception as error:
        return _write_error(f"{type(error).__name__}: {error}", form)
    if isinstance(result, asyncio.Future):
        raise ConversationError(
            f"{where}: a task of an event loop that waits for this call to end; make the tool an async function"
        )
    if isinstance(result, str):
        return _as_content(str.__str__(result), form)
    result = json_value(result, where)
    try:
        return _as_content(json.dumps(result, ensure_ascii=False), form)
    # A whole number that is too long for Python to write.
    except ValueError as error:
        return _write_error(f"{type(error).__name__}: {error}", form)


def _as_content(text: str, form: InstructFormat) -> str:
    """Return the text, or, where no prompt can hold it unchanged, the nearest that one can."""
    if form.tool_content_token is not None:
        # Raw: all but what is no Unicode.
        return text.encode(errors="replace").decode()
    try:
        rewrite_json(text, "result")
    except ConversationError:
        return json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False)
    return text


def _write_error(problem: str, form: InstructFormat) -> str:
    return _as_content(json.dumps({"error": problem}, ensure_ascii=False), form)


def _find_schema_error(arguments: dict[str, Any], schema: Mapping[str, Any]) -> str | None:
    """Return how arguments break a JSON schema, or None."""
    from jsonschema import Draft7Validator
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # An empty registry, as a reference to an address would be fetched by default.
    validator = validator_for(schema, default=Draft7Validator)(schema, registry=Registry())
    try:
        error = best_match(validator.iter_errors(arguments))
    except Unresolvable as problem:
        return f"the schema of this tool cannot be read: {shorten(str(problem))}"
    if error is None:
        return None
    path = ".".join(map(str, error.absolute_path))
    return f"{path}: {shorten(error.message)}" if path else shorten(error.message)


def _find_argument_error(arguments: dict[str, Any], schema: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the arguments of a call, or None."""
    properties = schema["properties"]
    if missing := [name for name in schema.get("required", ()) if name not in arguments]:
        return f"the arguments lack {', '.join(missing)}"
    for name, value in arguments.items():
        if name not in properties:
            return f"there is no argument {show(name)}; the arguments are {', '.join(properties)}"
        if not _fits(value, properties[name]):
            return f"{name} is {show(value)} and must fit {json.dumps(properties[name])}"
    return None


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value has the type of a schema that was made from type hints."""
    if value is None and schema.get("nullable"):
        return True
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema:
        return any(_fits(value, choice) for choice in schema["anyOf"])
    types = schema.get("type", list(PYTHON_TYPES))
    types = [types] if isinstance(types, str) else types
    if isinstance(value, bool):
        return "boolean" in types
    if not any(isinstance(value, PYTHON_TYPES[name]) for name in types):
        return False
    return not isinstance(value, list) or all(_fits(item, schema.get("items", {})) for item in value)

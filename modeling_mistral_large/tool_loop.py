"""The complete tool cycle: the model calls functions, gets their results, and answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from .errors import ConversationError
from .json_text import rewrite_json, show
from .tool_schemas import describe_function

Message: TypeAlias = dict[str, Any]
Generate: TypeAlias = Callable[[list[Message], Sequence[Callable[..., Any]]], Message]

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


def run_tool_loop(
    generate: Generate, messages: Sequence[Message], tools: Sequence[Callable[..., Any]], *, max_rounds: int = 8
) -> list[Message]:
    """Return the messages with the model's calls, the tools' results and the final answer appended.

    generate: returns the assistant's next message for these messages and tools; `generate_with` makes one.
    tools: functions with type hints and Google-style docstrings. What a call does wrong, and what a function raises,
        goes back to the model as the call's result.
    max_rounds: how many answers the model may give. If the last of them still calls tools, the list ends with their
        results.

    Raises ConversationError for a function whose schema cannot be read, or two of one name.
    """
    schemas = [describe_function(tool, f"tool {index}")["function"] for index, tool in enumerate(tools)]
    named = {schema["name"]: (tool, schema["parameters"]) for schema, tool in zip(schemas, tools, strict=True)}
    if len(named) < len(tools):
        names = ", ".join(schema["name"] for schema in schemas)
        raise ConversationError(f"tools {names}: two have one name; the model calls tools by name; rename one")
    conversation = list(messages)
    for _ in range(max_rounds):
        answer = generate(conversation, tools)
        conversation.append(answer)
        calls = answer.get("tool_calls")
        if not calls:
            break
        for call in calls:
            function = call["function"]
            result = _run_call(function["name"], function["arguments"], named)
            conversation.append(
                {"role": "tool", "tool_call_id": call.get("id"), "name": function["name"], "content": result}
            )
    return conversation


def generate_with(model: Any, tokenizer: Any, **generation: Any) -> Generate:
    """Return a `generate` for `run_tool_loop` from a model, its tokenizer and arguments for `model.generate`."""

    def generate(messages: list[Message], tools: Sequence[Callable[..., Any]]) -> Message:
        inputs = tokenizer.apply_chat_template(messages, tools=list(tools), return_tensors="pt").to(model.device)
        prompt = inputs["input_ids"][0]
        output = model.generate(**inputs, **generation)[0]
        answer: Message = tokenizer.parse_response(output[len(prompt) :].tolist(), prefix=prompt.tolist())
        return answer

    return generate


def _run_call(name: str, arguments: Any, named: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]) -> str:
    """Return the result of a call as the content of a tool message."""
    if name not in named:
        return _write_error(f"there is no tool {show(name)}; the tools are {', '.join(named)}")
    tool, schema = named[name]
    if finding := _find_argument_error(arguments, schema):
        return _write_error(finding)
    try:
        result = tool(**arguments)
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        return _as_content(text)
    # Whatever a tool does wrong is for the model to deal with.
    except Exception as error:
        return _write_error(f"{type(error).__name__}: {error}")


def _as_content(text: str) -> str:
    """Return the text, or, where no prompt can hold it as it is, the nearest that one can."""
    try:
        rewrite_json(text, "result")
    except ConversationError:
        return json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False)
    return text


def _write_error(finding: str) -> str:
    return _as_content(json.dumps({"error": finding}, ensure_ascii=False))


def _find_argument_error(arguments: Any, schema: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the arguments of a call, or None."""
    if not isinstance(arguments, dict):
        return f"the arguments are {show(arguments)} and must be an object"
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

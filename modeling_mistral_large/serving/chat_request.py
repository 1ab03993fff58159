"""Requests for chat completions: each parameter is obeyed, or refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .json_fields import Fields, RequestError, is_number

# Logits divided by less overflow; divided by more, all tokens are alike.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.001, 1000
MOST_CHOICES = 128
MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
LARGEST_SEED = 2**63 - 1

# Parameters that this server does not have, and the values that ask for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template_kwargs": ({},),
    "function_call": (),
    "functions": (),
    "generation_config": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_mode": (),
    "reasoning_effort": ("none",),
    "safe_prompt": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}
# About the request and not about its response.
TEXT_LABELS = ("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "random_seed"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
)
KNOWN = frozenset(
    {
        *NEUTRAL,
        *TEXT_LABELS,
        *SAMPLING,
        *("metadata", "model", "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format"),
        *("stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "stop", "logprobs", "top_logprobs"),
    }
)


@dataclass(frozen=True)
class ToolChoice:
    """Which tools a response may or must call.

    tools: those of the prompt.
    callable_tools: those of them that may be called.
    mode: `none`, `auto` or `required`.
    is_parallel: whether a response may hold several calls.
    """

    tools: list[Any] | None = None
    callable_tools: list[Any] | None = None
    mode: str = "auto"
    is_parallel: bool = True

    @property
    def is_constrained(self) -> bool:
        """Return whether the model has to be held to it: by itself it may call any tool, in any number."""
        if not self.callable_tools:
            return False
        strict = any(_function_of(tool).get("strict") is True for tool in self.callable_tools)
        return self.mode == "required" or not self.is_parallel or self.callable_tools != self.tools or strict


@dataclass(frozen=True)
class ChatRequest:
    """What a request asks for, in the types that it must have.

    sampling: the parameters of SAMPLING that are given, `random_seed` as `seed` and `logit_bias` by token ids.
    top_logprobs: None for no log probabilities.
    """

    model: str | None
    messages: list[Any]
    tool_choice: ToolChoice = ToolChoice()
    response_format: dict[str, Any] | None = None
    is_streamed: bool = False
    includes_usage: bool = False
    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def continues_message(self) -> bool:
        """Return whether the response continues the last message, which is the assistant's."""
        last = self.messages[-1]
        return isinstance(last, dict) and last.get("role") == "assistant"

    @property
    def is_json(self) -> bool:
        """Return whether the response has to be JSON."""
        return self.response_format is not None and self.response_format.get("type") != "text"


def read_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Read the JSON of a request.

    Raises:
        RequestError: a parameter that is unknown, of another type, out of its range, or that this server cannot obey.
    """
    given = Fields(body)
    given.check_names(KNOWN, NEUTRAL)
    for name in TEXT_LABELS:
        given.text(name)
    given.mapping("metadata")
    is_streamed = given.flag("stream")
    max_tokens, max_tokens_name = _read_max_tokens(given)
    return ChatRequest(
        model=given.text("model"),
        messages=_read_messages(given),
        tool_choice=read_tool_choice(given),
        response_format=read_response_format(given),
        is_streamed=is_streamed,
        includes_usage=_read_stream_options(given, is_streamed),
        max_tokens=max_tokens,
        max_tokens_name=max_tokens_name,
        n=given.whole("n", 1, MOST_CHOICES) or 1,
        stop=_read_stop(given),
        top_logprobs=_read_logprobs(given),
        sampling=read_sampling(given),
    )


def _read_messages(given: Fields) -> list[Any]:
    messages = given.array("messages", "a list of messages")
    if messages is None:
        raise RequestError("messages: missing; pass a list of messages", "messages")
    check_messages(messages)
    return messages


def check_messages(messages: list[Any]) -> None:
    """Refuse messages that this API does not have; all else is the format's to refuse, when the prompt is made.

    Raises:
        RequestError: there are none, the arguments of a call are no JSON, or calls end the conversation.
    """
    if not messages:
        raise RequestError("messages: there are none; a conversation has at least one; pass a user message", "messages")
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else ():
            arguments = _function_of(call).get("arguments")
            if isinstance(arguments, str):
                try:
                    json.loads(arguments or "{}")
                except (ValueError, RecursionError) as error:
                    raise RequestError(
                        f"messages[{index}]: arguments of a call: {error}; they are the JSON text of an object; "
                        "correct them",
                        "messages",
                    ) from error
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") == "assistant" and last.get("tool_calls"):
        raise RequestError(
            f"messages[{len(messages) - 1}]: ends the conversation with tool calls, which cannot be continued; add "
            "their results",
            "messages",
        )


def _function_of(tool: Any) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def read_tool_choice(given: Fields) -> ToolChoice:
    """Read tools, which of them may be called, and whether one must be."""
    tools = given.array("tools", "a list of tool definitions") or None
    is_parallel = given.flag("parallel_tool_calls", default=True)
    choice = given.given.get("tool_choice", "auto")
    allowed = tools
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice, allowed = _read_allowed_tools(choice, tools)
    elif isinstance(choice, dict):
        name = _function_of(choice).get("name")
        if choice.get("type", "function") != "function" or not isinstance(name, str):
            _refuse_choice()
        choice, allowed = "required", [_named(name, tools)]
    if not isinstance(choice, str) or choice not in ("auto", "none", "required", "any"):
        _refuse_choice()
    if choice == "none":
        return ToolChoice(mode="none")
    if choice != "auto" and not tools:
        raise RequestError(f"tool_choice: {choice!r} without tools to call; pass tools", "tool_choice")
    return ToolChoice(tools, allowed, "auto" if choice == "auto" else "required", is_parallel)


def _read_allowed_tools(choice: dict[str, Any], tools: list[Any] | None) -> tuple[Any, list[Any]]:
    # OpenAI's client nests the list, its documents of the Responses API do not.
    inner = choice.get("allowed_tools", choice)
    names = inner.get("tools") if isinstance(inner, dict) else None
    if not isinstance(names, list) or not names:
        _refuse_choice()
    wanted = [_function_of(each).get("name", each.get("name") if isinstance(each, dict) else None) for each in names]
    allowed = [_named(name, tools) for name in wanted]
    mode = inner.get("mode", "auto")
    if mode not in ("auto", "required"):
        _refuse_choice()
    return mode, allowed


def _named(name: Any, tools: list[Any] | None) -> Any:
    for tool in tools or ():
        if _function_of(tool).get("name") == name:
            return tool
    names = ", ".join(str(_function_of(tool).get("name")) for tool in tools or ()) or "none"
    raise RequestError(f"tool_choice: there is no tool {name!r}; the tools are {names}; choose one", "tool_choice")


def _refuse_choice() -> NoReturn:
    raise RequestError(
        'tool_choice: must be "auto", "none", "required" or {"type": "function", "function": {"name": …}}; correct it',
        "tool_choice",
    )


def read_response_format(given: Fields) -> dict[str, Any] | None:
    """Read the format of the response: text, an object, or JSON under a schema."""
    form = given.mapping("response_format")
    if form is None:
        return None
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        given.refuse("response_format", 'an object of type "text", "json_object" or "json_schema"')
    definition = form.get("json_schema")
    if kind == "json_schema" and not (
        isinstance(definition, dict) and isinstance(definition.get("schema"), dict | bool)
    ):
        given.refuse("response_format", '{"type": "json_schema", "json_schema": {"name": …, "schema": …}}')
    return form


def _read_stream_options(given: Fields, is_streamed: bool) -> bool:
    options = given.mapping("stream_options")
    if options is None:
        return False
    if not is_streamed:
        raise RequestError("stream_options: only of a request with stream; leave it out, or stream", "stream_options")
    inner = Fields(options, "stream_options")
    inner.check_names({"include_usage"}, {"include_obfuscation": (False,)})
    return inner.flag("include_usage")


def _read_max_tokens(given: Fields) -> tuple[int | None, str]:
    limits = {
        name: value
        for name in ("max_tokens", "max_completion_tokens")
        if (value := given.whole(name, 1, 2**31)) is not None
    }
    if len(set(limits.values())) > 1:
        raise RequestError("max_tokens and max_completion_tokens: differ; leave one of the two out", "max_tokens")
    return next(((value, name) for name, value in limits.items()), (None, "max_tokens"))


def _read_stop(given: Fields) -> tuple[str, ...]:
    stop: Any = given.given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    fits = (
        isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(each, str) and each for each in stops)
    )
    if not fits:
        given.refuse("stop", f"a string, or a list of at most {MOST_STOPS} strings, none of them empty")
    return tuple(stops)


def _read_logprobs(given: Fields) -> int | None:
    wanted = given.flag("logprobs")
    top = given.whole("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top and not wanted:
        raise RequestError(
            "top_logprobs: only of a request with logprobs: true; add it, or leave it out", "top_logprobs"
        )
    return (top or 0) if wanted else None


def read_sampling(given: Fields) -> dict[str, Any]:
    """Read how tokens are chosen; what is not given is left out."""
    top_k = given.whole("top_k", -1, 2**31)
    seeds = {name: given.whole(name, -(2**63), LARGEST_SEED) for name in ("seed", "random_seed")}
    if len({seed for seed in seeds.values() if seed is not None}) > 1:
        raise RequestError("seed and random_seed: differ; leave one of the two out", "seed")
    asked = {
        "temperature": given.number("temperature", SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE, or_zero=True),
        "top_p": given.number("top_p", 0, 1),
        # -1 is another word for all tokens.
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": given.number("min_p", 0, 1),
        "seed": next((seed for seed in seeds.values() if seed is not None), None),
        "frequency_penalty": given.number("frequency_penalty", -2, 2),
        "presence_penalty": given.number("presence_penalty", -2, 2),
        "repetition_penalty": given.number("repetition_penalty", 0.01, 100),
        "logit_bias": _read_logit_bias(given),
    }
    return {name: value for name, value in asked.items() if value is not None}


def _read_logit_bias(given: Fields) -> dict[int, float] | None:
    biases = given.mapping("logit_bias", "an object with a bias for token ids")
    if not biases:
        return None
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and is_number(bias) and -100 <= bias <= 100):
            given.refuse("logit_bias", 'an object of token ids and biases from -100 to 100, as {"1234": -100}')
    return {int(token): float(bias) for token, bias in biases.items()}

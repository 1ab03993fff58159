"""Requests for chat completions to `transformers serve`, read strictly: each parameter is obeyed, or refused.

By itself that server drops what it does not know (images, `response_format`, `tool_choice`, `n`, …) and samples only
where the folder says so.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_large_conversion.errors import MistralLargeError
from mistral_large_conversion.vocabulary import CONTROL_TOKENS

# Carries a request's seed to the thread that generates.
SEED_NAME = "request_seed"
# Logits divided by less overflow; divided by more, all tokens are alike.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.001, 1000

# Parameters that this server does not have, and the values that ask for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template_kwargs": ({},),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "generation_config": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "stop": ([],),
    "store": (False,),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# About the request and not about its response.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")
READ = (
    *("model", "messages", "tools", "tool_choice", "stream", "stream_options"),
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"),
)


class RequestError(MistralLargeError, ValueError):
    """A request that the server cannot serve as it is meant; `parameter` is the one it is about."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class ChatRequest:
    """What a request for a chat completion asks for, in the types that it must have."""

    messages: list[Any]
    tools: list[Any] | None
    may_call_tools: bool
    is_streamed: bool
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None


def read_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Read the JSON of a request.

    Raises:
        RequestError: a parameter that is unknown, of another type, out of its range, or that this server cannot obey.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in READ and name not in LABELS:
            _check_neutral(name, value)
    messages = _read(given, "messages", list, "a list of messages")
    if not messages:
        raise RequestError("messages: there are none; a conversation has at least one; pass a user message", "messages")
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        raise RequestError(
            "messages: the last one is the assistant's; this server cannot continue it; end with a user message or a "
            "tool's result",
            "messages",
        )
    for index, message in enumerate(messages):
        _check_arguments(message, f"messages[{index}]")
    tools, may_call = _read_tools(given)
    is_streamed = bool(_read(given, "stream", bool, "true or false"))
    options = _read(given, "stream_options", dict, "an object")
    if options is not None and (not is_streamed or options.keys() - {"include_usage"}):
        raise RequestError(
            "stream_options: only include_usage is known, of a request with stream; leave the rest out",
            "stream_options",
        )
    return ChatRequest(
        messages=messages,
        tools=tools,
        may_call_tools=may_call,
        is_streamed=is_streamed,
        max_tokens=_read_max_tokens(given),
        temperature=_read_number(
            given,
            "temperature",
            lambda value: value == 0 or SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE,
            f"0 or a number from {SMALLEST_TEMPERATURE} to {LARGEST_TEMPERATURE}",
        ),
        top_p=_read_number(given, "top_p", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        seed=_read_whole(given, "seed", -(2**63), 2**63 - 1),
    )


def _check_arguments(message: Any, where: str) -> None:
    """Refuse calls whose arguments are no JSON: a text of the tokenizer's, but not of this API's.

    All else about messages is the format's to refuse, when the prompt is made.
    """
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"{where}: arguments of a call: {error}; they are the JSON text of an object; correct them",
                    "messages",
                ) from error


def _check_neutral(name: str, value: Any) -> None:
    if name not in NEUTRAL:
        raise RequestError(f"{name}: no such parameter here; it would have no effect; leave it out", name)
    # 0, 0.0 and false are equal to Python.
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
        raise RequestError(f"{name}: this server cannot obey it; leave it out, or serve with vLLM", name)


def _read(given: Mapping[str, Any], name: str, kind: type, rule: str) -> Any:
    value = given.get(name)
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{name}: must be {rule}; correct it", name)
    if value is None and name == "messages":
        raise RequestError(f"{name}: missing; pass {rule}", name)
    return value


def _read_whole(given: Mapping[str, Any], name: str, smallest: int, largest: int) -> int | None:
    value = given.get(name)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and smallest <= value <= largest):
        raise RequestError(f"{name}: must be a whole number from {smallest} to {largest}; correct it", name)
    return value


def _read_number(given: Mapping[str, Any], name: str, fits: Callable[[float], bool], rule: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
        raise RequestError(f"{name}: must be {rule}; correct it", name)
    return float(value)


def _read_max_tokens(given: Mapping[str, Any]) -> int | None:
    limits = {
        value
        for name in ("max_tokens", "max_completion_tokens")
        if (value := _read_whole(given, name, 1, 2**31)) is not None
    }
    if len(limits) > 1:
        raise RequestError("max_tokens and max_completion_tokens: differ; leave one of the two out", "max_tokens")
    return limits.pop() if limits else None


def _read_tools(given: Mapping[str, Any]) -> tuple[list[Any] | None, bool]:
    """Return the tools of the prompt, and whether the response may call any."""
    tools = _read(given, "tools", list, "a list of tool definitions") or None
    choice = given.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError(
            "tool_choice: this server can obey auto and none only; choose one of them, or serve with vLLM",
            "tool_choice",
        )
    return (None, False) if choice == "none" else (tools, True)


def generation_options(request: ChatRequest, of_model: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """Return a generation config for a request; what it leaves open is `of_model`'s, the folder's own."""
    options = {**of_model, "max_new_tokens": max_tokens}
    # transformers would only choose among the 50 most likely tokens.
    options.setdefault("top_k", 0)
    if request.temperature == 0:
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
        options["do_sample"] = False
    else:
        asked = {"temperature": request.temperature, "top_p": request.top_p}
        asked = {name: value for name, value in asked.items() if value is not None}
        options |= asked | ({"do_sample": True} if asked else {})
    if not options.get("do_sample"):
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
    if not request.may_call_tools:
        options["suppress_tokens"] = [*(options.get("suppress_tokens") or []), CONTROL_TOKENS["[TOOL_CALLS]"]]
    if request.seed is not None:
        options[SEED_NAME] = request.seed
    return options

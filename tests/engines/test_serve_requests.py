"""What is no request for our server, who may ask it, and clients that go away."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.errors import SettingError
from modeling_mistral_large.serving import create_app
from modeling_mistral_large.serving.access import AccessGuard
from modeling_mistral_large.serving.batching import ContinuousBatching
from modeling_mistral_large.serving.chat_request import KNOWN
from modeling_mistral_large.serving.json_fields import MOST_BODY_BYTES
from modeling_mistral_large.serving.responses_request import KNOWN as KNOWN_OF_RESPONSES
from tests.support.folders import CHATML_TEMPLATE

from .clients import GOLDEN, request_of
from .in_process import NAME, InProcess, serving
from .servers import HOST

QUESTION: list[Any] = [{"role": "user", "content": "Who are you?"}]
SMALL: dict[str, Any] = {"messages": QUESTION, "max_tokens": 1, "temperature": 0}
# Of each type, of odd values, and junk inside of what has the right one.
WRONG: list[Any] = [
    *(5, -1, 0, 1.5, 10**30, True, False, "x", "", "\x00", "é", [], {}, [5], [[]], [{}], ["x", "x"]),
    *({"a": 5}, {"": {}}, {"type": 5}, {"type": "function"}, {"type": "json_schema", "json_schema": {"schema": 5}}),
    *([{"type": "function"}], [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]),
    *([{"role": 5, "content": {}}], [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    *([{"role": "tool", "tool_call_id": [], "content": None}], {"5": "x"}, {"-1": 0}, {"99999999": 1}, {"5": 1000}),
]
NESTED = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BODIES = {
    "cut off": b"{",
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "nothing": b"",
    "no UTF-8": b"\xff",
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "brackets": b"[" * 100_000,
    "nested": NESTED,
    "nested schema": b'{"messages": [], "response_format": ' + b'{"a": ' * 500 + b"1" + b"}" * 500 + b"}",
    "NaN": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}',
    "beyond floats": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "digits": b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 10_000 + b"}",
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a model": b'{"messages": [{"role": "user", "content": "a"}], "model": "\\udfff"}',
    "half a name": b'{"messages": [{"role": "user", "content": "a"}], "\\udfff": 5}',
    "a line break": b'{"messages": [{"role": "user", "content": "\n"}]}',
    "a form": b"messages=a&model=b",
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.fixture(scope="module")
def served(demo_folder: Path) -> Iterator[InProcess]:
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="float32")
    tokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    with serving(model, tokenizer) as server:
        yield server


def assert_refused(status: int, body: Any, expected: int = 400, parameter: str | None = None) -> None:
    assert status == expected, body
    error = body["error"]
    assert {*body} == {"error"}
    assert {*error} == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert parameter is None or error["param"] == parameter


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_no_value_of_any_parameter_is_an_error_of_the_server(served: InProcess, path: str) -> None:
    """Hundreds of requests; what is obeyed is HTTP 200, and all else says which parameter is wrong."""
    is_chat = path.endswith("completions")
    small = SMALL if is_chat else {"input": "Who are you?", "max_output_tokens": 1, "temperature": 0}
    statuses = []
    for name in [*sorted(KNOWN if is_chat else KNOWN_OF_RESPONSES), "no_such_parameter"]:
        for value in WRONG:
            request = {**small, name: value}
            status, body = served.send("POST", path, request)
            statuses.append(status)
            if status == 200:
                continue
            assert_refused(status, body, status)
            assert status in (400, 404), (name, value, body)
            assert body["error"]["param"] is not None, (name, value, body)
    assert statuses.count(400) > 0.7 * len(statuses) > 600


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_no_request(served: InProcess, path: str, case: str) -> None:
    assert_refused(*served.send("POST", path, BODIES[case]))


def test_a_body_has_a_limit(served: InProcess) -> None:
    body = b'{"messages": "' + b" " * MOST_BODY_BYTES + b'"}'
    assert_refused(*served.send("POST", "/v1/chat/completions", body), expected=413)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "x"])
def test_other_types_of_content_are_refused(served: InProcess, kind: str) -> None:
    status, body = served.chat(SMALL, Content_Type=kind)
    assert_refused(status, body, 415)
    assert served.chat(SMALL, Content_Type="application/json; charset=utf-8")[0] == 200


def with_call(arguments: Any) -> list[Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}
    return [*QUESTION, {"role": "assistant", "tool_calls": [call]}, result]


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}, PICTURE]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [5]}]}, "messages"),
        ({"messages": with_call("{bad")}, "messages"),
        ({"messages": with_call("[" * 100_000)}, "messages"),
        ({"messages": with_call("{}")[:2]}, "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}]}, None),
        ({"messages": [{"role": "user", "content": "hi " * 131072}]}, "messages"),
        ({"max_tokens": 131072}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 131072}, "max_completion_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "chat_template_kwargs"),
        ({"generation_config": "{}"}, "generation_config"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"logit_bias": {"32768": 1}}, "logit_bias"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_a_mistake_of_the_client(
    served: InProcess, options: dict[str, Any], parameter: str | None
) -> None:
    for is_streamed in (False, True):
        assert_refused(*served.chat({**SMALL, **options, "stream": is_streamed}), parameter=parameter)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{bad"}]}, None),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 131072}, "max_output_tokens"),
        ({"input": []}, None),
    ],
    ids=str,
)
def test_what_no_response_can_be_is_a_mistake_of_the_client(
    served: InProcess, options: dict[str, Any], parameter: str | None
) -> None:
    request = {"input": "Who are you?", "max_output_tokens": 1, **options}
    for is_streamed in (False, True):
        status, body = served.send("POST", "/v1/responses", {**request, "stream": is_streamed})
        assert_refused(status, body, parameter=parameter)


def test_what_asks_for_nothing_is_taken(served: InProcess) -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "stop": [],
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "tools": [],
        "parallel_tool_calls": True,
        "user": "somebody",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": False,
        "logit_bias": {},
        "modalities": ["text"],
        "chat_template_kwargs": {},
        "stream": False,
        "reasoning_effort": None,
        "safe_prompt": False,
        "seed": None,
        "prompt_cache_key": "a",
        "audio": None,
        "repetition_penalty": 1,
    }
    plain = served.chat({**SMALL, "max_tokens": 20})[1]
    status, body = served.chat({**SMALL, "max_tokens": 20, **neutral})
    assert (status, body["choices"]) == (200, plain["choices"])


# Names


def test_another_model_is_not_found(served: InProcess) -> None:
    for status, body in (
        served.chat({**SMALL, "model": "another"}),
        served.send("POST", "/v1/responses", {"model": "another", "input": "a"}),
        served.send("GET", "/v1/models/another"),
    ):
        assert_refused(status, body, 404, "model")
        assert body["error"]["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("another")


def test_every_name_of_the_model_is_served(served: InProcess) -> None:
    names = ["large", "owner/name"]
    with serving(served.model, served.tokenizer, model_names=names) as server:
        assert [model.id for model in server.client.models.list()] == names
        assert server.send("GET", "/v1/models")[1]["data"][1]["max_model_len"] == 131072
        assert server.client.models.retrieve("owner/name").id == "owner/name"
        for name in names:
            assert server.client.chat.completions.create(**{**SMALL, "model": name}).model == name
        assert server.send("POST", "/v1/chat/completions", SMALL)[1]["model"] == "large"
    with pytest.raises(SettingError, match="model_names: there are none"):
        create_app(served.model, served.tokenizer, model_names=[])


# Access


@pytest.mark.parametrize(
    ("origin", "asked_host", "host", "is_let_in"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "127.0.0.1", True),
        ("http://localhost:8000", "localhost:8000", "127.0.0.1", True),
        ("http://[::1]:8000", "[::1]:8000", "::1", True),
        (None, "localhost:8000", "127.0.0.1", True),
        ("http://evil.example", "127.0.0.1:8000", "127.0.0.1", False),
        ("http://127.0.0.1:9000", "127.0.0.1:8000", "127.0.0.1", False),
        ("null", "127.0.0.1:8000", "127.0.0.1", False),
        ("", "127.0.0.1:8000", "127.0.0.1", False),
        ("http://[", "127.0.0.1:8000", "127.0.0.1", False),
        # A name that its owner has made to lead here; a page under it reads without an origin, too.
        ("http://evil.example:8000", "evil.example:8000", "127.0.0.1", False),
        (None, "evil.example:8000", "127.0.0.1", False),
        (None, "[", "127.0.0.1", False),
        ("http://model.example", "model.example", "0.0.0.0", True),
        ("http://evil.example", "model.example", "0.0.0.0", False),
        (None, "model.example", "0.0.0.0", True),
        ("http://known.example", "127.0.0.1:8000", "127.0.0.1", True),
    ],
)
def test_pages_of_other_sites_are_told_apart(origin: str | None, asked_host: str, host: str, is_let_in: bool) -> None:
    headers = [(b"host", asked_host.encode())] + ([] if origin is None else [(b"origin", origin.encode())])
    assert _let_in(AccessGuard, headers, host=host, origins=["http://known.example"]) is is_let_in


def _let_in(guard: Any, headers: list[tuple[bytes, bytes]], **options: Any) -> bool:
    reached = []

    async def app(*_: Any) -> None:
        reached.append(True)

    async def send(_: Any) -> None: ...

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": headers}
    asyncio.run(guard(app, **options)(scope, None, send))
    return bool(reached)


def test_only_those_with_the_key_are_served(served: InProcess) -> None:
    with serving(served.model, served.tokenizer, api_key="right") as server:
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"Authorization": "Basic right"},
        ):
            for status, body in (server.chat(SMALL, **given), server.send("GET", "/v1/models", **given)):
                assert_refused(status, body, 401)
                assert body["error"]["code"] == "invalid_api_key"
        assert server.chat(SMALL, Authorization="Bearer right")[0] == 200
        assert server.send("GET", "/health") == (200, {"status": "ok"})
        url = f"http://{HOST}:{server.port}/v1"
        assert OpenAI(base_url=url, api_key="right").models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=url, api_key="wrong").models.list()
        # A name of a proxy: nobody without the key gets in.
        assert server.chat(SMALL, Authorization="Bearer right", Host="model.example")[0] == 200
    for key in ("", " a", "a b\n", "ä"):
        with pytest.raises(SettingError, match=r"^api_key: "):
            create_app(served.model, served.tokenizer, api_key=key)


def test_a_site_that_is_let_in_is_answered_its_first_question(served: InProcess) -> None:
    site = "https://chat.example"
    with serving(served.model, served.tokenizer, api_key="right", cors_origins=[site]) as server:
        asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
        from http.client import HTTPConnection

        connection = HTTPConnection(HOST, server.port)
        headers = {"Origin": site, **{name.replace("_", "-"): text for name, text in asked.items()}}
        connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
        response = connection.getresponse()
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, site)
        connection.close()
        assert server.chat(SMALL, Authorization="Bearer right", Origin=site)[0] == 200
        assert server.chat(SMALL, Authorization="Bearer right", Origin="https://other.example")[0] == 403


# Clients that go away


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("others", [0, 3])
def test_a_client_that_goes_away_frees_its_place(served: InProcess, is_streamed: bool, others: int) -> None:
    """One place: as long as it is taken, nobody else is answered; the queue is left as well."""
    endless = {"model": NAME, **SMALL, "max_tokens": 100_000, "logit_bias": {"2": -100}, "stream": is_streamed}
    with serving(served.model, served.tokenizer, engine=ContinuousBatching(served.model, max_batch=1)) as server:
        body = json.dumps(endless).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        connections = []
        for _ in range(1 + others):
            connection = socket.create_connection((HOST, server.port))
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connections.append(connection)
        time.sleep(1)
        with pytest.raises(openai.APITimeoutError):
            server.client.with_options(timeout=0.5).chat.completions.create(**{**SMALL, "model": NAME})
        for connection in connections:
            connection.close()
        begin = time.monotonic()
        assert server.chat(SMALL)[0] == 200
        assert time.monotonic() - begin < 1


# Models with a chat template of their own


def test_a_template_of_its_own_has_plain_responses(served: InProcess) -> None:
    tokenizer: Any = MistralLargeTokenizer.from_pretrained(served.tokenizer.name_or_path)
    tokenizer.chat_template = CHATML_TEMPLATE
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    output = served.model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    expected = tokenizer.decode(output, skip_special_tokens=True)
    with serving(served.model, tokenizer) as server:
        status, body = server.chat({**SMALL, "max_tokens": 12})
        assert (status, body["choices"][0]["message"]["content"]) == (200, expected)
        for options in (
            {"response_format": {"type": "json_object"}},
            {"tools": GOLDEN["weather_call"].tools, "tool_choice": "required"},
        ):
            assert_refused(*server.chat({**SMALL, **options}), parameter=[*options][-1])
        roles: list[Any] = ["nobody", 5, None]
        contents: list[Any] = [5, [PICTURE], {}, [5]]
        junk: list[Any] = [5, "a", *({"role": role, "content": "a"} for role in roles)]
        for message in [*junk, *({"role": "user", "content": content} for content in contents)]:
            messages = [message]
            assert_refused(*server.chat({**SMALL, "messages": messages}), parameter="messages")


def test_events_have_the_shape_that_clients_read(served: InProcess) -> None:
    request = {**request_of(GOLDEN["weather_parallel_call"], NAME), "stream": True}
    with served.client.chat.completions.with_streaming_response.create(
        **request, stream_options={"include_usage": True}
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [
        None,
        None,
        None,
        "tool_calls",
    ]
    calls = [call for chunk in chunks[1:3] for call in chunk["choices"][0]["delta"]["tool_calls"]]
    assert [call["index"] for call in calls] == [0, 1]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert (chunks[-1]["choices"], {*chunks[-1]["usage"]["prompt_tokens_details"]}) == ([], {"cached_tokens"})
    assert len({chunk["id"] for chunk in chunks}) == 1

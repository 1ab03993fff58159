"""Schemas, tool choices and adapters on vLLM through the plugin, in both formats.

Run by `.ci/vllm`, in an environment with vLLM. MISTRAL_LARGE_SCHEMAS is the number of random schemas of each kind.
"""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from mistral_large_conversion import convert_checkpoint
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.adapters import save_peft_adapter
from tests.support.random_schemas import random_object, random_schema

from .clients import GOLDEN, MODEL, ask, client_of, request_of, wire_messages
from .servers import Server
from .vllm_options import SPACE, serving

SCHEMAS = int(os.environ.get("MISTRAL_LARGE_SCHEMAS", "100"))
CLIENTS = 8
MOST_TOKENS = 1000


@pytest.fixture(scope="module", params=["v3", "v7"])
def server(
    request: pytest.FixtureRequest,
    demo_folder: Path,
    demo_folder_of_v7: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = demo_folder if request.param == "v3" else demo_folder_of_v7
    log_file = tmp_path_factory.mktemp("served") / "log"
    with serving(request.param, folder, log_file, is_by_us=True) as server:
        yield server


def request_with(**options: Any) -> dict[str, Any]:
    messages = wire_messages(GOLDEN["who_are_you"].messages)
    return {"model": MODEL, "messages": messages, "temperature": 1, "max_tokens": MOST_TOKENS, **options}


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_random_schemas_are_kept_to(server: Server) -> None:
    client = client_of(server)

    def problem(seed: int) -> str | None:
        schema = random_schema(random.Random(seed))
        form = {"type": "json_schema", "json_schema": {"name": "value", "schema": schema}}
        answer = ask(client, request_with(response_format=form, seed=seed))
        try:
            # In strings of a most length, xgrammar 0.2.8 lets tabs through unescaped.
            jsonschema.validate(json.loads(answer.content.replace("\t", " ")), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return f"{seed}: {schema}: {answer}: {error}"
        return None if answer.finish_reason == "stop" else f"{seed}: {answer}"

    with ThreadPoolExecutor(CLIENTS) as threads:
        assert [found for found in threads.map(problem, range(SCHEMAS)) if found] == []


def test_calls_are_of_the_tools_that_may_be_called(server: Server) -> None:
    client = client_of(server)

    def problem(seed: int) -> str | None:
        rng = random.Random(seed)
        schemas = {name: random_object(rng) for name in rng.sample(["first", "second", "third"], rng.randrange(1, 4))}
        tools = [tool(name, schema) for name, schema in schemas.items()]
        named = rng.choice([*schemas])
        choice = rng.choice(["auto", "none", "required", {"type": "function", "function": {"name": named}}])
        answer = ask(client, request_with(tools=tools, tool_choice=choice, seed=seed))
        # With `auto`, vLLM leaves the model free, also to call what there is not.
        may: set[str] | None = (
            {"none": set(), "required": {*schemas}}.get(choice) if isinstance(choice, str) else {named}
        )
        is_required = choice not in ("auto", "none")
        if may is not None and not {call["name"] for call in answer.calls} <= may:
            return f"{seed}: {choice}: {answer}"
        if is_required and not answer.calls:
            return f"{seed}: {choice}: {answer}"
        if not is_required:
            return None
        try:
            for call in answer.calls:
                jsonschema.validate(call["arguments"], schemas[call["name"]])
        except jsonschema.ValidationError as error:
            return f"{seed}: {choice}: {answer}: {error}"
        return None

    with ThreadPoolExecutor(CLIENTS) as threads:
        assert [found for found in threads.map(problem, range(SCHEMAS)) if found] == []


def test_an_adapter_answers_as_the_checkpoint_that_it_is_merged_into(demo_folder: Path, tmp_path: Path) -> None:
    save_peft_adapter(demo_folder, tmp_path / "tuned", lora_alpha=24)
    convert_checkpoint(demo_folder, tmp_path / "merged", adapter=tmp_path / "tuned", dtype="fp32")
    tokenizer: Any = MistralLargeTokenizer.from_pretrained(tmp_path / "merged")
    model: Any = MistralLargeForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    options = ("--adapter", str(tmp_path / "tuned"))
    with serving("adapter", demo_folder, tmp_path / "log", options, is_by_us=True) as server:
        client: OpenAI = client_of(server)
        assert {served.id for served in client.models.list()} == {MODEL, "tuned"}
        for name in ("pirate", "window_cleaner"):
            golden = GOLDEN[name]
            prompt = tokenizer.apply_chat_template(golden.messages, add_generation_prompt=True, return_tensors="pt")
            output = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
            expected = tokenizer.decode(output, skip_special_tokens=True)
            # Or the test could not tell an adapter that was left out.
            assert not golden.answer.startswith(expected)
            # What this adapter writes begins with a space or without one; `decode` drops it.
            tuned = ask(client, request_of(golden, "tuned") | {"max_tokens": 12}).content
            assert (tuned or "").removeprefix(SPACE) == expected
            assert ask(client, request_of(golden)).content == SPACE + golden.answer

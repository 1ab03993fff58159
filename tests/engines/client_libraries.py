"""The tool loop and the structured output of each client library, in its own way, against a server at an address.

The libraries are in two environments, see `.ci/clients`, so that each function imports its own.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mistral_large_cli.demo import get_current_weather, golden_conversations
from tests.support.markdown import blocks

ROOT = Path(__file__).parents[2]
MODEL = "mistral-large"
QUESTION = "What's the weather like in Paris?"
(TOOL,) = golden_conversations()["weather_call"].tools or []
NAME: str = TOOL["function"]["name"]
DESCRIPTION: str = TOOL["function"]["description"]
PARAMETERS: dict[str, Any] = TOOL["function"]["parameters"]


class Weather(BaseModel):
    """The weather report that structured output is asked for."""

    city: Literal["Paris", "London"]
    formats: list[Literal["celsius", "fahrenheit"]] = Field(min_length=1, max_length=2)
    is_sunny: bool


# From the address of a server, `http://host:port/v1`, to what the library returns.
Run = Callable[[str], Any]


def user(text: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": text}]


def openai_client(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=url, api_key="none", max_retries=0)


def openai_tools(url: str) -> str:
    messages = user()
    request: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": [TOOL], "temperature": 0}
    message = openai_client(url).chat.completions.create(**request).choices[0].message
    # As the library has it, with all of its empty fields.
    messages.append(message)
    for call in message.tool_calls:
        result = get_current_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    return str(openai_client(url).chat.completions.create(**request).choices[0].message.content)


def openai_structure(url: str) -> Any:
    completions = openai_client(url).chat.completions
    return (
        completions.parse(model=MODEL, messages=user(), response_format=Weather, temperature=0)
        .choices[0]
        .message.parsed
    )


def responses_tools(url: str) -> str:
    responses = openai_client(url).responses
    tools: list[Any] = [{"type": "function", "strict": False, **TOOL["function"]}]
    items = user()
    request: dict[str, Any] = {"model": MODEL, "tools": tools, "temperature": 0, "store": False}
    output = responses.create(input=items, **request).output
    items += output
    for call in output:
        assert call.type == "function_call"
        result = str(get_current_weather(**json.loads(call.arguments)))
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    return str(responses.create(input=items, **request).output_text)


def responses_structure(url: str) -> Any:
    responses = openai_client(url).responses
    return responses.parse(model=MODEL, input=QUESTION, text_format=Weather, temperature=0).output_parsed


def mistralai_client(url: str) -> Any:
    from mistralai.client import Mistral

    return Mistral(api_key="none", server_url=url.removesuffix("/v1"))


def mistralai_tools(url: str) -> str:
    client = mistralai_client(url)
    messages = user()
    request: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": [TOOL], "temperature": 0}
    message = client.chat.complete(**request).choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        result = str(get_current_weather(**json.loads(call.function.arguments)))
        messages.append({"role": "tool", "name": call.function.name, "tool_call_id": call.id, "content": result})
    # The second one streamed: chunks are checked by the library field by field.
    events = client.chat.stream(**request)
    return "".join(event.data.choices[0].delta.content or "" for event in events)


def mistralai_structure(url: str) -> Any:
    client = mistralai_client(url)
    return client.chat.parse(Weather, model=MODEL, messages=user(), temperature=0).choices[0].message.parsed


def litellm_options(url: str) -> dict[str, Any]:
    # The list of prices is fetched otherwise.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    return {"model": f"openai/{MODEL}", "api_base": url, "api_key": "none", "temperature": 0}


def litellm_tools(url: str) -> str:
    options = litellm_options(url)
    from litellm import completion

    messages = user()
    message = completion(messages=messages, tools=[TOOL], **options).choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        result = str(get_current_weather(**json.loads(call.function.arguments)))
        messages.append({"role": "tool", "name": call.function.name, "tool_call_id": call.id, "content": result})
    return str(completion(messages=messages, tools=[TOOL], **options).choices[0].message.content)


def litellm_structure(url: str) -> Any:
    options = litellm_options(url)
    from litellm import completion

    content = completion(messages=user(), response_format=Weather, **options).choices[0].message.content
    return Weather.model_validate_json(content)


def langchain_openai_model(url: str) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=url, api_key=lambda: "none", model=MODEL, temperature=0, max_retries=0)


def langchain_mistralai_model(url: str) -> Any:
    from langchain_mistralai import ChatMistralAI

    return ChatMistralAI(endpoint=url, api_key="none", model=MODEL, temperature=0)


def langchain_tools(model: Callable[[str], Any]) -> Run:
    def run(url: str) -> str:
        from langchain.agents import create_agent
        from langchain_core.tools import StructuredTool

        tool = StructuredTool(name=NAME, description=DESCRIPTION, args_schema=PARAMETERS, func=get_current_weather)
        messages = create_agent(model(url), [tool]).invoke({"messages": user()})["messages"]
        return str(messages[-1].content)

    return run


def langchain_structure(model: Callable[[str], Any], **options: Any) -> Run:
    return lambda url: model(url).with_structured_output(Weather, **options).invoke(QUESTION)


def pydantic_ai_agent(url: str, **options: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="none"))
    return Agent(model, model_settings={"temperature": 0}, **options)


def pydantic_ai_tools(url: str) -> str:
    from pydantic_ai import Tool

    tool: Any = Tool.from_schema(get_current_weather, NAME, DESCRIPTION, PARAMETERS)
    return str(pydantic_ai_agent(url, tools=[tool]).run_sync(QUESTION).output)


def pydantic_ai_structure(url: str) -> Any:
    from pydantic_ai import NativeOutput

    # By a tool that must be called, and by a schema of the response.
    by_tool = pydantic_ai_agent(url, output_type=Weather).run_sync(QUESTION).output
    assert isinstance(by_tool, Weather)
    return pydantic_ai_agent(url, output_type=NativeOutput(Weather)).run_sync(QUESTION).output


def smolagents_model(url: str) -> Any:
    from smolagents import OpenAIModel

    return OpenAIModel(model_id=MODEL, api_base=url, api_key="none", temperature=0)


def smolagents_tools(url: str) -> str:
    from smolagents import Tool, ToolCallingAgent

    class WeatherTool(Tool):  # type: ignore[misc, unused-ignore]
        name = NAME
        description = DESCRIPTION
        inputs = PARAMETERS["properties"]
        output_type = "integer"

        def forward(self, location: str, format: str) -> int:
            return get_current_weather(location, format)

    tool, model = WeatherTool(), smolagents_model(url)
    # Its agent always requires a call, ends with that of a tool of its own, and writes earlier ones as text, which the
    # demo model was not trained on: of its loop, the first round is looked at.
    agent = ToolCallingAgent([tool], model, max_steps=1, verbosity_level=0)
    agent.run(QUESTION)
    (call,) = agent.memory.steps[1].tool_calls
    assert call.name in agent.tools
    (call,) = model.generate(user(), tools_to_call_from=[tool], tool_choice="auto").tool_calls
    assert call.function.name == NAME
    return str(tool(**json.loads(call.function.arguments)))


def smolagents_structure(url: str) -> Any:
    format_ = {
        "type": "json_schema",
        "json_schema": {"name": "weather", "schema": Weather.model_json_schema(), "strict": True},
    }
    return Weather.model_validate_json(smolagents_model(url).generate(user(), response_format=format_).content)


def openai_agents_answer(model: Literal["chat", "responses"], url: str, **options: Any) -> Any:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    kind: Any = OpenAIChatCompletionsModel if model == "chat" else OpenAIResponsesModel
    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    settings = ModelSettings(temperature=0)
    agent = Agent("assistant", model=kind(MODEL, openai_client=client), model_settings=settings, **options)
    return asyncio.run(Runner.run(agent, QUESTION)).final_output


def openai_agents_tools(model: Literal["chat", "responses"]) -> Run:
    def run(url: str) -> str:
        from agents import FunctionTool

        async def invoke(_: Any, arguments: str) -> str:
            return str(get_current_weather(**json.loads(arguments)))

        tool = FunctionTool(NAME, DESCRIPTION, PARAMETERS, invoke, strict_json_schema=False)
        return str(openai_agents_answer(model, url, tools=[tool]))

    return run


def openai_agents_structure(model: Literal["chat", "responses"]) -> Run:
    return lambda url: openai_agents_answer(model, url, output_type=Weather)


# The library takes the parameters of a tool from a function's signature or from such a plugin.
LLM_TOOLS = f"""
import llm
from mistral_large_cli.demo import get_current_weather
tool = llm.Tool({NAME!r}, {DESCRIPTION!r}, {PARAMETERS!r}, get_current_weather)
answer = llm.get_model({MODEL!r}).chain({QUESTION!r}, tools=[tool], options={{"temperature": 0}})
print(answer.text())
"""


def write_model_of_llm(folder: Path, url: str) -> None:
    """Write the list of models in the library's folder, as docs/clients.md has it."""
    (block,) = (block for block in blocks(ROOT, "docs/clients.md") if block.mark == "needs llm")
    text = block.code.replace("http://127.0.0.1:8000/v1", url)
    (folder / "extra-openai-models.yaml").write_text(text, encoding="utf-8")


def llm_output(url: str, command: list[str]) -> str:
    """What a command of the library prints, with this model among its own."""
    with TemporaryDirectory() as folder:
        write_model_of_llm(Path(folder), url)
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        result = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def llm_tools(url: str) -> str:
    return llm_output(url, ["-c", LLM_TOOLS])


def llm_structure(url: str) -> Any:
    schema = json.dumps(Weather.model_json_schema())
    options = ["--model", MODEL, "--option", "temperature", "0", "--schema", schema]
    return Weather.model_validate_json(llm_output(url, ["-m", "llm", "prompt", QUESTION, *options]))


def llama_index_model(url: str, **options: Any) -> Any:
    from llama_index.llms.openai_like import OpenAILike

    kinds = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 131_072}
    return OpenAILike(model=MODEL, api_base=url, api_key="none", temperature=0, max_retries=0, **kinds, **options)


def llama_index_tools(url: str) -> str:
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.tools import FunctionTool, ToolMetadata

    class Metadata(ToolMetadata):  # type: ignore[misc, unused-ignore]
        def get_parameters_dict(self) -> dict[str, Any]:
            return PARAMETERS

    tool = FunctionTool(get_current_weather, Metadata(DESCRIPTION, NAME))
    agent = FunctionAgent(tools=[tool], llm=llama_index_model(url))

    async def run() -> str:
        return str(await agent.run(QUESTION))

    return asyncio.run(run())


def llama_index_structure(url: str) -> Any:
    # By a tool that must be called, and by a schema of the response.
    by_tool = llama_index_model(url).as_structured_llm(Weather).complete(QUESTION).raw
    assert isinstance(by_tool, Weather)
    model = llama_index_model(url, should_use_structured_outputs=True)
    return model.as_structured_llm(Weather).complete(QUESTION).raw


class GetCurrentWeather(BaseModel):
    """Get the current weather"""

    model_config = ConfigDict(title=NAME)
    location: Literal["Paris, France", "London, UK"]
    format: Literal["celsius", "fahrenheit"]


def instructor_answer(url: str, mode: str, model: type[BaseModel]) -> Any:
    import instructor

    client = instructor.from_openai(openai_client(url), mode=instructor.Mode[mode])
    return client.create(model=MODEL, messages=user(), response_model=model, temperature=0, max_retries=0)


def instructor_tools(url: str) -> str:
    # The library calls no function: the arguments are its answer, of a schema that the demo model was not trained on.
    call = instructor_answer(url, "TOOLS", GetCurrentWeather)
    assert isinstance(call, GetCurrentWeather)
    return NAME


def instructor_structure(url: str) -> Any:
    assert isinstance(instructor_answer(url, "TOOLS", Weather), Weather)
    return instructor_answer(url, "JSON_SCHEMA", Weather)

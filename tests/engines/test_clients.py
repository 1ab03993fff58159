"""Client libraries against both engines: the blocks of docs/clients.md, tool loops, structured output.

Run by `.ci/clients`, in environments with the libraries and without torch. The servers run in environments of their
own: MISTRAL_LARGE_SERVE_WITH_VLLM and MISTRAL_LARGE_SERVE_WITH_TRANSFORMERS are the paths of `mistral-large` there. An
engine without its variable is left out.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mistral_large_cli.demo import golden_conversations
from tests.support.markdown import Block, blocks

from . import client_libraries as libraries
from .client_libraries import MODEL, Run, Weather
from .servers import Server, free_port, running
from .vllm_options import ENVIRONMENT, OPTIONS, SPACE

ROOT = Path(__file__).parents[2]
# The last one counts where two differ.
REQUIREMENTS = [ROOT / ".ci" / name for name in ("clients-requirements-2.txt", "clients-requirements.txt")]
ANSWERS = {name: golden.answer for name, golden in golden_conversations().items()}
ENGINES = [name for name in ("vllm", "transformers") if f"MISTRAL_LARGE_SERVE_WITH_{name.upper()}" in os.environ]
TRANSFORMERS_OPTIONS = ("--device-map", "cpu", "--dtype", "float32")


@dataclass(frozen=True)
class Library:
    """What is run of a library; its hello is in docs/clients.md.

    told: what the tool loop must return, the answer made of the result unless said otherwise.
    """

    distribution: str
    tools: Run
    structure: Run
    told: str = ANSWERS["weather_answer"]


openai_model, mistralai_model = libraries.langchain_openai_model, libraries.langchain_mistralai_model
LIBRARIES = {
    "openai": Library("openai", libraries.openai_tools, libraries.openai_structure),
    "openai, responses": Library("openai", libraries.responses_tools, libraries.responses_structure),
    "mistralai": Library("mistralai", libraries.mistralai_tools, libraries.mistralai_structure),
    "litellm": Library("litellm", libraries.litellm_tools, libraries.litellm_structure),
    "langchain-openai": Library(
        "langchain-openai", libraries.langchain_tools(openai_model), libraries.langchain_structure(openai_model)
    ),
    "langchain-mistralai": Library(
        "langchain-mistralai",
        libraries.langchain_tools(mistralai_model),
        libraries.langchain_structure(mistralai_model),
    ),
    "llama-index": Library(
        "llama-index-llms-openai-like", libraries.llama_index_tools, libraries.llama_index_structure
    ),
    "instructor": Library("instructor", libraries.instructor_tools, libraries.instructor_structure, libraries.NAME),
    "pydantic-ai": Library("pydantic-ai-slim", libraries.pydantic_ai_tools, libraries.pydantic_ai_structure),
    "smolagents": Library("smolagents", libraries.smolagents_tools, libraries.smolagents_structure, "22"),
    "openai-agents": Library(
        "openai-agents", libraries.openai_agents_tools("responses"), libraries.openai_agents_structure("responses")
    ),
    "openai-agents, chat": Library(
        "openai-agents", libraries.openai_agents_tools("chat"), libraries.openai_agents_structure("chat")
    ),
    "llm": Library("llm", libraries.llm_tools, libraries.llm_structure),
}


def is_installed(distribution: str, version: str) -> bool:
    try:
        return importlib.metadata.version(distribution) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def installed() -> list[str]:
    """The libraries of this environment, in the version of the table; the others are in the other one."""
    return [name for name, library in LIBRARIES.items() if is_installed(library.distribution, TABLE[name][0])]


def pinned() -> dict[str, str]:
    """The versions of the libraries in their environments."""
    lines = [line for file in REQUIREMENTS for line in file.read_text().splitlines() if "==" in line]
    return dict(line.split("==") for line in lines)


def table() -> dict[str, list[str]]:
    """Cells of the table of docs/serving.md, by client."""
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8").partition("\n## Clients\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {client: cells for client, *cells in rows[2:]}


TABLE = table()
every_library = pytest.mark.parametrize("library", installed())


def works(library: str, engine: str, column: int) -> bool:
    """Whether the table says yes; if not, it must say no."""
    cell = TABLE[library][1 + 3 * ["vllm", "transformers"].index(engine) + column]
    assert re.fullmatch(r"yes|no [¹²³]", cell)
    return cell == "yes"


def check(run: Callable[[], Any], is_expected: bool) -> Any:
    """Return what a run returns where it is expected to work; elsewhere it must fail."""
    if is_expected:
        return run()
    with pytest.raises(Exception, match=r"."):
        run()
    return None


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    engine = str(request.param)
    command = Path(os.environ[f"MISTRAL_LARGE_SERVE_WITH_{engine.upper()}"])
    scratch = tmp_path_factory.mktemp(engine)
    convert = "import sys, pathlib, mistral_large_cli.demo as d; d.convert_demo_checkpoint(pathlib.Path(sys.argv[1]))"
    subprocess.run([command.with_name("python"), "-c", convert, str(scratch / "demo")], check=True, cwd=ROOT)
    port = free_port()
    options = OPTIONS if engine == "vllm" else TRANSFORMERS_OPTIONS
    name = ("--port", str(port), "--served-model-name", MODEL)
    start = [str(command), "serve", str(scratch / "demo"), "--engine", engine, *name, *options]
    environment = ENVIRONMENT if engine == "vllm" else {}
    with running(engine, start, port=port, log_file=scratch / "log", environment=environment) as server:
        yield server


def said(server: Server, text: str) -> str:
    """What was said: answers of vLLM begin with the space that the format has before a text."""
    return text.removeprefix(SPACE) if server.name == "vllm" else text


def hello(library: str) -> Block:
    (block,) = (block for block in blocks(ROOT, "docs/clients.md") if block.mark == f"needs a server: {library}")
    return block


@every_library
def test_the_documented_hello_is_answered(served: Server, library: str, tmp_path: Path) -> None:
    block = hello(library)
    assert works(library, served.name, 0)
    code = block.code.replace("http://127.0.0.1:8000", served.url)
    if library == "llm":
        libraries.write_model_of_llm(tmp_path, served.url + "/v1")
    else:
        assert code != block.code
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LLM_USER_PATH": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    command = Block(block.document, block.line, block.language, code, block.mark).command(sys.executable)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert said(served, result.stdout) == ANSWERS["who_are_you"] + "\n"


@every_library
def test_the_tool_loop_ends_with_its_answer(served: Server, library: str) -> None:
    is_expected = works(library, served.name, 1)
    told = check(lambda: LIBRARIES[library].tools(f"{served.url}/v1"), is_expected)
    if is_expected:
        assert said(served, told) == LIBRARIES[library].told


@every_library
def test_the_structured_output_is_of_its_type(served: Server, library: str) -> None:
    is_expected = works(library, served.name, 2)
    answer = check(lambda: LIBRARIES[library].structure(f"{served.url}/v1"), is_expected)
    assert isinstance(answer, Weather) == is_expected


@pytest.mark.skipif("openai" not in installed(), reason="the other environment has an older one")
def test_models_and_streams_are_as_openai_reads_them(served: Server) -> None:
    client = libraries.openai_client(f"{served.url}/v1")
    assert [model.id for model in client.models.list()] == [MODEL]
    request = {"model": MODEL, "messages": libraries.user("Who are you?"), "temperature": 0}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said(served, streamed) == said(served, whole.choices[0].message.content) == ANSWERS["who_are_you"]
    # The second one finds its prompt in the cache.
    counts = [(chunk.usage.prompt_tokens, chunk.usage.completion_tokens) for chunk in chunks if chunk.usage]
    assert counts == [(whole.usage.prompt_tokens, whole.usage.completion_tokens)]
    events = list(client.responses.create(model=MODEL, input="Who are you?", temperature=0, stream=True))
    assert said(served, events[-1].response.output_text) == ANSWERS["who_are_you"]
    deltas = (event.delta for event in events if event.type == "response.output_text.delta")
    assert "".join(deltas) == events[-1].response.output_text


def test_the_table_has_every_library_in_its_tested_version() -> None:
    assert list(TABLE) == list(LIBRARIES)
    versions = pinned()
    assert {name: cells[0] for name, cells in TABLE.items()} == {
        name: versions[library.distribution] for name, library in LIBRARIES.items()
    }
    assert installed()

"""What the tests of all engines share: the log of a server in the report of a test that failed, and the oracle."""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .servers import Server

# The environment of the client libraries has no torch.
if TYPE_CHECKING:
    from modeling_mistral_large import MistralLargeTokenizer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log of the server in the report of a test that failed."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Server):
                report.sections.append((f"log of the server: {value.name}", value.log()))
    return report


@pytest.fixture(scope="session")
def demo_tokenizer(demo_folder: Path) -> "MistralLargeTokenizer":
    return _tokenizer(demo_folder)


@pytest.fixture(scope="session")
def generated_ids(demo_folder: Path, demo_tokenizer: "MistralLargeTokenizer") -> Callable[..., list[int]]:
    """The oracle: what `generate` continues messages and tools with, greedily and in fp32."""
    return _continuations(demo_folder, demo_tokenizer)


@pytest.fixture(scope="session")
def tokenizer_of_v7(demo_folder_of_v7: Path) -> "MistralLargeTokenizer":
    return _tokenizer(demo_folder_of_v7)


@pytest.fixture(scope="session")
def generated_ids_of_v7(demo_folder_of_v7: Path, tokenizer_of_v7: "MistralLargeTokenizer") -> Callable[..., list[int]]:
    """The oracle for the demo model of v7."""
    return _continuations(demo_folder_of_v7, tokenizer_of_v7)


def _tokenizer(folder: Path) -> "MistralLargeTokenizer":
    from modeling_mistral_large import MistralLargeTokenizer

    tokenizer: MistralLargeTokenizer = MistralLargeTokenizer.from_pretrained(folder)
    return tokenizer


def _continuations(folder: Path, tokenizer: "MistralLargeTokenizer") -> Callable[..., list[int]]:
    from modeling_mistral_large import MistralLargeForCausalLM

    model: Any = MistralLargeForCausalLM.from_pretrained(folder, dtype="float32")

    def continuation(messages: list[Any], tools: list[Any] | None = None) -> list[int]:
        inputs = tokenizer.apply_chat_template(messages, tools, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=100)
        ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return ids

    return continuation

"""Every test of this folder that asks for a tokenizer or a prompt runs once for each instruct format."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.instruct.formats import FORMATS
from modeling_mistral_large.instruct.prompt import Segment, build_prompt
from tests.support import checkpoints

BuildPrompt: TypeAlias = Callable[..., list[Segment]]


@pytest.fixture(scope="session", params=FORMATS)
def prompt_format(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tokenizer_model_file(prompt_format: str) -> Path:
    return checkpoints.tokenizer_model_file(prompt_format)


@pytest.fixture(scope="session")
def reference_tokenizer(tokenizer_model_file: Path) -> Any:
    return MistralTokenizer.from_file(str(tokenizer_model_file))


@pytest.fixture(scope="session")
def tokenizer(prompt_format: str, tmp_path_factory: pytest.TempPathFactory) -> MistralLargeTokenizer:
    """Ours, from a folder that holds nothing but the vendor's SentencePiece file."""
    return checkpoints.vendor_tokenizer(tmp_path_factory.mktemp("tokenizer"), prompt_format)


@pytest.fixture(scope="session", name="build_prompt")
def build_prompt_of_format(prompt_format: str) -> BuildPrompt:
    return partial(build_prompt, prompt_format=prompt_format)

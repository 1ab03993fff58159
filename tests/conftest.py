"""Fixtures that several test files share: the real tokenizer file, the oracles, a tiny geometry, the demo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

from mistral_large_cli.demo import convert_demo_checkpoint
from mistral_large_conversion import hf_files
from mistral_large_conversion.tokenizer import tokenizer_files
from modeling_mistral_large import MistralLargeConfig, MistralLargeTokenizer
from tests.support import checkpoints


@pytest.fixture(scope="session")
def tokenizer_model_file() -> Path:
    return checkpoints.tokenizer_model_file()


@pytest.fixture(scope="session")
def sentencepiece_processor(tokenizer_model_file: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(tokenizer_model_file))


@pytest.fixture(scope="session")
def reference_tokenizer(tokenizer_model_file: Path) -> Any:
    return MistralTokenizer.from_file(str(tokenizer_model_file))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> MistralLargeTokenizer:
    """Ours, from a folder that holds nothing but tokenizer.model.v3."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model.v3").write_bytes(tokenizer_model_file.read_bytes())
    tokenizer: MistralLargeTokenizer = MistralLargeTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo checkpoint, converted to the HF layout."""
    return convert_demo_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def tiny_config() -> MistralLargeConfig:
    """A geometry in which no two sizes are alike, so that a swap cannot pass."""
    return MistralLargeConfig(
        vocab_size=768,
        hidden_size=80,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session")
def converted_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model.v3").write_bytes(checkpoints.tokenizer_model_file().read_bytes())
    return tokenizer_files(folder, vocab_size=32768)


@pytest.fixture
def known_tokenizer(converted_tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is converted once for all tests that are not about it; so weights of any vocabulary do."""
    monkeypatch.setattr(hf_files, "tokenizer_files", lambda *_, **__: converted_tokenizer)


@pytest.fixture
def small_source(tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None) -> Path:
    tiny_config.vocab_size = 768
    checkpoints.write_consolidated(tmp_path / "source", tiny_config, torch.bfloat16)
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240724)

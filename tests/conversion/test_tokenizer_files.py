"""tokenizer.json in a converted folder: recognised by its bytes, or made again from the vendor's file."""

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import models

from mistral_large_conversion import tokenizer as tokenizer_module
from mistral_large_conversion.checkpoint.layout import TOKENIZER_NAME
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.sentencepiece_bpe import load_sentencepiece_bpe
from mistral_large_conversion.tokenizer import MADE_FROM_VENDOR, tokenizer_files, tokenizer_problems
from mistral_large_conversion.vocabulary import KNOWN_FILES, VOCAB_SIZE, VOCABULARIES
from tests.support.checkpoints import tokenizer_model_file
from tests.support.errors import raises_exactly

pytestmark = pytest.mark.ground_floor


@pytest.fixture
def folder(converted_tokenizer: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in converted_tokenizer.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_known_checksums_are_of_what_is_made_from_the_vendors_files(vocabulary: str) -> None:
    model = tokenizer_model_file(vocabulary)
    assert KNOWN_FILES[sha256(model.read_bytes()).hexdigest()] == vocabulary
    made = load_sentencepiece_bpe(model).to_str(pretty=True).encode()
    assert sha256(made).hexdigest() == MADE_FROM_VENDOR[vocabulary]


def test_a_conversion_writes_what_is_known(converted_tokenizer: dict[str, bytes]) -> None:
    assert sha256(converted_tokenizer["tokenizer.json"]).hexdigest() == MADE_FROM_VENDOR["v3"]


def test_what_is_not_known_is_read_again_before_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / TOKENIZER_NAME
    path.write_bytes(tokenizer_model_file().read_bytes())
    # A reader that loses all merges.
    lossy = load_sentencepiece_bpe(path)
    lossy.model = models.BPE(vocab=lossy.get_vocab(), merges=[], unk_token="<unk>", byte_fallback=True)
    monkeypatch.setattr(tokenizer_module, "Tokenizer", SimpleNamespace(from_buffer=lambda _: lossy))
    assert tokenizer_files(tmp_path, vocab_size=VOCAB_SIZE)
    monkeypatch.setattr(tokenizer_module, "MADE_FROM_VENDOR", {"v3": "another"})
    with raises_exactly(CheckpointError, f"{path}: converted ids of ' ' are not SentencePiece's"):
        tokenizer_files(tmp_path, vocab_size=VOCAB_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE - 1, VOCAB_SIZE + 2, 768])
def test_known_files_are_judged_as_if_made_again(
    folder: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "load_sentencepiece_bpe", None)
        at_once = tokenizer_problems(folder, vocab_size=vocab_size)
    monkeypatch.setattr(tokenizer_module, "MADE_FROM_VENDOR", {})
    assert at_once == tokenizer_problems(folder, vocab_size=vocab_size)
    rows = [] if vocab_size >= VOCAB_SIZE else [f"has 32768 tokens, the weights have {vocab_size} rows"]
    assert at_once == [f"tokenizer.json {problem}" for problem in rows]


def test_known_files_are_known_by_every_byte(folder: Path) -> None:
    made = (folder / "tokenizer.json").read_bytes()
    merge = made.rindex(b'"') - 2
    (folder / "tokenizer.json").write_bytes(made[:merge] + bytes([made[merge] ^ 1]) + made[merge + 1 :])
    assert tokenizer_problems(folder, vocab_size=VOCAB_SIZE)
    (folder / "tokenizer.json").write_bytes(made)
    model = (folder / "tokenizer.model.v3").read_bytes()
    (folder / "tokenizer.model.v3").write_bytes(model.replace("▁t".encode(), "▁T".encode(), 1))
    assert tokenizer_problems(folder, vocab_size=VOCAB_SIZE)


@pytest.mark.slow
def test_other_bytes_of_the_same_tokenizer_are_compared_by_content(folder: Path) -> None:
    compact = load_sentencepiece_bpe(folder / "tokenizer.model.v3").to_str().encode()
    assert compact != (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(compact)
    assert tokenizer_problems(folder, vocab_size=VOCAB_SIZE) == []

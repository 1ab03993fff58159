"""What the tests of the converter remember of vocabularies is what is made each time."""

import json
from pathlib import Path

import pytest

from mistral_large_conversion import folder_tokenizer, read_folder_tokenizer, sentencepiece_bpe
from mistral_large_conversion.errors import TokenizerFileError
from mistral_large_conversion.sentencepiece_bpe import build_backend
from mistral_large_conversion.sentencepiece_model import sentencepiece_model
from tests.support import remembered
from tests.support.checkpoints import tokenizer_model_file

pytestmark = pytest.mark.ground_floor


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["v3", "v7"])
def test_what_is_remembered_is_what_is_made(vocabulary: str, tmp_path: Path) -> None:
    processor = sentencepiece_bpe.load_processor(tokenizer_model_file(vocabulary))
    pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    made = build_backend(pieces).to_str()
    assert vars(folder_tokenizer)["build_backend"] is remembered.build_backend is not build_backend
    first = remembered.build_backend(pieces)
    first.add_tokens(["more"])
    # Whatever is added to one is not in the next.
    assert remembered.build_backend(pieces).to_str() == made
    assert remembered.sentencepiece_model(pieces) == sentencepiece_model(pieces)
    (tmp_path / "tokenizer.json").write_text(made)
    for _ in range(2):
        read = remembered.read_tokenizer_json(tmp_path / "tokenizer.json")
        assert read.to_str() == made
        read.add_tokens(["more"])
        read.enable_padding()
    parsed = remembered.read_json_object(tmp_path / "tokenizer.json")
    assert read_folder_tokenizer(tmp_path, layout="hf").pieces == tuple(pieces)
    # What is remembered is still what the file says.
    assert parsed == json.loads(made)
    assert remembered.read_json_object(tmp_path / "tokenizer.json") is parsed
    first.save(str(tmp_path / "tokenizer.json"))
    assert remembered.read_tokenizer_json(tmp_path / "tokenizer.json").to_str() == first.to_str()
    with pytest.raises(TokenizerFileError, match="no such file"):
        remembered.read_tokenizer_json(tmp_path / "none")

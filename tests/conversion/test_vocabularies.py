"""Both vocabularies: recognised by their pieces, and encoded as SentencePiece encodes them."""

import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from mistral_large_conversion.checkpoint.read import vocabulary_problem
from mistral_large_conversion.errors import CheckpointError, TokenizerFileError
from mistral_large_conversion.sentencepiece_bpe import (
    TextEncoder,
    build_backend,
    clone_backend,
    load_sentencepiece_bpe,
    small_words,
    vocabulary_of,
)
from mistral_large_conversion.vocabulary import (
    TEXT_IDS,
    VOCABULARIES,
    find_vocabulary,
    known_vocabulary,
    recognize_pieces,
)
from modeling_mistral_large import MistralLargeTokenizer
from tests.support.checkpoints import tokenizer_model_file
from tests.support.errors import raises_exactly
from tests.support.texts import mixed_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=VOCABULARIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def processor(name: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(tokenizer_model_file(name)))


@pytest.fixture(scope="module")
def pieces(processor: SentencePieceProcessor) -> list[str]:
    names: list[str] = processor.id_to_piece(list(range(32768)))
    return names


@pytest.fixture(scope="module")
def texts(pieces: list[str]) -> list[str]:
    user_defined = [*pieces[749:771], "[REF]", "[/REF]", "[REFERENCE_DOC_1]"]
    glued = [
        text
        for piece in user_defined
        for text in (
            piece,
            f"a{piece}b",
            f"[{piece}]{piece}[/{piece}",
            f" {piece} [INST]</s>{piece}](x)",
            piece[1:] + "]",
        )
    ]
    return [*glued, "[/REF](x) [REF];REF] REF]", *mixed_texts(pieces[:1027], seed=11, count=3000)]


def test_data_of_a_vocabulary(name: str, processor: SentencePieceProcessor, pieces: list[str]) -> None:
    vocabulary = VOCABULARIES[name]
    control = [index for index in range(1027) if processor.is_control(index) or processor.is_unknown(index)]
    assert list(vocabulary.control_ids) == control
    is_other = [not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i)) for i in range(1027)]
    assert list(vocabulary.user_defined_ids) == [index for index in range(1027) if is_other[index]]
    assert {token: pieces[index] for token, index in vocabulary.control_tokens.items()} == {
        token: token for token in vocabulary.control_tokens
    }
    assert all(pieces[index] == piece for index, piece in vocabulary.fixed_pieces.items())
    assert sorted(vocabulary.fixed_pieces) == [*range(10), *range(14, TEXT_IDS.start)]
    # What the merges of `build_backend` rest on.
    scores = [
        score for i, score in enumerate(processor.get_score(list(TEXT_IDS)), TEXT_IDS.start) if pieces[i].strip("▁")
    ]
    assert scores == sorted(set(scores), reverse=True)


def test_ids_are_sentencepieces(name: str, processor: SentencePieceProcessor, texts: list[str]) -> None:
    backend = load_sentencepiece_bpe(tokenizer_model_file(name))
    encode = TextEncoder(backend)
    as_text = clone_backend(backend, added=[])
    expected = processor.encode(texts)
    assert [encode(text) for text in texts] == expected
    assert [as_text.encode(text).ids[1:] for text in texts] == expected


def test_user_defined_pieces_as_text(name: str, texts: list[str]) -> None:
    # SentencePiece takes no control piece from a text: the oracle is the model in which these are such pieces.
    model = re.sub(
        rb"((?:\[REFERENCE_DOC_\d+\]|\[/?REF\])\x15\x00{4}\x18)\x04",
        b"\\1\x03",
        tokenizer_model_file(name).read_bytes(),
    )
    processor = SentencePieceProcessor(model_proto=model)
    backend = load_sentencepiece_bpe(tokenizer_model_file(name))
    encode = TextEncoder(backend, reference_documents_as_text=True)
    as_text = clone_backend(backend, added=[], reference_documents_as_text=True)
    expected = processor.encode(texts)
    assert [encode(text) for text in texts] == expected
    assert [as_text.encode(text).ids[1:] for text in texts] == expected


def test_no_piece_spans_a_cut_at_a_user_defined_piece(pieces: list[str]) -> None:
    spanning = re.compile(r"[A-Za-z0-9][\]>]|.\[REF|.\[/REF|\[R|\[/|F\]")
    assert [piece for piece in pieces[TEXT_IDS.start :] if spanning.search(piece)] == []


def test_user_defined_pieces_are_small_words(name: str, pieces: list[str]) -> None:
    vocabulary = VOCABULARIES[name]
    for index in vocabulary.user_defined_ids:
        assert small_words(vocabulary, f"▁x{pieces[index]}[") == ["▁x", pieces[index], "["]


def test_the_pieces_alone_make_the_backend(name: str, pieces: list[str]) -> None:
    assert recognize_pieces(pieces) == name
    backend = build_backend([*pieces, "<|im_start|>"])
    assert backend.to_str() == load_sentencepiece_bpe(tokenizer_model_file(name)).to_str()
    assert vocabulary_of(backend) is VOCABULARIES[name]
    backend.add_tokens(["<|im_start|>"])
    assert vocabulary_of(backend) is VOCABULARIES[name]


def test_other_pieces_are_not_recognised(pieces: list[str]) -> None:
    for index in (0, 3, 14, 18, 384, 749, 760, 800, 1027, 32767):
        assert recognize_pieces([*pieces[:index], "other", *pieces[index + 1 :]]) is None, index
        assert recognize_pieces([*pieces[:index], None, *pieces[index + 1 :]]) is None, index
    assert recognize_pieces(pieces[:-1]) is None
    # Neither format uses them, and fine-tunes name them anew.
    assert recognize_pieces([*pieces[:10], *("<|a|>", None, "[control_10]", "x"), *pieces[14:]]) is not None


def test_a_file_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    assert find_vocabulary(tmp_path) is None
    for file_name in ("tokenizer.model", f"tokenizer.model.{name}"):
        (tmp_path / file_name).write_bytes(tokenizer_model_file(name).read_bytes())
        assert find_vocabulary(tmp_path) == tmp_path / file_name
        assert known_vocabulary(tmp_path / file_name) == name


def test_errors_name_the_vocabulary_that_is_nearest(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model.v7"
    model = tokenizer_model_file("v7").read_bytes()
    rule = (
        "this package reads the v3 and v7 SentencePiece models of Mistral-Large-Instruct-2407 and 2411; pass a folder "
        "with tokenizer.model.v3 or .v7, or with the files that save_pretrained wrote"
    )
    cases = {
        "piece 18 is '[TOOL_CONTENX]', v7's is '[TOOL_CONTENT]'": (b"[TOOL_CONTENT]", b"[TOOL_CONTENX]"),
        "other pieces than v7's for text": ("▁window".encode(), "▁windoe".encode()),
    }
    for problem, (old, new) in cases.items():
        path.write_bytes(model.replace(old, new, 1))
        with pytest.raises(TokenizerFileError) as error:
            load_sentencepiece_bpe(path)
        assert str(error.value) == f"{path}: {problem}; {rule}"


def test_two_vocabularies_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = assemble_demo_checkpoint(tmp_path / "demo")
    (folder / "tokenizer.model.v7").write_bytes(tokenizer_model_file("v7").read_bytes())
    message = (
        f"{folder}: tokenizer.model.v3 and tokenizer.model.v7: the vocabularies of two models; a checkpoint has one; "
        "remove the file that is not of this checkpoint"
    )
    with raises_exactly(TokenizerFileError, message):
        find_vocabulary(folder)
    assert vocabulary_problem(folder) == message
    assert inspect_checkpoint(folder).problems == (message,)
    checks = {check.name: check for check in verify_checkpoint(folder, progress=False)}
    assert (checks["tokenizer"].is_ok, checks["tokenizer"].detail) == (False, message)
    with raises_exactly(
        CheckpointError,
        f"{folder} is not a complete consolidated checkpoint; nothing was done, fix or download it again:\n  {message}",
    ):
        convert_checkpoint(folder, tmp_path / "out", progress=False)
    with raises_exactly(TokenizerFileError, message):
        MistralLargeTokenizer.from_pretrained(folder)
    assert not (tmp_path / "out").exists()

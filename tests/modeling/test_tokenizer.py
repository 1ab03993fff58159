"""The tokenizer against SentencePiece and mistral-common: whole id lists, texts, offsets, files."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE
from transformers import AutoTokenizer, BatchEncoding, DataCollatorForLanguageModeling

from mistral_large_conversion import sentencepiece_bpe
from mistral_large_conversion.chat_templates import CHAT_TEMPLATES, RESPONSE_TEMPLATES
from mistral_large_conversion.errors import TokenizerFileError
from mistral_large_conversion.sentencepiece_bpe import TextEncoder, small_words
from mistral_large_conversion.vocabulary import PAD, V3, find_vocabulary, known_vocabulary
from modeling_mistral_large import MistralLargeConfig, MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError, KeywordError
from modeling_mistral_large.generation.streaming import MistralLargeTextIteratorStreamer, MistralLargeTextStreamer
from tests.support.errors import raises_exactly, whole
from tests.support.texts import all_texts, mixed_texts

MIXED_TEXTS = 20_000
ID_LISTS = int(os.environ.get("MISTRAL_LARGE_ID_LISTS", "3000"))

CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi [INST] there"},
    {"role": "assistant", "content": "Hello, what can I do?"},
    {"role": "user", "content": "Sing  a song"},
]
TOOL_CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "What's the weather in Paris?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "VvvODy9mT", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "VvvODy9mT", "name": "weather", "content": "22"},
    {"role": "assistant", "content": "It is 22 degrees."},
]


@pytest.fixture(scope="module")
def pieces(sentencepiece_processor: SentencePieceProcessor) -> list[str]:
    names: list[str] = sentencepiece_processor.id_to_piece(list(range(32768)))
    return names


@pytest.fixture(scope="module")
def some_texts(pieces: list[str]) -> list[str]:
    """Mixtures without ▁, which no decoder can tell from a space."""
    return [text for text in mixed_texts(pieces[:1027], seed=5, count=3000) if "▁" not in text]


@pytest.fixture(scope="module")
def saved_files(tokenizer: MistralLargeTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` writes, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved_folder(saved_files: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return shutil.copytree(saved_files, tmp_path / "saved")


@pytest.fixture(scope="module")
def exact_json(tokenizer_model_file: Path) -> str:
    """The backend made of the vendor's file."""
    return MistralLargeTokenizer(vocab_file=str(tokenizer_model_file)).backend_tokenizer.to_str()


@pytest.fixture
def own(saved_files: Path) -> MistralLargeTokenizer:
    """One to be changed: loading it is cheaper than a copy of `tokenizer`."""
    return MistralLargeTokenizer.from_pretrained(saved_files)


# Ids


@pytest.mark.slow
def test_ids_of_100_000_texts_are_sentencepieces(
    tokenizer: MistralLargeTokenizer, sentencepiece_processor: SentencePieceProcessor, pieces: list[str]
) -> None:
    texts = all_texts(pieces, seed=20240724, mixtures=MIXED_TEXTS)
    assert len(texts) >= 100_000
    expected = sentencepiece_processor.encode(texts)
    wrong = [text for text, ids, own in zip(texts, expected, tokenizer.encode_texts(texts), strict=True) if ids != own]
    assert wrong == []


def test_pieces_are_numbered_by_score(sentencepiece_processor: SentencePieceProcessor, pieces: list[str]) -> None:
    # What the order of the merges rests on.
    scores = sentencepiece_processor.get_score(list(range(1027, 32768)))
    of_text = [score for score, piece in zip(scores, pieces[1027:], strict=True) if piece.strip("▁")]
    assert of_text == sorted(set(of_text), reverse=True)
    runs = {len(piece): score for score, piece in zip(scores, pieces[1027:], strict=True) if not piece.strip("▁")}
    assert runs == dict.fromkeys([*range(1, 15), 16], -1e9)


def test_no_piece_spans_the_end_of_a_word(pieces: list[str]) -> None:
    # What the words of the pre-tokenizer rest on, for every text and not only those that a test can try.
    spanning = re.compile(r"[^▁]▁|[A-Za-z0-9][\]>]|.\[REFERENCE_DOC_")
    assert [piece for piece in pieces[1027:] if spanning.search(piece)] == []


def test_no_piece_is_more_than_one_small_word(pieces: list[str]) -> None:
    # What the words that are remembered rest on: every cut inside a piece would show here.
    assert [piece for piece in pieces[751:771] + pieces[1027:] if small_words(V3, piece) != [piece]] == []


@pytest.mark.parametrize(
    ("marked_text", "words"),
    [
        ("▁▁a+12.5▁é(", ["▁▁a", "+", "1", "2", ".", "5", "▁é("]),
        ("▁7▁", ["▁", "7", "▁"]),
        ("▁abcé▁abc", ["▁abcé", "▁abc"]),
        ("▁-«x", ["▁-«x"]),
        (
            "▁[[REFERENCE_DOC_1]x[REFERENCE_DOC_2",
            ["▁[", "[REFERENCE_DOC_1]", "x", "[", "REFERENCE", "_", "DOC", "_", "2"],
        ),
    ],
)
def test_small_words(marked_text: str, words: list[str]) -> None:
    assert small_words(V3, marked_text) == words


@pytest.mark.slow
def test_reference_documents_as_text(
    tokenizer: MistralLargeTokenizer, tokenizer_model_file: Path, pieces: list[str]
) -> None:
    # SentencePiece takes no control piece from a text: the oracle is the model in which the documents are such pieces.
    model = re.sub(rb"(\[REFERENCE_DOC_\d+\]\x15\x00{4}\x18)\x04", b"\\1\x03", tokenizer_model_file.read_bytes())
    processor = SentencePieceProcessor(model_proto=model)
    documents = pieces[751:771]
    texts = [
        *documents,
        *(f"([{document}]{document}[REFERENCE_DOC_20]" for document in documents),
        *(
            text[:5] + documents[number % 20] + text[5:]
            for number, text in enumerate(mixed_texts(pieces[:1027], seed=3, count=500))
        ),
    ]
    with_added_token = copy.deepcopy(tokenizer)
    with_added_token.add_tokens(["<think>"])
    for own in (tokenizer, with_added_token):
        assert own.encode_texts(texts, reference_documents_as_text=True) == processor.encode(texts)
    (ids,) = with_added_token.encode_texts(["<think>[REFERENCE_DOC_3]"], reference_documents_as_text=True)
    assert with_added_token.decode(ids) == "<think>[REFERENCE_DOC_3]"
    assert not set(ids) & set(range(751, 771))


def test_remembered_words_are_few_and_short(
    tokenizer: MistralLargeTokenizer,
    some_texts: list[str],
    sentencepiece_processor: SentencePieceProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sentencepiece_bpe, "MOST_WORDS", 7)
    monkeypatch.setattr(sentencepiece_bpe, "LONGEST_WORD", 5)
    encode = TextEncoder(tokenizer.backend_tokenizer)
    most = longest = 0
    for text, ids in zip(some_texts, sentencepiece_processor.encode(some_texts), strict=True):
        assert encode(text) == ids
        most = max(most, len(encode._word_ids))
        longest = max(longest, *map(len, encode._word_ids), 0)
    assert (most, longest) == (7, 5)


@pytest.mark.slow
def test_ids_from_tokenizer_json(
    saved_folder: Path, tokenizer: MistralLargeTokenizer, pieces: list[str], some_texts: list[str]
) -> None:
    backend = Tokenizer.from_file(str(saved_folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    encodings = backend.encode_batch(some_texts, add_special_tokens=False)
    assert [encoding.ids for encoding in encodings] == tokenizer.encode_texts(some_texts)


def test_call_and_encode_put_one_bos(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Any, some_texts: list[str]
) -> None:
    reference = reference_tokenizer.instruct_tokenizer.tokenizer
    texts = ["", "Hello", " ", *(text for text in some_texts if not re.search(r"[\[<]", text))]
    expected = [reference.encode(text, bos=True, eos=False) for text in texts]
    assert all(ids.count(1) == 1 for ids in expected)
    assert tokenizer(texts)["input_ids"] == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == [ids[1:] for ids in expected]


def test_control_strings_are_tokens_where_asked_for(
    tokenizer: MistralLargeTokenizer, sentencepiece_processor: SentencePieceProcessor
) -> None:
    prompt = "<s>[INST] Hi [REFERENCE_DOC_2][/INST] Yes</s>"
    texts = sentencepiece_processor.encode(["Hi [REFERENCE_DOC_2]", "Yes"])
    assert tokenizer.encode(prompt, add_special_tokens=False) == [1, 3, *texts[0], 4, *texts[1], 2]
    as_text = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert as_text == sentencepiece_processor.encode(prompt) == tokenizer.encode_texts([prompt])[0]


def test_every_control_piece_is_a_token_of_its_own(tokenizer: MistralLargeTokenizer, pieces: list[str]) -> None:
    assert [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces[:751]] == [[i] for i in range(751)]
    assert tokenizer.convert_tokens_to_ids(pieces) == list(range(32768))
    assert tokenizer.pieces == pieces
    added = tokenizer.added_tokens_decoder
    assert {index: str(token) for index, token in added.items()} == dict(enumerate(pieces[:751]))
    assert all(token.special and not token.normalized for token in added.values())


# Text from ids


def test_decode_gives_the_text_back(
    tokenizer: MistralLargeTokenizer, sentencepiece_processor: SentencePieceProcessor, some_texts: list[str]
) -> None:
    ids = tokenizer.encode_texts(some_texts)
    assert tokenizer.batch_decode(ids) == sentencepiece_processor.decode(ids) == some_texts


@pytest.mark.slow
def test_decode_gives_prompts_back(tokenizer: MistralLargeTokenizer, some_texts: list[str]) -> None:
    # Here the control strings in the texts become control tokens.
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in some_texts]
    assert tokenizer.batch_decode(ids) == some_texts
    prompt = tokenizer.apply_chat_template(CONVERSATION[:1])["input_ids"]
    assert tokenizer.encode(tokenizer.decode(prompt)[: -len(" [INST] there[/INST]")]) == [1, *prompt[:3]]


def test_decode_of_any_ids_is_sentencepieces(
    tokenizer: MistralLargeTokenizer, sentencepiece_processor: SentencePieceProcessor
) -> None:
    rng = np.random.default_rng(7)
    rows = []
    for _ in range(ID_LISTS):
        # Half of the pieces are bytes, most of which make no character.
        length = rng.integers(1, 12)
        rows.append(
            np.where(rng.random(length) < 0.5, rng.integers(771, 1027, length), rng.integers(751, 32768, length))
        )
    # SentencePiece keeps a byte 0x20 at the start, which no text is encoded to.
    rows += [np.array([771 + 0x20, *row[:number]]) for number, row in enumerate(rows[:10])]
    ids = [row.tolist() for row in rows]
    assert tokenizer.batch_decode(ids) == sentencepiece_processor.decode(ids)
    assert tokenizer.decode(rows[0]) == tokenizer.decode(torch.tensor(rows[0])) == tokenizer.decode(ids[0])


def test_decode_of_a_cut_character_keeps_those_before_it(tokenizer: MistralLargeTokenizer) -> None:
    ids = tokenizer.encode_texts(["慹慹"])[0]
    assert tokenizer.decode([1, *ids[:-1], 2], skip_special_tokens=True) == "慹\ufffd\ufffd"
    assert tokenizer.decode([1, *ids[:-1], 2]) == "<s> 慹\ufffd\ufffd</s>"
    assert tokenizer.decode([*ids[:-1], 40_000]) == "慹\ufffd\ufffd"
    assert tokenizer.decode(ids[-1]) == "\ufffd"


def test_a_first_byte_piece_keeps_its_space(
    tokenizer: MistralLargeTokenizer, sentencepiece_processor: SentencePieceProcessor
) -> None:
    space = 771 + 0x20
    for rest in ([], tokenizer.encode_texts(["a"])[0], [space], [771 + 0xE6], [1027]):
        ids = [space, *rest]
        text = sentencepiece_processor.decode(ids)
        assert text.startswith(" ")
        assert tokenizer.decode(ids) == tokenizer.decode([1, 3, *ids, 2], skip_special_tokens=True) == text
        assert tokenizer.decode([4, *ids]) == f"[/INST]{text}"
        assert tokenizer.convert_tokens_to_string([tokenizer.pieces[index] for index in ids]) == text
        assert tokenizer.decode([1050, *ids]) == sentencepiece_processor.decode([1050, *ids])


def test_decode_skips_special_tokens(tokenizer: MistralLargeTokenizer) -> None:
    ids = [
        384,
        1,
        3,
        *tokenizer.encode_texts(["Hi [INST]"])[0],
        4,
        *tokenizer.encode_texts(["[REFERENCE_DOC_3]"])[0],
        2,
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi [INST] [REFERENCE_DOC_3]"
    assert tokenizer.decode(ids) == "[control_382]<s>[INST] Hi [INST][/INST] [REFERENCE_DOC_3]</s>"


def test_clean_up_of_spaces_is_off(tokenizer: MistralLargeTokenizer) -> None:
    text = "Is n't it ? Yes ."
    assert tokenizer.decode(tokenizer.encode_texts([text])[0]) == text


def test_convert_tokens_to_string(
    tokenizer: MistralLargeTokenizer, sentencepiece_processor: SentencePieceProcessor, some_texts: list[str]
) -> None:
    cut = sentencepiece_processor.id_to_piece(sentencepiece_processor.encode("慹慹")[:-1])
    rows = [*sentencepiece_processor.encode_as_pieces(some_texts), cut]
    assert [tokenizer.convert_tokens_to_string(row) for row in rows] == [*some_texts, "慹\ufffd\ufffd"]


@pytest.mark.slow
def test_decode_stream_gives_the_text_back(tokenizer: MistralLargeTokenizer, some_texts: list[str]) -> None:
    # The stream holds back a � at the end, which could be a character to come.
    texts = [text for text in some_texts if not text.endswith("\ufffd")]
    for text, ids in zip(texts, tokenizer.encode_texts(texts), strict=True):
        stream = DecodeStream(skip_special_tokens=True)
        parts = [stream.step(tokenizer.backend_tokenizer, index) or "" for index in ids]
        assert "".join(parts) == text


class CollectingStreamer(MistralLargeTextStreamer):
    parts: list[str]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)


@pytest.mark.slow
def test_text_streamer_gives_the_text_back(tokenizer: MistralLargeTokenizer, some_texts: list[str]) -> None:
    texts = ["def f(x):\n    if x:\n\n        return 1\n  \n", "慹慹", *some_texts[:200]]
    for text, ids in zip(texts, tokenizer.encode_texts(texts), strict=True):
        streamer = CollectingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.parts = []
        for part in ([1, 3, 4], *([index] for index in ids), [2]):
            streamer.put(torch.tensor(part))
        streamer.end()
        assert "".join(streamer.parts) == text
    assert len(streamer.parts) > 2


def test_text_iterator_streamer_gives_the_text_back(tokenizer: MistralLargeTokenizer) -> None:
    text = "for x in y:\n    print(x)\n"
    streamer = MistralLargeTextIteratorStreamer(tokenizer)
    for index in tokenizer.encode_texts([text])[0]:
        streamer.put(torch.tensor([[index]]))
    streamer.end()
    assert "".join(streamer) == text


@pytest.mark.parametrize("is_prompt_skipped", [True, False])
def test_text_streamer_goes_on_from_a_text(tokenizer: MistralLargeTokenizer, is_prompt_skipped: bool) -> None:
    whole = tokenizer.encode_texts(["I am a tiny\n  model of\n\n lines, unbelievably."])[0]
    for cut in range(1, len(whole)):
        begun = str(tokenizer.decode(whole[:cut]))
        streamer = CollectingStreamer(tokenizer, skip_prompt=is_prompt_skipped, skip_special_tokens=True)
        streamer.parts = []
        for part in ([1, 3, 4, *whole[:cut]], *([index] for index in whole[cut:]), [2]):
            streamer.put(torch.tensor(part))
        streamer.end()
        given = begun if is_prompt_skipped else ""
        assert given + "".join(streamer.parts) == tokenizer.decode(whole)


# Offsets


@pytest.mark.slow
def test_offsets_are_sentencepieces(
    tokenizer: MistralLargeTokenizer, sentencepiece_processor: SentencePieceProcessor, some_texts: list[str]
) -> None:
    encoding = tokenizer(some_texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    for row, text in enumerate(some_texts):
        expected = sentencepiece_processor.encode_as_offset_mapping(text)
        offsets = encoding["offset_mapping"][row]
        assert len(offsets) == len(expected["offsets"])
        for token, own, theirs in zip(encoding.tokens(row), offsets, expected["offsets"], strict=True):
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                # SentencePiece gives the character to its last byte, transformers to each of them.
                assert theirs in (own, (own[0], own[0]))
            else:
                assert own == theirs


def test_offsets_of_special_tokens_and_pairs(tokenizer: MistralLargeTokenizer) -> None:
    encoding = tokenizer("한국", " x</s>y", return_offsets_mapping=True)
    assert encoding.tokens() == ["<s>", "▁", "한", "국", "<s>", "▁", "▁x", "</s>", "y"]
    assert encoding["offset_mapping"] == [
        *((0, 0), (0, 0), (0, 1), (1, 2)),
        *((0, 0), (0, 0), (0, 2), (2, 6), (6, 7)),
    ]


# Special tokens


def test_sizes_and_special_tokens(tokenizer: MistralLargeTokenizer) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 32768
    assert tokenizer.model_max_length == MistralLargeConfig().max_position_embeddings
    assert tokenizer.special_tokens_map == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": PAD,
    }
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 384


def test_pad_token_means_nothing_in_any_vocabulary_of_the_vendor(tokenizer_model_file: Path) -> None:
    files = [path for path in tokenizer_model_file.parent.iterdir() if ".model.v" in path.name]
    processors = [SentencePieceProcessor(model_file=str(path)) for path in files]
    later = [processor for processor in processors if processor.get_piece_size() == 32768]
    assert len(later) >= 3
    assert {processor.id_to_piece(384) for processor in later} == {PAD}
    assert all(processor.is_control(384) for processor in later)


def test_batches_are_padded_on_the_left(tokenizer: MistralLargeTokenizer) -> None:
    batch = tokenizer(["a", "a long text"], padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    assert batch["input_ids"][0].tolist() == [384] * (length - 2) + tokenizer.encode("a")
    assert batch["attention_mask"][0].tolist() == [0] * (length - 2) + [1, 1]


def test_labels_keep_the_end_of_an_answer(tokenizer: MistralLargeTokenizer) -> None:
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    answers = [tokenizer.encode_texts([text])[0] + [2] for text in ("Yes", "No, not at all")]
    labels = collate([{"input_ids": ids} for ids in answers])["labels"].tolist()
    assert [[label for label in row if label != -100] for row in labels] == answers


@pytest.mark.slow
def test_bos_stays_where_eos_is_added(saved_folder: Path, tmp_path: Path) -> None:
    tokenizer = MistralLargeTokenizer.from_pretrained(saved_folder)
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (True, False)
    tokenizer.add_eos_token = True  # type: ignore[misc]
    assert tokenizer.encode("") == [1, 2]
    tokenizer.save_pretrained(tmp_path / "again")
    assert MistralLargeTokenizer.from_pretrained(tmp_path / "again").encode("") == [1, 2]
    assert MistralLargeTokenizer.from_pretrained(saved_folder, add_eos_token=True).encode("") == [1, 2]
    assert MistralLargeTokenizer.from_pretrained(saved_folder, add_bos_token=False).encode("") == []


# Files


@pytest.mark.slow
def test_save_writes_both_files_and_each_loads_alone(
    tokenizer: MistralLargeTokenizer, tokenizer_model_file: Path, saved_folder: Path, some_texts: list[str]
) -> None:
    assert {path.name for path in saved_folder.iterdir()} == {
        *("tokenizer.json", "tokenizer.model.v3", "tokenizer_config.json", "chat_template.jinja"),
        "modeling_mistral_large_remote.py",
    }
    assert (saved_folder / "tokenizer.model.v3").read_bytes() == tokenizer_model_file.read_bytes()
    assert (saved_folder / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATES["v3"]
    config = json.loads((saved_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "MistralLargeTokenizer"
    assert config["response_template"] == RESPONSE_TEMPLATES["v3"]
    assert str(tokenizer.vocab_file) not in json.dumps(config)
    assert "vocab" not in config
    ids = tokenizer.encode_texts(some_texts)
    assert MistralLargeTokenizer.from_pretrained(saved_folder).encode_texts(some_texts) == ids
    (saved_folder / "tokenizer.model.v3").rename(saved_folder / "kept")
    only_json = MistralLargeTokenizer.from_pretrained(saved_folder)
    assert only_json.encode_texts(some_texts) == ids
    assert only_json.apply_chat_template(TOOL_CONVERSATION) == tokenizer.apply_chat_template(TOOL_CONVERSATION)
    # What is not known cannot be written.
    only_json.save_pretrained(saved_folder / "again")
    assert not (saved_folder / "again" / "tokenizer.model.v3").exists()
    (saved_folder / "kept").rename(saved_folder / "tokenizer.model.v3")
    (saved_folder / "tokenizer.json").unlink()
    assert MistralLargeTokenizer.from_pretrained(saved_folder).encode_texts(some_texts) == ids


def test_tokenizer_json_is_parsed_once(saved_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes most of the time of loading a tokenizer."""
    parsed: list[str] = []

    def counted(path: str) -> Tokenizer:
        parsed.append(path)
        return sentencepiece_bpe.read_tokenizer_json(path)

    monkeypatch.setattr("modeling_mistral_large.tokenization_mistral_large.read_tokenizer_json", counted)
    MistralLargeTokenizer.from_pretrained(saved_folder)
    assert parsed == [str(saved_folder / "tokenizer.json")]


@pytest.mark.slow
def test_save_without_the_file_it_came_from(saved_folder: Path) -> None:
    tokenizer = MistralLargeTokenizer.from_pretrained(saved_folder)
    (saved_folder / "tokenizer.model.v3").unlink()
    tokenizer.save_pretrained(saved_folder / "again")
    assert MistralLargeTokenizer.from_pretrained(saved_folder / "again").encode("a") == tokenizer.encode("a")


@pytest.mark.slow
def test_save_into_the_folder_it_came_from(saved_folder: Path, tokenizer_model_file: Path) -> None:
    MistralLargeTokenizer.from_pretrained(saved_folder).save_pretrained(saved_folder)
    assert (saved_folder / "tokenizer.model.v3").read_bytes() == tokenizer_model_file.read_bytes()


def test_save_with_a_prefix(tokenizer: MistralLargeTokenizer, tmp_path: Path) -> None:
    files = tokenizer.save_pretrained(tmp_path, filename_prefix="large")
    # The module has the one name under which tokenizer_config.json names it.
    assert {Path(name).name for name in files if not Path(name).name.startswith("large-")} == {
        "modeling_mistral_large_remote.py"
    }
    assert {path.name for path in tmp_path.iterdir()} == {Path(name).name for name in files}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.model.v3", "renamed.model"])
def test_single_files_load(tokenizer_model_file: Path, tmp_path: Path, name: str) -> None:
    shutil.copyfile(tokenizer_model_file, tmp_path / name)
    expected = [1, *SentencePieceProcessor(model_file=str(tokenizer_model_file)).encode("a  b")]
    assert MistralLargeTokenizer.from_pretrained(tmp_path / name).encode("a  b") == expected
    own = MistralLargeTokenizer(vocab_file=str(tmp_path / name))
    assert own.encode("a  b") == expected
    own.save_pretrained(tmp_path)
    assert MistralLargeTokenizer.from_pretrained(tmp_path / "tokenizer.json").encode("a  b") == expected
    assert MistralLargeTokenizer(tokenizer_file=str(tmp_path / "tokenizer.json")).encode("a  b") == expected


@pytest.mark.slow
def test_under_its_other_name_the_vendors_file_is_known(tokenizer_model_file: Path, tmp_path: Path) -> None:
    expected = [1, *SentencePieceProcessor(model_file=str(tokenizer_model_file)).encode("a  b")]
    assert find_vocabulary(tmp_path) is None
    shutil.copyfile(tokenizer_model_file, tmp_path / "tokenizer.model")
    assert find_vocabulary(tmp_path) == tmp_path / "tokenizer.model"
    own = MistralLargeTokenizer.from_pretrained(tmp_path)
    assert own.encode("a  b") == expected
    own.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model.v3").read_bytes() == tokenizer_model_file.read_bytes()
    for name in VENDOR_FILES:
        shutil.copyfile(tokenizer_model_file.with_name(name), tmp_path / "tokenizer.model")
        assert find_vocabulary(tmp_path) is None
        with raises_exactly(TokenizerFileError, folder_refusal(tmp_path / "tokenizer.model", VENDOR_FILES[name])):
            MistralLargeTokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
def test_an_altered_file_is_not_saved_again(saved_folder: Path) -> None:
    own = MistralLargeTokenizer.from_pretrained(saved_folder)
    patch_model(saved_folder, "▁window".encode(), "▁windoW".encode())
    own.save_pretrained(saved_folder / "again")
    assert not (saved_folder / "again" / "tokenizer.model.v3").exists()


@pytest.mark.slow
def test_foreign_tokenizer_json_gives_way_to_the_vendors_file(saved_folder: Path) -> None:
    # The vendor publishes both; the tokenizer.json is not exact, and its config lists added tokens of its own.
    path = saved_folder / "tokenizer.json"
    foreign = json.loads(path.read_text(encoding="utf-8"))
    foreign["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    path.write_text(json.dumps(foreign), encoding="utf-8")
    config_path = saved_folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    added = AddedToken("[REFERENCE_DOC_0]").__getstate__()
    config |= {"add_bos_token": True, "added_tokens_decoder": {"770": added}, "legacy": False}
    config_path.write_text(json.dumps(config), encoding="utf-8")
    tokenizer = MistralLargeTokenizer.from_pretrained(saved_folder)
    assert tokenizer.encode(" [REFERENCE_DOC_0]a") == [1, 1027, 770, 29476]
    assert len(tokenizer.added_tokens_decoder) == 751


AUTO_WITHOUT_MISTRAL_COMMON = """
import importlib.util, sys
sys.modules["mistral_common"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "mistral_common" else find_spec(name, *rest)
from transformers import AutoTokenizer
from transformers.utils import is_mistral_common_available
import modeling_mistral_large
assert not is_mistral_common_available()
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(type(tokenizer) is modeling_mistral_large.MistralLargeTokenizer, tokenizer.encode("a  b [INST]"))
"""


@pytest.mark.slow
def test_auto_tokenizer_with_and_without_mistral_common(
    tokenizer: MistralLargeTokenizer, tokenizer_model_file: Path, saved_folder: Path, tmp_path: Path
) -> None:
    """The class comes from the model type in config.json, or from tokenizer_config.json alone."""
    model_folder = tmp_path / "model"
    MistralLargeConfig().save_pretrained(model_folder)
    shutil.copyfile(tokenizer_model_file, model_folder / "tokenizer.model.v3")
    folders = [str(model_folder), str(saved_folder)]
    for folder in folders:
        loaded = AutoTokenizer.from_pretrained(folder)
        assert type(loaded) is MistralLargeTokenizer
        assert loaded.encode("a  b [INST]") == tokenizer.encode("a  b [INST]")
    output = subprocess.run(
        [sys.executable, "-c", AUTO_WITHOUT_MISTRAL_COMMON, *folders],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == f"True {tokenizer.encode('a  b [INST]')}\n" * 2


def train_unigram(folder: Path) -> None:
    (folder / "corpus.txt").write_text("the cleaner asks for a window\nand a pair of boots\n" * 50, encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "unigram"), vocab_size=24, minloglevel=3
    )
    (folder / "unigram.model").rename(folder / "tokenizer.model.v3")


def patch_model(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "tokenizer.model.v3"
    model = path.read_bytes()
    assert old in model
    path.write_bytes(model.replace(old, new, 1))


def edit_json(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


READS = "this package reads the v3 and v7 SentencePiece models of Mistral-Large-Instruct-2407 and 2411"
OTHERS = "pass a folder with tokenizer.model.v3 or .v7, or with the files that save_pretrained wrote"


def refusal(path: Path, reason: str) -> str:
    """Return what is said of a file, or of a whole folder that is given by it."""
    return f"{path}: {reason}; {READS}; {OTHERS}"


def folder_refusal(path: Path, reason: str) -> str:
    """Return what is said of a file in a folder, for which transformers has a tokenizer of its own."""
    own = f"modeling_mistral_large.load('{path.parent}') takes transformers' own tokenizer for such a folder"
    return f"{refusal(path, reason)}; {own}"


# Each makes a folder with the real file wrong, and is reported for its reason. The bytes are protobuf fields.
WRONG_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (
        lambda folder: (folder / "tokenizer.model.v3").unlink(),
        "has none of tokenizer.model.v3, tokenizer.model.v7 and tokenizer.json",
    ),
    "no model": (lambda folder: (folder / "tokenizer.model.v3").write_text("Not found"), "not a SentencePiece model"),
    "empty file": (lambda folder: (folder / "tokenizer.model.v3").write_bytes(b""), "not a SentencePiece model"),
    "other vocabulary": (train_unigram, "24 pieces, v3 and v7 have 32768"),
    "renamed token": (
        lambda folder: patch_model(folder, b"[TOOL_CALLS]", b"[TOOL_CALLZ]"),
        "piece 5 is '[TOOL_CALLZ]', v3's is '[TOOL_CALLS]'",
    ),
    "renamed pad": (
        lambda folder: patch_model(folder, b"[control_382]", b"[control_abc]"),
        "piece 384 is '[control_abc]', v3's is '[control_382]'",
    ),
    "renamed document": (
        lambda folder: patch_model(folder, b"[REFERENCE_DOC_0]", b"[REFERENCE_DOC_Z]"),
        "piece 770 is '[REFERENCE_DOC_Z]', v3's is '[REFERENCE_DOC_0]'",
    ),
    "renamed byte": (
        lambda folder: patch_model(folder, b"<0x0A>", b"<0x0a>"),
        "not a SentencePiece model",
    ),
    "renamed text": (
        lambda folder: patch_model(folder, "▁window".encode(), "▁windoW".encode()),
        "other pieces than v3's for text",
    ),
    "unigram": (
        lambda folder: patch_model(folder, b"dummy\x18\x02", b"dummy\x18\x01"),
        "has v3's pieces, but encodes text in another way",
    ),
    "no dummy": (
        lambda folder: patch_model(folder, b"identity\x12\0\x18\1", b"identity\x12\0\x18\0"),
        "has v3's pieces, but encodes text in another way",
    ),
    "stripped": (
        lambda folder: patch_model(folder, b"\x18\1\x20\0\x32\0", b"\x18\1\x20\1\x32\0"),
        "has v3's pieces, but encodes text in another way",
    ),
    "no byte fallback": (lambda folder: patch_model(folder, b"\x98\2\1", b"\x98\2\0"), "not a SentencePiece model"),
    "control document": (
        lambda folder: patch_model(
            folder, b"[REFERENCE_DOC_7]\x15\0\0\0\0\x18\4", b"[REFERENCE_DOC_7]\x15\0\0\0\0\x18\3"
        ),
        "has v3's pieces, but encodes text in another way",
    ),
}
# What no text of a probe may show: the 4 bytes after the name are the score, the last one is the type.
ALTERED_MODELS: dict[str, tuple[bytes, bytes]] = {
    "score": ("▁window".encode() + b"\x15", "▁window".encode() + b"\x15\1"),
    "type": (b"[control_99]\x15\0\0\0\0\x18\3", b"[control_99]\x15\0\0\0\0\x18\1"),
    "unused piece": (b"[control_98]\x15\0\0\0\0\x18\3", b"[control_98]\x15\0\0\0\0\x18\5"),
}
VENDOR_FILES = {
    "tokenizer.model.v1": "32000 pieces, v3 and v7 have 32768",
    "mistral_instruct_tokenizer_240216.model.v2": "piece 751 is '[control_749]', v3's is '[REFERENCE_DOC_19]'",
    "tekken_240911.json": "not a SentencePiece model",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG_MODELS)
def test_wrong_models_are_refused(tokenizer_model_file: Path, tmp_path: Path, case: str) -> None:
    shutil.copyfile(tokenizer_model_file, tmp_path / "tokenizer.model.v3")
    make_wrong, reason = WRONG_MODELS[case]
    make_wrong(tmp_path)
    path = tmp_path / "tokenizer.model.v3"
    problem = refusal(tmp_path, reason) if case == "empty folder" else folder_refusal(path, reason)
    with raises_exactly(TokenizerFileError, problem):
        MistralLargeTokenizer.from_pretrained(tmp_path)


def alter(model: bytes, case: str) -> bytes:
    old, new = ALTERED_MODELS[case]
    start = model.index(old)
    return model[:start] + new + model[start + len(new) :]


@pytest.mark.slow
def test_the_vendors_file_is_known_by_its_content(tokenizer_model_file: Path, tmp_path: Path) -> None:
    model = tokenizer_model_file.read_bytes()
    path = tmp_path / "any.name"
    path.write_bytes(model)
    assert known_vocabulary(path) == "v3"
    # Other names of the pieces that the format does not use, and another note on the training, change no id.
    path.write_bytes(model.replace(b"\n\x05[IMG]", b"\n\x05[IMH]", 1))
    assert known_vocabulary(path) == "v3"
    assert b"[IMH]" in path.read_bytes()
    cut = model[: model.index("▁window".encode())]
    for wrong in (b"", model[:-1], cut, cut[:-1], b"Not found", bytes(99), b"\xff" * 99):
        path.write_bytes(wrong)
        assert known_vocabulary(path) is None
    assert known_vocabulary(tmp_path) is known_vocabulary(tmp_path / "missing") is None
    for name in VENDOR_FILES:
        assert known_vocabulary(tokenizer_model_file.with_name(name)) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", ALTERED_MODELS)
def test_an_altered_file_is_never_called_exact(tokenizer_model_file: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "tokenizer.model.v3"
    path.write_bytes(alter(tokenizer_model_file.read_bytes(), case))
    assert known_vocabulary(path) is None
    reason = "has v3's pieces, but other scores, types or settings than the vendor's file"
    with raises_exactly(TokenizerFileError, folder_refusal(path, reason)):
        MistralLargeTokenizer.from_pretrained(tmp_path)


# Settings of SentencePiece's own message, and whether the vocabulary is still the vendor's with them.
SETTINGS_OF_A_MODEL: dict[str, tuple[Callable[[Any], object], bool]] = {
    "as it is": (lambda model: None, True),
    "seed words": (lambda model: setattr(model.trainer_spec, "seed_sentencepiece_size", 3), True),
    "unused name": (lambda model: setattr(model.pieces[10], "piece", "[control_8]"), True),
    "no dummy": (lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False), False),
    "extra spaces": (lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True), False),
    "unescaped": (lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False), False),
    "characters": (lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"x"), False),
    "suffix": (lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True), False),
    "unigram": (lambda model: setattr(model.trainer_spec, "model_type", 1), False),
    "no bytes": (lambda model: setattr(model.trainer_spec, "byte_fallback", False), False),
    "score": (lambda model: setattr(model.pieces[20_000], "score", -1.5), False),
    "type": (lambda model: setattr(model.pieces[751], "type", 1), False),
    "piece": (lambda model: setattr(model.pieces[20_000], "piece", "▁other"), False),
    "swapped": (lambda model: model.pieces.insert(1030, model.pieces.pop(1031)), False),
    "one less": (lambda model: model.pieces.pop(), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SETTINGS_OF_A_MODEL)
def test_a_model_is_read_as_protobuf_writes_it(tokenizer_model_file: Path, tmp_path: Path, case: str) -> None:
    change, is_vendors = SETTINGS_OF_A_MODEL[case]
    sentencepiece_model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer_model_file.read_bytes())
    change(model)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    assert known_vocabulary(path) == ("v3" if is_vendors else None)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ALTERED_MODELS, "pointer"])
def test_an_altered_file_next_to_an_exact_tokenizer_json_is_refused(saved_folder: Path, case: str) -> None:
    path = saved_folder / "tokenizer.model.v3"
    MistralLargeTokenizer.from_pretrained(saved_folder)
    path.write_bytes(b"version 1" if case == "pointer" else alter(path.read_bytes(), case))
    for load in (MistralLargeTokenizer, AutoTokenizer):
        with raises_exactly(
            TokenizerFileError,
            f"{path}: other pieces, scores, types or settings than the vendor's file, which tokenizer.json next to it "
            f"was made of; {READS}; download it again, or remove it",
        ):
            load.from_pretrained(saved_folder)
    path.unlink()
    MistralLargeTokenizer.from_pretrained(saved_folder)


@pytest.mark.parametrize(
    "name", [name if name.startswith("tekken") else pytest.param(name, marks=pytest.mark.slow) for name in VENDOR_FILES]
)
def test_other_tokenizers_of_the_vendor_are_refused(tokenizer_model_file: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / ("tekken.json" if "tekken" in name else "tokenizer.model.v3")
    shutil.copyfile(tokenizer_model_file.with_name(name), path)
    with raises_exactly(TokenizerFileError, folder_refusal(path, VENDOR_FILES[name])):
        MistralLargeTokenizer.from_pretrained(tmp_path)


OTHER_PROGRAM = "has v3's pieces, but another program converted it"
WRONG_JSON: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no tokenizer": (lambda content: content.clear(), "not a tokenizer.json (<*>)"),
    "fewer pieces": (
        lambda content: content["model"].update(vocab={"<unk>": 0}, merges=[]),
        "1 pieces, v3 and v7 have 32768",
    ),
    "other words": (lambda content: content.update(pre_tokenizer=None), OTHER_PROGRAM),
    "other merges": (lambda content: content["model"].update(ignore_merges=False), OTHER_PROGRAM),
    "no bytes": (lambda content: content["model"].update(byte_fallback=False), OTHER_PROGRAM),
    "other decoder": (lambda content: content.update(decoder=None), OTHER_PROGRAM),
    "normalizer": (lambda content: content.update(normalizer={"type": "NFC"}), OTHER_PROGRAM),
    "other model": (
        lambda content: content.update(
            model={"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "<unk>"}
        ),
        OTHER_PROGRAM,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG_JSON)
def test_other_tokenizer_jsons_are_refused(saved_folder: Path, exact_json: str, case: str) -> None:
    (saved_folder / "tokenizer.model.v3").unlink()
    edit, reason = WRONG_JSON[case]
    edit_json(saved_folder, edit)
    path = saved_folder / "tokenizer.json"
    with pytest.raises(TokenizerFileError, match=whole(refusal(path, reason))):
        MistralLargeTokenizer(tokenizer_file=str(path))
    if reason != OTHER_PROGRAM:
        with pytest.raises(TokenizerFileError, match=whole(folder_refusal(path, reason))):
            MistralLargeTokenizer.from_pretrained(saved_folder)
        return
    # Of a folder, the exact tokenizer is made of the pieces, and that is said.
    said = (
        f"{saved_folder}: tokenizer.json is another program's conversion of the v3 vocabulary, whose ids are not "
        "those of tokenizer.model.v3 for every text; the tokenizer is made anew of its pieces"
    )
    with pytest.warns(UserWarning, match=whole(said)):
        made = MistralLargeTokenizer.from_pretrained(saved_folder)
    assert made.backend_tokenizer.to_str() == exact_json


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model.v3"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, tmp_path / "no" / "such" / "folder"):
        with raises_exactly(TokenizerFileError, refusal(path, "no such file or folder")):
            MistralLargeTokenizer.from_pretrained(path)
    with raises_exactly(TokenizerFileError, refusal(tmp_path / name, "no such file")):
        MistralLargeTokenizer(**{"tokenizer_file" if "json" in name else "vocab_file": str(tmp_path / name)})
    with raises_exactly(TokenizerFileError, f"neither vocab_file nor tokenizer_file is given; {READS}; {OTHERS}"):
        MistralLargeTokenizer()


# Copies, added tokens, threads


@pytest.mark.slow
def test_added_tokens(tokenizer: MistralLargeTokenizer, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    text = "a <think> b<stop> c"
    as_text = tokenizer.encode_texts([text])[0]
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<stop>"]}) == 1
    assert tokenizer.add_tokens(["<think>"]) == 1
    assert len(tokenizer) == 32770
    assert tokenizer.pieces[-2:] == ["<stop>", "<think>"]
    tokenizer.save_pretrained(tmp_path)
    tokenizer.encode_texts([text])
    for own in (tokenizer, copy.deepcopy(tokenizer), MistralLargeTokenizer.from_pretrained(tmp_path)):
        ids = own.encode(text)
        assert ids == [
            1,
            *own.encode_texts(["a "])[0],
            32769,
            *own.encode(" b", add_special_tokens=False)[1:],
            32768,
            1045,
        ]
        assert own.decode(ids[1:]) == text
        assert own.decode(ids, skip_special_tokens=True) == "a <think> b c"
        # A text that is not to be trusted can hold tokens, but not special ones.
        ids = own.encode_texts([text])[0]
        assert 32769 in ids
        assert 32768 not in ids
        assert own.decode(ids) == text
    assert 32769 not in as_text


@pytest.mark.slow
def test_copies_are_equal_and_apart(tokenizer: MistralLargeTokenizer, some_texts: list[str]) -> None:
    ids = tokenizer.encode_texts(some_texts)
    for own in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert type(own) is MistralLargeTokenizer
        assert own.encode_texts(some_texts) == ids
        assert own(some_texts[:50])["input_ids"] == tokenizer(some_texts[:50])["input_ids"]
        own.add_tokens(["<new>"])
    assert len(tokenizer) == 32768
    assert tokenizer.encode_texts(some_texts) == ids


@pytest.mark.slow
def test_threads(tokenizer: MistralLargeTokenizer, own: MistralLargeTokenizer, some_texts: list[str]) -> None:
    expected = tokenizer.encode_texts(some_texts), tokenizer.apply_chat_template(CONVERSATION)["input_ids"]

    def work(_: int) -> tuple[list[list[int]], list[int]]:
        return own.encode_texts(some_texts), own.apply_chat_template(CONVERSATION)["input_ids"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(12))) == [expected] * 12


@pytest.mark.slow
def test_threads_with_options_of_their_own(
    tokenizer: MistralLargeTokenizer, own: MistralLargeTokenizer, some_texts: list[str]
) -> None:
    """What one call sets is never seen by another: control strings as text, truncation, padding."""
    text = "a [INST] b</s> c" * 20
    calls: list[dict[str, Any]] = [
        {},
        {"split_special_tokens": True},
        {"truncation": True, "max_length": 7},
        {"padding": "max_length", "max_length": 300, "padding_side": "right"},
        {"padding": True, "pad_to_multiple_of": 64, "return_tensors": "np"},
    ]

    def work(number: int) -> list[Any]:
        options = calls[number % len(calls)]
        found = [np.asarray(own(text, **options)["input_ids"]).tolist() for _ in range(30)]
        return [*found, own.decode(found[0] if isinstance(found[0][0], int) else found[0][0]), own.batch_decode([[5]])]

    expected = [work(number) for number in range(len(calls))]
    assert len({str(each[0]) for each in expected}) == len(calls)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8 * len(calls))))
    assert found == expected * 8
    assert own.backend_tokenizer.encode_special_tokens is False


# The hash of a tokenizer is that of its state


@pytest.mark.slow
def test_use_does_not_change_the_state(tokenizer: MistralLargeTokenizer, tmp_path: Path) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<think>"])
    own.model_max_length = 50
    before = pickle.dumps(own)
    uses: dict[str, Callable[[], object]] = {
        "prompt": lambda: own.apply_chat_template(TOOL_CONVERSATION, padding="max_length", max_length=90),
        "long": lambda: own.apply_chat_template([{"role": "user", "content": "a " * 99}]),
        "call": lambda: own("a " * 99),
        "padded": lambda: own(["a", "b c"], padding=True, truncation=True, max_length=2, return_tensors="pt"),
        "as text": lambda: own("a", split_special_tokens=True),
        "pad": lambda: own.pad({"input_ids": [[1], [1, 2]]}),
        "texts": lambda: own.encode_texts(["a"], reference_documents_as_text=True),
        "decode": lambda: own.decode([771 + 0x20, 771 + 0xE6], skip_special_tokens=True),
        "parse": lambda: own.parse_response([1083, 1605, 2]),
        "pieces": lambda: own.pieces,
        "offsets": lambda: own("a", return_offsets_mapping=True),
        "another template": lambda: own.apply_chat_template(CONVERSATION, chat_template="{{ messages[0].content }}"),
        "save": lambda: own.save_pretrained(tmp_path),
    }
    for name, use in uses.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use()
        assert pickle.dumps(own) == before, name
    assert pickle.dumps(copy.deepcopy(own)) == before
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (content["truncation"], content["padding"]) == (None, None)
    own.add_tokens(["<new>"])
    assert pickle.dumps(own) != before


# Options


SETTINGS: dict[str, tuple[Any, str]] = {
    "add_prefix_space": (False, "True"),
    "legacy": (True, "False"),
    "sp_model_kwargs": ({"enable_sampling": True}, "{}"),
    "dropout": (0.1, "None"),
    "fix_mistral_regex": (True, "False"),
    "use_default_system_prompt": (True, "False"),
    "spaces_between_special_tokens": (True, "False"),
    "vocab": ({"a": 0}, "None"),
    "merges": ([], "None"),
    "normalizer": ("nfc", "None"),
    "pre_tokenizer": ("x", "None"),
    "decoder": ("x", "None"),
    "post_processor": ("x", "None"),
    "gguf_file": ("model.gguf", "None"),
    "add_prefix_spaces": (False, "add_prefix_space"),
    "add_bos_tokens": (False, "add_bos_token"),
    "pad_token_id": (2, "pad_token"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_this_tokenizer_does_not_have_are_refused(
    saved_folder: Path, tokenizer_model_file: Path, name: str
) -> None:
    value, right = SETTINGS[name]
    options = {name: value}
    problem = f"{name}: no setting of a tokenizer; did you mean {right!r}?"
    if right in ("True", "False", "None", "{}"):
        problem = (
            f"{name}={value!r}: this tokenizer encodes as the vendor's SentencePiece model does, for which it is "
            f"{right}; leave {name} out"
        )
    makers: list[Callable[..., Any]] = [
        lambda **options: MistralLargeTokenizer.from_pretrained(saved_folder, **options),
        lambda **options: AutoTokenizer.from_pretrained(saved_folder, **options),
        lambda **options: MistralLargeTokenizer(vocab_file=str(tokenizer_model_file), **options),
    ]
    # transformers reads a GGUF file before any tokenizer is asked.
    for make in makers if name != "gguf_file" else makers[::2]:
        with raises_exactly(KeywordError, problem):
            make(**options)


@pytest.mark.slow
def test_settings_that_are_as_they_must_be_are_taken(saved_folder: Path) -> None:
    expected = MistralLargeTokenizer.from_pretrained(saved_folder)
    own = MistralLargeTokenizer.from_pretrained(
        saved_folder, add_prefix_space=True, legacy=False, sp_model_kwargs={}, dropout=None
    )
    assert own("a b").input_ids == expected("a b").input_ids
    assert own.add_prefix_space is True
    own.add_prefix_space = True
    with raises_exactly(
        KeywordError,
        "add_prefix_space=False: this tokenizer encodes as the vendor's SentencePiece model does, for which it is "
        "True; leave add_prefix_space out",
    ):
        own.add_prefix_space = False
    own.save_pretrained(saved_folder / "again")
    assert (saved_folder / "again" / "tokenizer_config.json").read_bytes() == (
        saved_folder / "tokenizer_config.json"
    ).read_bytes()


def test_a_file_that_says_there_is_no_prefix_space_is_contradicted(saved_folder: Path) -> None:
    path = saved_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "add_prefix_space": False, "legacy": True}), encoding="utf-8")
    said = (
        f"{saved_folder}: tokenizer_config.json says add_prefix_space false; this tokenizer has a ▁ before every "
        "text, as the vendor's has"
    )
    with pytest.warns(UserWarning, match=whole(said)):
        own = MistralLargeTokenizer.from_pretrained(saved_folder)
    assert own.add_prefix_space is True


UNEXPECTED = "got an unexpected keyword argument"
# Python's own words end with the name, of some versions with a suggestion.
UNKNOWN_OPTIONS: dict[str, tuple[Callable[[MistralLargeTokenizer], object], str]] = {
    "call": (
        lambda own: own("a", add_special_token=False),
        f"MistralLargeTokenizer() {UNEXPECTED} 'add_special_token'; did you mean 'add_special_tokens'?",
    ),
    "encode": (
        lambda own: own.encode("a", split_specials=True),
        f"MistralLargeTokenizer() {UNEXPECTED} 'split_specials'; did you mean 'split_special_tokens'?",
    ),
    "tokenize": (
        lambda own: own.tokenize("a", foo=1),
        f"MistralLargeTokenizer() {UNEXPECTED} 'foo'; it would have no effect; leave it out",
    ),
    "decode": (
        lambda own: own.decode([5], skip_special_token=True),
        f"decode() {UNEXPECTED} 'skip_special_token'; did you mean 'skip_special_tokens'?",
    ),
    "batch_decode": (
        lambda own: own.batch_decode([[5]], skip_special=True),
        f"decode() {UNEXPECTED} 'skip_special'; did you mean 'skip_special_tokens'?",
    ),
    "spaces": (
        lambda own: own.decode([5], spaces_between_special_tokens=True),
        f"decode() {UNEXPECTED} 'spaces_between_special_tokens'; did you mean 'skip_special_tokens'?",
    ),
    "texts": (
        lambda own: own.encode_texts(["a"], reference_docs=True),  # type: ignore[call-arg]
        f"MistralLargeTokenizer.encode_texts() {UNEXPECTED} 'reference_docs'",
    ),
    "prompt": (
        lambda own: own.apply_chat_template(CONVERSATION, strictt=True),
        f"apply_chat_template() {UNEXPECTED} 'strictt'; did you mean 'strict'?",
    ),
    "format": (
        lambda own: own.apply_chat_template(CONVERSATION, enable_thinking=False),
        f"apply_chat_template() {UNEXPECTED} 'enable_thinking'; it would have no effect; leave it out",
    ),
    "parse": (
        lambda own: own.parse_response([5], prefixx=[1]),  # type: ignore[call-arg]
        f"ChatTokenizer.parse_response() {UNEXPECTED} 'prefixx'",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN_OPTIONS)
def test_unknown_options_are_type_errors(tokenizer: MistralLargeTokenizer, case: str) -> None:
    use, reason = UNKNOWN_OPTIONS[case]
    is_ours = case not in ("texts", "parse")
    with pytest.raises(KeywordError if is_ours else TypeError, match=whole(reason) if is_ours else re.escape(reason)):
        use(tokenizer)


def test_options_that_are_off_are_taken(tokenizer: MistralLargeTokenizer) -> None:
    assert tokenizer.decode([5], spaces_between_special_tokens=False) == "[TOOL_CALLS]"


@pytest.mark.slow
def test_another_backend_is_refused(tokenizer: MistralLargeTokenizer, pieces: list[str]) -> None:
    own = MistralLargeTokenizer(tokenizer_object=tokenizer.backend_tokenizer)
    own.add_tokens(["<new>"])
    assert len(tokenizer) == 32768
    other = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, []))
    with raises_exactly(TokenizerFileError, f"tokenizer_object: {OTHER_PROGRAM}; {READS}; {OTHERS}"):
        MistralLargeTokenizer(tokenizer_object=other)
    with pytest.raises(
        TokenizerFileError, match=whole(f"tokenizer_object: <*> pieces, v3 and v7 have 32768; {READS}; {OTHERS}")
    ):
        tokenizer.train_new_from_iterator([["a b c"] * 9], vocab_size=800)


# Prompts: which segments they have is tested in test_chat.py, here is what becomes of them


def test_prompts_are_the_references(tokenizer: MistralLargeTokenizer, reference_tokenizer: Any) -> None:
    messages = [UserMessage(content="Hi [INST] there"), AssistantMessage(content="Hello, what can I do?")]
    request = ChatCompletionRequest[Any](messages=[*messages, UserMessage(content="Sing  a song")])
    expected = reference_tokenizer.encode_chat_completion(request).tokens
    output = tokenizer.apply_chat_template(CONVERSATION)
    assert output == {"input_ids": expected, "attention_mask": [1] * len(expected)}
    assert type(output) is BatchEncoding
    for options in (
        {"add_generation_prompt": True},
        {"sanitize_control_tokens": True},
        {"chat_template": CHAT_TEMPLATES["v3"]},
    ):
        assert tokenizer.apply_chat_template(CONVERSATION, return_dict=False, **options) == expected
    assert tokenizer.apply_chat_template(tuple(CONVERSATION))["input_ids"] == expected


def test_rendered_prompts_encode_to_the_same_ids(tokenizer: MistralLargeTokenizer) -> None:
    for conversation in (
        CONVERSATION[1:],
        TOOL_CONVERSATION,
        [{"role": "user", "content": ""}, *TOOL_CONVERSATION[3:]],
    ):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer.apply_chat_template(conversation)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text
    texts = tokenizer.apply_chat_template([TOOL_CONVERSATION, CONVERSATION[2:]], tokenize=False, return_dict=True)
    assert texts == [
        "<s>[INST] What's the weather in Paris?[/INST][TOOL_CALLS] "
        '[{"name": "weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}]</s>'
        '[TOOL_RESULTS] {"content": 22, "call_id": "VvvODy9mT"}[/TOOL_RESULTS] It is 22 degrees.</s>',
        "<s>[INST] Sing  a song[/INST]",
    ]


@dataclass
class Chat:
    messages: list[dict[str, Any]]


def test_batches_of_conversations(tokenizer: MistralLargeTokenizer) -> None:
    conversations = [CONVERSATION, TOOL_CONVERSATION, CONVERSATION[2:]]
    single = [tokenizer.apply_chat_template(conversation)["input_ids"] for conversation in conversations]
    assert tokenizer.apply_chat_template(conversations)["input_ids"] == single
    assert tokenizer.apply_chat_template([Chat(conversation) for conversation in conversations])["input_ids"] == single
    assert tokenizer.apply_chat_template(Chat(CONVERSATION))["input_ids"] == single[0]
    assert tokenizer.apply_chat_template(conversations, return_dict=False) == single
    one = tokenizer.apply_chat_template([CONVERSATION], return_dict=False)
    assert one == single[:1]


def test_assistant_masks_cover_what_the_assistant_says(tokenizer: MistralLargeTokenizer) -> None:
    output = tokenizer.apply_chat_template(TOOL_CONVERSATION, return_assistant_tokens_mask=True)
    assert [len(row) for row in output.values()] == [len(output["input_ids"])] * 3
    said = [index for index, mask in zip(output["input_ids"], output["assistant_masks"], strict=True) if mask]
    calls = '[{"name": "weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}]'
    texts = tokenizer.encode_texts([calls, "It is 22 degrees."])
    assert said == [5, *texts[0], 2, *texts[1], 2]


@pytest.mark.slow
@pytest.mark.parametrize("truncation_side", ["left", "right"])
@pytest.mark.parametrize("padding_side", [None, "left", "right"])
@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_padding_and_truncation_of_prompts(
    own: MistralLargeTokenizer, truncation_side: str, padding_side: str | None, return_tensors: str | None
) -> None:
    own.truncation_side = truncation_side
    conversations = [CONVERSATION, TOOL_CONVERSATION, CONVERSATION[2:]]
    whole = own.apply_chat_template(conversations, return_assistant_tokens_mask=True)
    length = 16
    output = own.apply_chat_template(
        conversations,
        padding=True,
        truncation=True,
        max_length=length,
        return_assistant_tokens_mask=True,
        return_tensors=return_tensors,
        tokenizer_kwargs={"padding_side": padding_side, "pad_to_multiple_of": 8},
    )
    kept = slice(length) if truncation_side == "right" else slice(-length, None)
    fills = {"input_ids": 384, "attention_mask": 0, "assistant_masks": 0}
    assert set(output) == set(fills)
    for name, fill in fills.items():
        rows = [row[kept] for row in whole[name]]
        assert len(rows[2]) < length == len(rows[0])
        padding = [[fill] * (length - len(row)) for row in rows]
        expected = [row + pad if padding_side == "right" else pad + row for row, pad in zip(rows, padding, strict=True)]
        assert type(output[name]) is {None: list, "np": np.ndarray, "pt": torch.Tensor}[return_tensors]
        assert np.asarray(output[name]).tolist() == expected


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_padding_and_truncation_as_transformers_does_it(
    tokenizer: MistralLargeTokenizer, own: MistralLargeTokenizer
) -> None:
    """Every combination gives what the tokenizer's own call gives for the rendered prompt."""
    conversation = CONVERSATION[1:]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    for padding in (False, True, "longest", "max_length", "do_not_pad"):
        for truncation in (False, True, "longest_first"):
            for max_length in (8, 64):
                for return_tensors in (None, "pt"):
                    options: dict[str, Any] = {
                        "padding": padding,
                        "truncation": truncation,
                        "max_length": max_length,
                        "return_tensors": return_tensors,
                    }
                    expected = tokenizer(text, add_special_tokens=False, **options)
                    output = tokenizer.apply_chat_template(conversation, **options)
                    assert {name: np.asarray(rows).tolist() for name, rows in output.items()} == {
                        name: np.asarray(rows).tolist() for name, rows in expected.items()
                    }
    multiple = tokenizer.apply_chat_template(conversation, padding=True, tokenizer_kwargs={"pad_to_multiple_of": 64})
    assert (
        multiple["input_ids"]
        == tokenizer(text, add_special_tokens=False, padding="max_length", max_length=64)["input_ids"]
    )
    own.truncation_side = "left"
    assert own.apply_chat_template(conversation, truncation=True, max_length=0)["input_ids"] == []
    without_mask = tokenizer.apply_chat_template(conversation, tokenizer_kwargs={"return_attention_mask": False})
    assert set(without_mask) == {"input_ids"}


def test_prompts_longer_than_the_model_takes_are_warned_about(
    tokenizer: MistralLargeTokenizer, own: MistralLargeTokenizer
) -> None:
    own.model_max_length, own.deprecation_warnings = 8, {}
    own.apply_chat_template(CONVERSATION, tokenizer_kwargs={"verbose": False})
    assert own.deprecation_warnings == {}
    own.apply_chat_template(CONVERSATION)
    assert len(own.deprecation_warnings) == 1


def test_continued_answers(tokenizer: MistralLargeTokenizer) -> None:
    closed = tokenizer.apply_chat_template(TOOL_CONVERSATION)["input_ids"]
    assert closed[-1] == 2
    for value in (True, "content"):
        output = tokenizer.apply_chat_template(
            TOOL_CONVERSATION, continue_final_message=value, return_assistant_tokens_mask=True
        )
        assert output["input_ids"] == closed[:-1]
        assert output["assistant_masks"][-1] == 1


MASK_RULE = (
    "return_assistant_tokens_mask=True: needs return_dict=True and tokenize=True; pass both, or leave the mask out"
)
WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "contradiction": (
        {"add_generation_prompt": True, "continue_final_message": True},
        "add_generation_prompt and continue_final_message: the response to come is either new or the last message's "
        "rest; leave one of the two out",
    ),
    "unknown field": (
        {"continue_final_message": "reasoning_content"},
        "continue_final_message='reasoning_content': only 'content' can be continued; pass True",
    ),
    "documents": (
        {"documents": [{"title": "a", "text": "b"}]},
        "documents: the v3 format has no place for them; write them into a message or a tool's result",
    ),
    "mask without dict": ({"return_assistant_tokens_mask": True, "return_dict": False}, MASK_RULE),
    "mask of a text": ({"return_assistant_tokens_mask": True, "tokenize": False}, MASK_RULE),
    "kwargs of the call": (
        {"tokenizer_kwargs": {"stride": 2}},
        "tokenizer_kwargs ['stride']: of a prompt only padding_side, pad_to_multiple_of, return_attention_mask, "
        "verbose can be chosen; leave the others out",
    ),
    "not continued": (
        {"strict": True},
        "message 3: a final assistant message; a prompt ends with a user or tool message; pass "
        "continue_final_message=True to continue it, finetuning=True to train on it, or leave strict=True out",
    ),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_make_no_sense_are_refused(tokenizer: MistralLargeTokenizer, case: str) -> None:
    options, reason = WRONG_OPTIONS[case]
    with raises_exactly(ValueError, reason):
        tokenizer.apply_chat_template(TOOL_CONVERSATION, **options)


def test_empty_conversations_are_refused(tokenizer: MistralLargeTokenizer) -> None:
    empty: list[Any] = [[], (), [[]], [CONVERSATION, []]]
    for conversation in empty:
        with raises_exactly(ConversationError, "no messages: a conversation has at least one; pass a user message"):
            tokenizer.apply_chat_template(conversation)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::modeling_mistral_large.chat_tokenization.CustomTemplateWarning")
def test_other_chat_templates_are_left_to_transformers(
    tokenizer: MistralLargeTokenizer, own: MistralLargeTokenizer
) -> None:
    template = (
        "{% for m in messages %}{% generation %}[INST] {{ m.content }}{% endgeneration %}[/INST]{% endfor %}{{ x }}"
    )
    conversation = [{"role": "user", "content": "a </s> b"}]
    options: dict[str, Any] = {"chat_template": template, "x": "!"}
    assert tokenizer.apply_chat_template(conversation, tokenize=False, **options) == "[INST] a </s> b[/INST]!"
    output = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, **options)
    text = tokenizer.encode_texts(["a </s> b"])[0]
    assert output["input_ids"] == [3, *text, 4, tokenizer.convert_tokens_to_ids("!")]
    assert output["assistant_masks"] == [1] * (1 + len(text)) + [0, 0]
    own.chat_template = {"default": CHAT_TEMPLATES["v3"], "other": template}
    assert own.apply_chat_template(conversation, chat_template="other", tokenize=False) == "[INST] a </s> b[/INST]"
    assert own.apply_chat_template(CONVERSATION) == tokenizer.apply_chat_template(CONVERSATION)


# Answers: the parser is tested in test_tool_calls.py, here is what it is handed


def test_answers_become_messages(tokenizer: MistralLargeTokenizer) -> None:
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    texts = tokenizer.encode_texts([json.dumps([{**call, "id": "VvvODy9mT"}]), "Hello [TOOL_CALLS]"])
    answers = [[5, *texts[0], 2], [*texts[1], 2, 384, 384]]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "VvvODy9mT", "function": call}]},
        {"role": "assistant", "content": "Hello [TOOL_CALLS]"},
    ]
    prompt = tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    for prefix in (None, "", [], prompt, [prompt, prompt], tokenizer.decode(prompt), torch.tensor([prompt])):
        assert tokenizer.parse_response(answers, prefix=prefix) == messages
    assert [tokenizer.parse_response(torch.tensor(ids), RESPONSE_TEMPLATES["v3"]) for ids in answers] == messages
    assert tokenizer.parse_response(np.array(answers[0]), tools=[]) == messages[0]
    text = tokenizer.decode(answers[0])
    assert tokenizer.parse_response(text, prefix=tokenizer.decode(prompt)) == messages[0]
    assert tokenizer.parse_response([text, "Yes</s>"]) == [messages[0], {"role": "assistant", "content": "Yes"}]
    with raises_exactly(ValueError, "3 prefixes for 2 responses: pass one, or one for each"):
        tokenizer.parse_response(answers, prefix=[prompt] * 3)


def test_answers_that_continue_a_text_keep_their_first_space(tokenizer: MistralLargeTokenizer) -> None:
    begun = tokenizer.apply_chat_template(TOOL_CONVERSATION, continue_final_message=True)["input_ids"]
    answer = [*tokenizer.encode_texts(["Bye"])[0], 2]
    for prompt, content in (
        (begun, " Bye"),
        (tokenizer.decode(begun), " Bye"),
        ([*begun, 2], "Bye"),
        ("[/INST]", "Bye"),
    ):
        assert tokenizer.parse_response(answer, prefix=prompt)["content"] == content
    assert tokenizer.parse_response([answer, answer], prefix=["", begun]) == [
        {"role": "assistant", "content": "Bye"},
        {"role": "assistant", "content": " Bye"},
    ]


@pytest.mark.filterwarnings("ignore::modeling_mistral_large.chat_tokenization.CustomTemplateWarning")
def test_other_response_templates_are_left_to_transformers(
    tokenizer: MistralLargeTokenizer, own: MistralLargeTokenizer
) -> None:
    template = {
        "version": 1,
        "start_anchor": "[/INST]",
        "defaults": {"role": "assistant"},
        "fields": {"content": {"content": "text"}},
    }
    expected = {"role": "assistant", "content": "Hi</s>"}
    assert tokenizer.parse_response("Hi</s>", template, prefix="") == expected
    own.response_template = template
    assert own.parse_response("Hi</s>", prefix="") == expected

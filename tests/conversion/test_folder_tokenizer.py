"""Tokenizers of any folder: the vocabulary by its pieces, added tokens, and prompts by what a template renders."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from sentencepiece import SentencePieceProcessor

from mistral_large_conversion import read_folder_tokenizer
from mistral_large_conversion.chat_templates import CHAT_TEMPLATES, PLAIN_CHAT_TEMPLATES
from mistral_large_conversion.checkpoint.source_files import file_problem
from mistral_large_conversion.errors import SettingError, TokenizerFileError
from mistral_large_conversion.prompt_format import recognize_prompt_format
from mistral_large_conversion.sentencepiece_bpe import load_sentencepiece_bpe
from mistral_large_conversion.sentencepiece_model import sentencepiece_model
from mistral_large_conversion.tokenizer import CORPUS
from mistral_large_conversion.vocabulary import VOCABULARIES, known_vocabulary
from tests.support import folders
from tests.support.checkpoints import tokenizer_model_file
from tests.support.errors import raises_exactly, whole
from tests.support.folders import CHATML_TEMPLATE, CHATML_TOKENS, OLDER_TEMPLATE, OLDER_TEMPLATE_V7

pytestmark = pytest.mark.slow

NAMES = tuple(VOCABULARIES)


def write_tokenizer(
    folder: Path, vocabulary: Any = "v3", *, added: tuple[str, ...] = (), template: str | None = None
) -> Path:
    folder.mkdir()
    for name, content in folders.stock_tokenizer_files(vocabulary, added, template).items():
        (folder / name).write_bytes(content)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**content, **changes}.items() if value is not None}))


@pytest.mark.parametrize("vocabulary", NAMES)
def test_a_tokenizer_json_of_another_program_gives_the_exact_tokenizer(tmp_path: Path, vocabulary: Any) -> None:
    found = read_folder_tokenizer(write_tokenizer(tmp_path / "folder", vocabulary))
    assert (found.vocabulary, found.source, found.added, found.remarks) == (vocabulary, "tokenizer.json", (), ())
    assert found.prompt_format == vocabulary
    assert found.backend.to_str() == load_sentencepiece_bpe(tokenizer_model_file(vocabulary)).to_str()


@pytest.mark.parametrize("vocabulary", NAMES)
def test_a_sentencepiece_file_made_of_pieces_is_the_vendors_for_every_reader(tmp_path: Path, vocabulary: Any) -> None:
    path = tmp_path / VOCABULARIES[vocabulary].file_name
    own = SentencePieceProcessor(model_file=str(tokenizer_model_file(vocabulary)))
    path.write_bytes(sentencepiece_model(own.id_to_piece(list(range(32768)))))
    assert known_vocabulary(path) == vocabulary
    made = SentencePieceProcessor(model_file=str(path))
    assert made.encode(list(CORPUS)) == own.encode(list(CORPUS))
    ids = list(range(32768))
    for ask in ("get_score", "is_control", "is_unknown", "is_unused", "is_byte", "id_to_piece"):
        assert getattr(made, ask)(ids) == getattr(own, ask)(ids), ask
    assert [made.decode([index, 5000]) for index in ids[:2000]] == [own.decode([index, 5000]) for index in ids[:2000]]
    reference = SentencePieceTokenizer(path)
    vendors = SentencePieceTokenizer(tokenizer_model_file(vocabulary))
    for text in CORPUS:
        assert reference.encode(text, bos=True, eos=True) == vendors.encode(text, bos=True, eos=True)


def test_added_tokens_keep_their_ids_and_flags_wherever_they_are_named(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", "v7", added=CHATML_TOKENS)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = config.get("added_tokens_decoder", {})
    decoder["32770"] = {"content": "<think>", "special": False, "lstrip": True, "normalized": False}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32769, "</think>": 32771}))
    found = read_folder_tokenizer(folder)
    assert [(token.content, token.special, token.lstrip) for token in found.added] == [
        ("<|im_start|>", True, False),
        ("<|im_end|>", True, False),
        ("<think>", False, True),
        ("</think>", False, False),
    ]
    ids = [found.backend.token_to_id(token.content) for token in found.added]
    assert ids == [32768, 32769, 32770, 32771]
    assert found.backend.encode("<|im_start|>", add_special_tokens=False).ids == [32768]


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ({"<x>": 32769}, "the ids of added tokens, [32769], have gaps"),
        ({"<x>": 20}, "token 20 is '<x>', and '[control_18]' elsewhere"),
        ({"[INST]": 32768}, "added token '[INST]' of id 32768 is piece 3"),
        ({"▁the": 1040}, "the piece '▁the' of text was made a token of its own"),
        ({"<x>": "many"}, "must be a text and a number"),
    ],
)
def test_tokens_that_contradict_the_pieces_make_another_vocabulary(
    tmp_path: Path, named: dict[str, Any], problem: str
) -> None:
    folder = write_tokenizer(tmp_path / "folder")
    (folder / "added_tokens.json").write_text(json.dumps(named))
    found = read_folder_tokenizer(folder)
    assert (found.vocabulary, found.prompt_format, found.pieces) == (None, None, ())
    assert problem in found.remarks[0]
    assert "carried along unchanged" in found.remarks[-1]
    assert found.carried_files() == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_known_file_next_to_a_tokenizer_json_with_renamed_tokens_does_not_win(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"[control_20]"', '"<|im_start|>"'))
    (folder / "tokenizer.model").write_bytes(tokenizer_model_file().read_bytes())
    found = read_folder_tokenizer(folder)
    assert (found.vocabulary, found.source, found.model_file) == (None, "tokenizer.json", None)
    assert "tokenizer.model has other pieces than tokenizer.json" in found.remarks[0]
    # Of pieces that no format uses, the names are the fine-tune's, and so is the file that is made.
    (folder / "tokenizer.json").write_text(text.replace('"[IMG]"', '"<|im_start|>"'))
    found = read_folder_tokenizer(folder)
    assert (found.vocabulary, found.pieces[10], found.model_file) == ("v3", "<|im_start|>", None)
    assert found.backend.token_to_id("<|im_start|>") == 10
    (tmp_path / "made").write_bytes(found.sentencepiece)
    assert known_vocabulary(tmp_path / "made") == "v3"
    assert SentencePieceProcessor(model_file=str(tmp_path / "made")).id_to_piece(10) == "<|im_start|>"


def test_other_vocabularies_are_not_taken_for_one_of_ours(tmp_path: Path) -> None:
    v1 = tokenizer_model_file().with_name("tokenizer.model.v1")
    (tmp_path / "tokenizer.model").write_bytes(v1.read_bytes())
    found = read_folder_tokenizer(tmp_path)
    assert (found.vocabulary, found.prompt_format) == (None, None)
    assert found.carried_files() == {"tokenizer.model": v1.read_bytes()}
    # The vendor's pieces with other scores.
    model = tokenizer_model_file().read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model.replace(b"\x15\x00\x00\x00\xc0", b"\x15\x00\x00\x10\xc0", 1))
    assert read_folder_tokenizer(tmp_path).vocabulary is None


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with raises_exactly(
        TokenizerFileError,
        f"{tmp_path}: no tokenizer: neither tokenizer.json nor tokenizer.model.v3, tokenizer.model.v7, "
        "tokenizer.model; download the tokenizer's files as well",
    ):
        read_folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    problem = f"{tmp_path}/tokenizer.json: Expecting <*>; download it again"
    with pytest.raises(TokenizerFileError, match=whole(problem)):
        read_folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"none")
    with raises_exactly(
        TokenizerFileError,
        f"{tmp_path}/tokenizer.model: not a SentencePiece model; download it again",
    ):
        read_folder_tokenizer(tmp_path)


def test_templates_are_found_in_all_their_places(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", template=CHATML_TEMPLATE)
    assert read_folder_tokenizer(folder).chat_template == CHATML_TEMPLATE
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML_TEMPLATE}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    found = read_folder_tokenizer(folder)
    assert list(found.chat_templates.items()) == [("default", CHATML_TEMPLATE), ("tool_use", "tools")]
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML_TEMPLATE}))
    assert read_folder_tokenizer(folder).chat_template == CHATML_TEMPLATE
    (folder / "chat_template.jinja").write_text(OLDER_TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    found = read_folder_tokenizer(folder)
    assert dict(found.chat_templates) == {"default": OLDER_TEMPLATE, "rag": "rag"}
    assert (found.prompt_format, found.chat_template) == ("v3", None)


def vendors_template(vocabulary: str) -> str:
    """What mistral-common itself writes of its tokenizer."""
    return str(convert_tokenizer_to_chat_template(tokenizer_model_file(cast("Any", vocabulary))))


@pytest.mark.parametrize(
    ("template", "vocabulary", "expected"),
    [
        (None, "v3", "v3"),
        (None, "v7", "v7"),
        (OLDER_TEMPLATE, "v3", "v3"),
        (OLDER_TEMPLATE, "v7", "v3"),
        (OLDER_TEMPLATE_V7, "v7", "v7"),
        (OLDER_TEMPLATE_V7, "v3", None),
        (CHAT_TEMPLATES["v3"], "v3", "v3"),
        (CHAT_TEMPLATES["v7"], "v7", "v7"),
        (CHAT_TEMPLATES["v7"], "v3", None),
        # By what they render alone.
        (CHAT_TEMPLATES["v3"].replace('"<s>" -', '"<s>" ~ "" -'), "v3", "v3"),
        (PLAIN_CHAT_TEMPLATES["v7"].replace('"<s>" -', '"<s>" ~ "" -'), "v7", "v7"),
        (CHATML_TEMPLATE, "v7", None),
        (OLDER_TEMPLATE.replace("eos_token", "'<|im_end|>'"), "v3", None),
        # The system message in the first user message, none at all, and in a block of its own.
        (OLDER_TEMPLATE.replace("loop.last", "loop.first"), "v7", "v3"),
        (OLDER_TEMPLATE.replace("system if loop.last else ''", "''"), "v7", "v7"),
        (OLDER_TEMPLATE.replace("'\\n\\n'", "'<</SYS>>'"), "v3", None),
        (OLDER_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{% if tools %}<tools>{% endif %}"), "v3", None),
        ("{{ messages", "v3", None),
        ("{{ raise_exception('no') }}", "v3", None),
        (CHATML_TEMPLATE, None, None),
    ],
)
def test_a_template_has_the_format_that_it_renders(
    template: str | None, vocabulary: str | None, expected: str | None
) -> None:
    assert recognize_prompt_format(template, vocabulary).name == expected


@pytest.mark.parametrize("vocabulary", NAMES)
def test_the_reference_s_own_templates_are_recognised(vocabulary: str) -> None:
    assert recognize_prompt_format(vendors_template(vocabulary), vocabulary).name == vocabulary


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", marks=pytest.mark.slow
        ),
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 10**11 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_template_is_one_of_its_own_and_takes_no_time(template: str) -> None:
    assert recognize_prompt_format(template, "v3").name is None


def test_a_prompt_format_can_be_asked_for(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "v7", "v7", template=CHATML_TEMPLATE)
    for asked, expected in (("v3", "v3"), ("v7", "v7"), ("own", None)):
        assert read_folder_tokenizer(folder, prompt_format=asked).prompt_format == expected
    folder = write_tokenizer(tmp_path / "v3", template=OLDER_TEMPLATE)
    assert read_folder_tokenizer(folder, prompt_format="own").chat_template == OLDER_TEMPLATE
    with raises_exactly(
        SettingError,
        "prompt_format 'v7': the v3 vocabulary of the folder has no [SYSTEM_PROMPT]; take 'v3' or 'own'",
    ):
        read_folder_tokenizer(folder, prompt_format="v7")
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    with raises_exactly(SettingError, "prompt_format 'own': the folder has no chat template of its own; leave it out"):
        read_folder_tokenizer(folder, prompt_format="own")
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 20}))
    with raises_exactly(
        SettingError,
        "prompt_format 'v3': the vocabulary of the folder is neither v3's nor v7's; leave it out, or take 'own'",
    ):
        read_folder_tokenizer(folder, prompt_format="v3")
    with raises_exactly(SettingError, "prompt_format 'v1': must be one of None, 'own', 'v3', 'v7'"):
        read_folder_tokenizer(folder, prompt_format="v1")


def test_special_tokens_that_are_none_are_not_taken(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", added=CHATML_TOKENS, template=CHATML_TEMPLATE)
    edit_json(folder / "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, pad_token="<pad>")
    found = read_folder_tokenizer(folder)
    assert found.special_tokens["eos_token"] == "<|im_end|>"
    assert "pad_token" not in found.special_tokens
    assert found.remarks == ("pad_token '<pad>' is no token of the vocabulary: not taken",)


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "folder", template=OLDER_TEMPLATE)
    code = (
        "import sys; from mistral_large_conversion import read_folder_tokenizer\n"
        f"assert read_folder_tokenizer({str(folder)!r}).prompt_format == 'v3'\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with raises_exactly(TokenizerFileError, f"{tmp_path}: {name} is not a regular file; download it again"):
        read_folder_tokenizer(tmp_path, layout="hf")
    assert known_vocabulary(tmp_path / name) is None


def test_additional_templates_of_a_hub_cache_are_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0"
    more = snapshot / "additional_chat_templates"
    more.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "blobs").mkdir()
    (tmp_path / "models--owner--name" / "blobs" / "1").write_text("{{ messages }}")
    (more / "tools.jinja").symlink_to("../../../blobs/1")
    assert file_problem(more, "tools.jinja") is None
    (tmp_path / "elsewhere").write_text("")
    (more / "other.jinja").symlink_to(tmp_path / "elsewhere")
    elsewhere = (tmp_path / "elsewhere").resolve()
    assert file_problem(more, "other.jinja") == f"other.jinja is a link out of the folder, to '{elsewhere}'"

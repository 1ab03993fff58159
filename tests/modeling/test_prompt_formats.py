"""Which of the two prompt formats a tokenizer has: its vocabulary's, its template's, or the one that is asked for."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from mistral_large_conversion.chat_templates import (
    CHAT_TEMPLATES,
    PLAIN_CHAT_TEMPLATES,
    RESPONSE_TEMPLATES,
    START_ANCHORS,
)
from mistral_large_conversion.errors import TokenizerFileError
from mistral_large_conversion.vocabulary import VOCABULARIES
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.chat_tokenization import CustomTemplateWarning
from modeling_mistral_large.errors import ConversationError, KeywordError
from modeling_mistral_large.generation.streaming import MistralLargeTextStreamer
from modeling_mistral_large.instruct import FORMATS
from tests.support import checkpoints
from tests.support.conversations import conversations, reference_ids
from tests.support.errors import raises_exactly

Message = dict[str, Any]

SYSTEM: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
# What every refusal of a format whose control tokens are missing says.
NO_V7 = (
    "the vocabulary is v3's, which has no [SYSTEM_PROMPT], [/SYSTEM_PROMPT], [TOOL_CONTENT]; a prompt format needs its "
    "control tokens; choose v3, or take a model that was trained on v7 with its tokenizer"
)


@pytest.fixture
def own(tokenizer: MistralLargeTokenizer, v7_tokenizer: MistralLargeTokenizer) -> dict[str, MistralLargeTokenizer]:
    return {"v3": tokenizer, "v7": v7_tokenizer}


def recorded(folder: Path) -> Any:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["prompt_format"]


def test_every_table_has_the_same_formats() -> None:
    tables: tuple[Any, ...] = (CHAT_TEMPLATES, PLAIN_CHAT_TEMPLATES, RESPONSE_TEMPLATES, START_ANCHORS, VOCABULARIES)
    assert [list(table) for table in tables] == [list(FORMATS)] * len(tables)
    for name, form in FORMATS.items():
        assert form.name == VOCABULARIES[name].name == name
        own = {*(form.system_tokens or ()), *filter(None, [form.tool_content_token])}
        assert VOCABULARIES[name].control_tokens.keys() == VOCABULARIES["v3"].control_tokens.keys() | own
        assert VOCABULARIES[name].control_tokens.keys() >= {*START_ANCHORS[name]}


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_vocabulary_has_its_format(
    own: dict[str, MistralLargeTokenizer], name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert own[name].vocabulary is VOCABULARIES[name]
    own[name].save_pretrained(tmp_path)
    assert recorded(tmp_path) == name
    assert sorted(path.name for path in tmp_path.glob("tokenizer.model*")) == [f"tokenizer.model.{name}"]
    ids = own[name].apply_chat_template(SYSTEM, return_dict=False)
    for unlinked in ([], [f"tokenizer.model.{name}"], ["chat_template.jinja", "tokenizer_config.json"]):
        for file in unlinked:
            (tmp_path / file).unlink()
        for load in (
            (MistralLargeTokenizer, AutoTokenizer)
            if (tmp_path / "tokenizer_config.json").exists()
            else (MistralLargeTokenizer,)
        ):
            again: Any = load.from_pretrained(tmp_path)
            assert isinstance(again, MistralLargeTokenizer)
            assert again.prompt_format == name
            assert again.vocabulary is VOCABULARIES[name]
            assert again.chat_template == CHAT_TEMPLATES[name]
            assert again.response_template == RESPONSE_TEMPLATES[name]
            assert again.apply_chat_template(SYSTEM, return_dict=False) == ids
    assert [warning for warning in recwarn if issubclass(warning.category, CustomTemplateWarning)] == []


@pytest.mark.slow
@pytest.mark.parametrize("has_template", [True, False])
def test_v3_can_be_asked_of_a_v7_vocabulary(
    own: dict[str, MistralLargeTokenizer], tmp_path: Path, has_template: bool
) -> None:
    own["v7"].save_pretrained(tmp_path)
    if not has_template:
        (tmp_path / "chat_template.jinja").unlink()
    reference: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer.v3()
    chosen = MistralLargeTokenizer.from_pretrained(tmp_path, prompt_format="v3")
    assert chosen.prompt_format == "v3"
    assert chosen.response_template == RESPONSE_TEMPLATES["v3"]
    for conversation in conversations("unusual", seed=51, count=30):
        ids = chosen.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            continue_final_message=conversation.continue_final_message,
            return_dict=False,
        )
        assert ids == reference_ids(reference, conversation)
    chosen.save_pretrained(tmp_path / "chosen")
    assert recorded(tmp_path / "chosen") == "v3"
    assert MistralLargeTokenizer.from_pretrained(tmp_path / "chosen").prompt_format == "v3"


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_format_that_is_asked_for_goes_before_the_folders_own_template(
    own: dict[str, MistralLargeTokenizer], tmp_path: Path, name: str
) -> None:
    own[name].save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CustomTemplateWarning)
        chosen = MistralLargeTokenizer.from_pretrained(tmp_path, prompt_format=name)
        assert chosen.prompt_format == name
        ids = chosen.apply_chat_template(SYSTEM, return_dict=False)
    assert ids == own[name].apply_chat_template(SYSTEM, return_dict=False)
    assert MistralLargeTokenizer.from_pretrained(tmp_path).prompt_format is None
    # The same template, in its other form.
    plain = PLAIN_CHAT_TEMPLATES[name]
    again = MistralLargeTokenizer.from_pretrained(tmp_path, prompt_format=name, chat_template=plain)
    assert again.chat_template == plain


def test_the_constructor_chooses_too() -> None:
    file = str(checkpoints.tokenizer_model_file("v7"))
    assert MistralLargeTokenizer(file).prompt_format == "v7"
    assert MistralLargeTokenizer(file, prompt_format="v3").prompt_format == "v3"


@pytest.mark.slow
def test_a_format_needs_its_control_tokens(own: dict[str, MistralLargeTokenizer], tmp_path: Path) -> None:
    own["v3"].save_pretrained(tmp_path)
    with raises_exactly(TokenizerFileError, f"prompt_format 'v7': {NO_V7}"):
        MistralLargeTokenizer.from_pretrained(tmp_path, prompt_format="v7")
    with raises_exactly(TokenizerFileError, f"prompt_format 'v7': {NO_V7}"):
        MistralLargeTokenizer(str(checkpoints.tokenizer_model_file("v3")), prompt_format="v7")
    for tokenize in (True, False):
        with raises_exactly(ConversationError, f"the chat template writes v7 prompts: {NO_V7}"):
            own["v3"].apply_chat_template(SYSTEM, chat_template=CHAT_TEMPLATES["v7"], tokenize=tokenize)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompt_format": "v7"}))
    with raises_exactly(TokenizerFileError, f"prompt_format 'v7': {NO_V7}"):
        MistralLargeTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["v9", *(pytest.param(name, marks=pytest.mark.slow) for name in ("V7", "", 7))])
def test_another_format_is_refused(own: dict[str, MistralLargeTokenizer], name: Any, tmp_path: Path) -> None:
    own["v7"].save_pretrained(tmp_path)
    problem = f"prompt_format={name!r}: the prompt formats are v3, v7; choose one, or leave prompt_format out"
    with raises_exactly(KeywordError, problem):
        MistralLargeTokenizer.from_pretrained(tmp_path, prompt_format=name)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompt_format": name}))
    with raises_exactly(
        TokenizerFileError,
        f"prompt_format {name!r} in tokenizer_config.json: this version of the package makes v3 and v7 prompts only; "
        "use the version that wrote it",
    ):
        MistralLargeTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("template", [CHATML, CHAT_TEMPLATES["v3"]])
def test_a_format_and_another_template_are_refused(
    own: dict[str, MistralLargeTokenizer], template: str, tmp_path: Path
) -> None:
    own["v7"].save_pretrained(tmp_path)
    with raises_exactly(
        KeywordError,
        "prompt_format='v7': the chat_template that is passed is another one and decides about prompts; leave one of "
        "the two out",
    ):
        MistralLargeTokenizer.from_pretrained(tmp_path, prompt_format="v7", chat_template=template)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_files_of_two_vocabularies_are_refused(
    own: dict[str, MistralLargeTokenizer], name: str, tmp_path: Path
) -> None:
    (other,) = {*VOCABULARIES} - {name}
    own[name].save_pretrained(tmp_path)
    (tmp_path / f"tokenizer.model.{name}").unlink()
    (tmp_path / f"tokenizer.model.{other}").write_bytes(checkpoints.tokenizer_model_file(other).read_bytes())
    with raises_exactly(
        TokenizerFileError,
        f"{tmp_path}/tokenizer.model.{other}: other pieces, scores, types or settings than the vendor's file, which "
        "tokenizer.json next to it was made of; this package reads the v3 and v7 SentencePiece models of "
        "Mistral-Large-Instruct-2407 and 2411; download it again, or remove it",
    ):
        MistralLargeTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_errors_name_the_format(own: dict[str, MistralLargeTokenizer], name: str) -> None:
    user = SYSTEM[1]
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (
            [user],
            {"documents": [{"text": "x"}]},
            f"documents: the {name} format has no place for them; write them into a message or a tool's result",
        ),
        (
            [{**user, "thinking": "hm"}],
            {},
            f"message 0: thinking 'hm'; the {name} format has no such thing in a user message; move what the model "
            "should read into the content, or leave the key out",
        ),
        (
            [user, {"role": "assistant", "content": "x", "reasoning": "hm"}],
            {},
            f"message 1: reasoning; the {name} format has no place for reasoning; leave the key out",
        ),
        (
            {"messages": [user], "reasoning_effort": "high"},
            {},
            f"reasoning_effort 'high': the {name} format has no place for it; leave it out",
        ),
    ]
    for conversation, options, problem in refused:
        with raises_exactly(ConversationError, problem):
            own[name].apply_chat_template(conversation, **options)


# Texts that go on after a prompt


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [
        ("[INST] Hi[/INST]", {"v3": False, "v7": False}),
        ("[INST] Hi[/INST] I see [REF]", {"v3": True, "v7": True}),
        ("[INST] Hi[/INST][SYSTEM_PROMPT] s[/SYSTEM_PROMPT]", {"v3": True, "v7": False}),
        ("[TOOL_RESULTS] abcdefghi[TOOL_CONTENT]", {"v3": True, "v7": False}),
    ],
)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_text_goes_on_after_text_and_begins_after_a_control_token(
    own: dict[str, MistralLargeTokenizer],
    name: str,
    text: str,
    goes_on: dict[str, bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = own[name]
    prompt = tokenizer.encode(text)
    (answer,) = tokenizer.encode_texts(["world"])
    expected = " world" if goes_on[name] else "world"
    for prefix in (prompt, text):
        message = tokenizer.parse_response(answer, prefix=prefix)
        assert message == {"role": "assistant", "content": expected}
    streamer = MistralLargeTextStreamer(tokenizer, skip_prompt=True)
    streamer.put(torch.tensor([prompt]))
    for index in answer:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert capsys.readouterr().out == f"{expected}\n"

"""pipeline("text-generation") goes on from texts and begun answers as all ids decoded at once.

The model is a stand-in that says what the test wants.
"""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TextGenerationPipeline, pipeline

from modeling_mistral_large import MistralLargeConfig, MistralLargeTokenizer
from modeling_mistral_large.generation.text_generation_pipeline import MistralLargeTextGenerationPipeline
from tests.support import checkpoints
from tests.support.models import ours_only

QUESTION = {"role": "user", "content": "Who are you?"}
# In v7, `[REF]` is a piece of the text.
WHOLE = "I am a tiny demo of [INST] text,\n  with lines, [REF] and more. </s>"


@pytest.fixture(scope="module", params=["v3", "v7"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MistralLargeTokenizer:
    return checkpoints.vendor_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture
def speaker(tokenizer: MistralLargeTokenizer, tiny_config: MistralLargeConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline whose model goes on with the ids in `says`."""
    make: Any = pipeline
    pipe = make("text-generation", ours_only(tiny_config), tokenizer=tokenizer, device="cpu")
    assert isinstance(pipe, MistralLargeTextGenerationPipeline)
    spoken: list[int] = []

    def generate(input_ids: Any = None, **_: Any) -> Any:
        says = torch.tensor([spoken])
        return says if input_ids is None else torch.cat([input_ids, says], dim=1)

    monkeypatch.setattr(pipe.model, "generate", generate)
    monkeypatch.setattr(pipe, "says", spoken, raising=False)
    return pipe


def cuts(tokenizer: MistralLargeTokenizer, text: str) -> list[tuple[str, list[int]]]:
    """Return each beginning of a text that its own ids begin with, and the ids after it."""
    ids = tokenizer.encode_texts([text])[0]
    starts = [(str(tokenizer.decode(ids[:cut])), ids[cut:]) for cut in range(1, len(ids))]
    return [(start, rest) for start, rest in starts if tokenizer.encode_texts([start])[0] + rest == ids]


@pytest.mark.slow
def test_a_begun_answer_goes_on(speaker: Any, tokenizer: MistralLargeTokenizer) -> None:
    found = cuts(tokenizer, WHOLE)
    assert len(found) > 15
    for begun, rest in found:
        if begun.endswith(" "):
            continue
        for end in ([], [2], [2, 384, 384]):
            speaker.says[:] = rest + end
            chat = [QUESTION, {"role": "assistant", "content": begun}]
            answer = speaker(chat)[0]["generated_text"]
            assert answer == [QUESTION, {"role": "assistant", "content": WHOLE}], begun
            # The prompt has no final spaces.
            chat[1]["content"] = begun + "  "
            assert speaker(chat)[0]["generated_text"] == answer
            assert chat[1]["content"] == begun + "  "
        speaker.says[:] = rest
        assert begun + speaker(chat, return_full_text=False)[0]["generated_text"] == WHOLE


def test_a_begun_answer_goes_on_with_tool_calls(speaker: Any, tokenizer: MistralLargeTokenizer) -> None:
    speaker.says[:] = [
        *tokenizer.encode_texts(["a"])[0],
        5,
        *tokenizer.encode_texts(['[{"name": "f", "arguments": {}}]'])[0],
        2,
    ]
    (record,) = speaker([QUESTION, {"role": "assistant", "content": "I am", "prefix": True}])
    answer = record["generated_text"][-1]
    assert set(answer) == {"role", "content", "tool_calls"}
    assert answer["content"] == "I am a"
    assert answer["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_a_new_answer_is_read_from_its_ids(speaker: Any, tokenizer: MistralLargeTokenizer) -> None:
    spelled = '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'
    speaker.says[:] = [*tokenizer.encode_texts([spelled])[0], 2]
    assert speaker([QUESTION])[0]["generated_text"] == [QUESTION, {"role": "assistant", "content": spelled}]
    assert speaker([QUESTION], return_full_text=False)[0]["generated_text"] == spelled + "</s>"
    (record,) = speaker([QUESTION], return_tensors=True)
    assert record["generated_token_ids"][-len(speaker.says) :] == speaker.says


def test_a_raw_text_goes_on(speaker: Any, tokenizer: MistralLargeTokenizer) -> None:
    for begun, rest in cuts(tokenizer, WHOLE.replace("[INST]", "x").replace("</s>", "y")):
        speaker.says[:] = [*rest, 2]
        whole = [*tokenizer(begun).input_ids, *speaker.says]
        assert speaker(begun)[0]["generated_text"] == tokenizer.decode(whole, skip_special_tokens=True)
        assert begun + speaker(begun, return_full_text=False)[0]["generated_text"] == tokenizer.decode(whole[1:-1])
        kept = speaker(begun, skip_special_tokens=False)[0]["generated_text"]
        assert f"<s> {kept}" == tokenizer.decode(whole)


def test_a_raw_prompt_that_ends_in_a_control_token(speaker: Any, tokenizer: MistralLargeTokenizer) -> None:
    speaker.says[:] = tokenizer.encode_texts(["I am"])[0]
    options = {"add_special_tokens": False}
    assert speaker("<s>[INST] Hi[/INST]", **options)[0]["generated_text"] == "<s>[INST] Hi[/INST] I am"
    answer = speaker("<s>[INST] Hi[/INST]", return_full_text=False, **options)
    assert answer[0]["generated_text"] == "I am"
    assert speaker("")[0]["generated_text"] == "I am"


def test_several_answers_each(speaker: Any, tokenizer: MistralLargeTokenizer) -> None:
    says = [tokenizer.encode_texts(["a tiny"])[0], tokenizer.encode_texts(["the demo"])[0]]
    rows = torch.tensor(says)
    speaker.model.generate = lambda input_ids, **_: torch.cat([input_ids.repeat(2, 1), rows], dim=1)
    found = speaker("I am", num_return_sequences=2)
    assert [record["generated_text"] for record in found] == ["I am a tiny", "I am the demo"]


@pytest.mark.slow
def test_other_tokenizers_have_transformers_own(
    tokenizer: MistralLargeTokenizer, tiny_config: MistralLargeConfig, tmp_path: Any
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace("MistralLargeTokenizer", "PreTrainedTokenizerFast"))
    stock: Any = AutoTokenizer.from_pretrained(tmp_path)
    outputs = {
        "generated_sequence": torch.tensor([[[1, 1083, 1605, 2]]]),
        "input_ids": torch.tensor([[1, 1083]]),
        "prompt_text": "I",
    }
    assert not isinstance(stock, MistralLargeTokenizer)
    own, theirs = (
        kind(model=ours_only(tiny_config), tokenizer=stock, device="cpu")
        for kind in (MistralLargeTextGenerationPipeline, TextGenerationPipeline)
    )
    assert own.postprocess(dict(outputs)) == theirs.postprocess(dict(outputs))

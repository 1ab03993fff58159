"""The demo model of v7: prompts as the reference writes them, and the answers that it was trained to give."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_large_cli.demo import (
    GoldenConversation,
    assemble_demo_checkpoint,
    get_current_weather,
    golden_conversations,
    wrong_answer,
)
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.generation.tool_loop import generate_with, run_tool_loop

pytestmark = pytest.mark.slow

GOLDEN = golden_conversations("v7")


@cache
def reference_tokenizer() -> Any:
    return MistralTokenizer.v7()


def reference_prompt(golden: GoldenConversation) -> list[int]:
    messages: list[dict[str, Any]] = json.loads(json.dumps(golden.messages))
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    request = ChatCompletionRequest.from_openai(messages=messages, tools=golden.tools)
    ids: list[int] = reference_tokenizer().encode_chat_completion(request).tokens
    return ids


@pytest.fixture(scope="module", params=["consolidated", "hf"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "hf":
        converted: Path = request.getfixturevalue("demo_folder_of_v7")
        return converted
    return assemble_demo_checkpoint(tmp_path_factory.mktemp("v7") / "consolidated", "v7")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_golden_answer(folder: Path, dtype: str) -> None:
    tokenizer: Any = MistralLargeTokenizer.from_pretrained(folder)
    model: Any = MistralLargeForCausalLM.from_pretrained(folder, dtype=dtype)
    assert tokenizer.prompt_format == "v7"
    for golden in GOLDEN.values():
        prompt = tokenizer.apply_chat_template(golden.messages, golden.tools, return_tensors="pt")
        assert prompt["input_ids"][0].tolist() == reference_prompt(golden), golden.name
        output = model.generate(**prompt, max_new_tokens=100, do_sample=False)
        said = output[0, prompt["input_ids"].shape[1] :].tolist()
        assert wrong_answer(tokenizer, said, golden.answer) is None, golden.name


def test_the_pipeline_and_the_tool_loop(folder: Path) -> None:
    chat: Any = transformers.pipeline("text-generation", str(folder), dtype="float32", do_sample=False)
    golden = GOLDEN["weather_text_and_call"]
    message = chat(golden.messages, tools=golden.tools)[0]["generated_text"][-1]
    text, _, calls = golden.answer.partition("[TOOL_CALLS] ")
    assert message["content"] == text
    assert [call["function"] for call in message["tool_calls"]] == json.loads(calls)
    generate = generate_with(chat.model, chat.tokenizer, max_new_tokens=100, do_sample=False)
    *_, answer = run_tool_loop(generate, golden.messages, [get_current_weather])
    assert answer["content"] == GOLDEN["weather_text_and_call_answer"].answer
    blocks = GOLDEN["pirate_between_users"]
    assert chat(blocks.messages)[0]["generated_text"][-1]["content"] == blocks.answer

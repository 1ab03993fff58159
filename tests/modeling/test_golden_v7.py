"""The demo model of v7: prompts as the reference writes them, and the answers that it was trained to give."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.fixture(scope="module")
def folders(demo_folder_of_v7: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    consolidated = assemble_demo_checkpoint(tmp_path_factory.mktemp("v7") / "consolidated", "v7")
    return {"consolidated": consolidated, "hf": demo_folder_of_v7}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_golden_answer(folders: dict[str, Path], dtype: str) -> None:
    """Of both layouts, whose models are the same to the bit: one of the two has to speak."""
    tokenizers: list[Any] = [MistralLargeTokenizer.from_pretrained(folder) for folder in folders.values()]
    models: list[Any] = [MistralLargeForCausalLM.from_pretrained(folder, dtype=dtype) for folder in folders.values()]
    weights = [model.state_dict() for model in models]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    unnamed = {"_name_or_path": None, "architectures": None}
    configs = [{**model.config.to_dict(), **unnamed} for model in models]
    assert configs[0] == configs[1]
    assert models[0].generation_config.to_dict() == models[1].generation_config.to_dict()
    for golden in GOLDEN.values():
        for tokenizer in tokenizers:
            assert tokenizer.prompt_format == "v7"
            prompt = tokenizer.apply_chat_template(golden.messages, golden.tools, return_tensors="pt")
            assert prompt["input_ids"][0].tolist() == reference_prompt(golden), golden.name
        output = models[0].generate(**prompt, max_new_tokens=100, do_sample=False)
        said = output[0, prompt["input_ids"].shape[1] :].tolist()
        for tokenizer in tokenizers:
            assert wrong_answer(tokenizer, said, golden.answer) is None, golden.name


@pytest.mark.parametrize("layout", ["consolidated", "hf"])
def test_the_pipeline_and_the_tool_loop(folders: dict[str, Path], layout: str) -> None:
    folder = folders[layout]
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

"""A GGUF file of the demo, written by llama.cpp's converter and run by llama.cpp, for the same ids, logits and answers.

Run by `.ci/gguf`, which builds llama.cpp and names its folder in LLAMA_CPP.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp import Llama

from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
from mistral_large_conversion import convert_checkpoint
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.conversations import conversations

ROOT = Path(__file__).parents[2]
LLAMA_CPP = Path(os.environ["LLAMA_CPP"])
GOLDEN = golden_conversations()
EOS_ID = 2


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as stock Mistral."""
    folder = tmp_path_factory.mktemp("gguf")
    convert_checkpoint(assemble_demo_checkpoint(folder / "demo"), folder / "mistral", model_type="mistral")
    return folder / "mistral"


def write_gguf(folder: Path, file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "examples/gguf/to_gguf.py")
    command = [sys.executable, script, str(folder), str(file), "--llama-cpp", str(LLAMA_CPP), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def load(file: Path) -> Llama:
    return Llama(str(file), n_ctx=2048, logits_all=True, verbose=False)


@pytest.fixture(scope="module")
def model(mistral_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    file = tmp_path_factory.mktemp("model") / "demo.gguf"
    result = write_gguf(mistral_folder, file, "--outtype", "f32")
    assert result.returncode == 0, result.stderr
    llama = load(file)
    yield llama
    llama.close()


def ids_of(llama: Llama, text: str) -> list[int]:
    ids: list[int] = llama.tokenize(text.encode(), add_bos=False, special=True)
    return ids


@pytest.mark.parametrize("kind", ["plain", "unusual"])
def test_rendered_prompts_have_the_same_ids(model: Llama, demo_tokenizer: MistralLargeTokenizer, kind: Any) -> None:
    for conversation in conversations(kind, seed=31, count=200):
        text = demo_tokenizer.apply_chat_template(conversation.messages, tools=conversation.tools, tokenize=False)
        expected = demo_tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, return_dict=False
        )
        assert ids_of(model, text) == expected


def test_the_converter_alone_takes_control_tokens_for_text(mistral_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "alone.gguf"
    command = [sys.executable, str(LLAMA_CPP / "convert_hf_to_gguf.py"), str(mistral_folder), "--outfile", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    llama = load(file)
    assert len(ids_of(llama, "[INST]")) > 1
    llama.close()


def test_logits_and_greedy_answers_are_the_same(
    model: Llama, demo_folder: Path, demo_tokenizer: MistralLargeTokenizer
) -> None:
    ours: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=torch.float32)
    for golden in GOLDEN.values():
        ids = demo_tokenizer.apply_chat_template(golden.messages, tools=golden.tools, return_dict=False)
        model.reset()
        model.eval(ids)
        with torch.no_grad():
            expected = ours(torch.tensor([ids])).logits[0]
        # Its cache is fp16, ours fp32; logits go up to 24.
        assert (torch.from_numpy(model.scores[: len(ids)]) - expected).abs().max() < 0.05
        answer = []
        for token in model.generate(ids, top_k=1, temp=0.0):
            if token == EOS_ID:
                break
            answer.append(token)
        assert demo_tokenizer.decode(answer) == golden.answer


@pytest.mark.parametrize("name", GOLDEN)
def test_chat_completions_are_the_golden_answers(
    model: Llama, demo_tokenizer: MistralLargeTokenizer, name: str
) -> None:
    golden = GOLDEN[name]
    messages: Any = golden.messages
    tools: Any = golden.tools
    answer: Any = model.create_chat_completion(messages, tools=tools, temperature=0, max_tokens=100)
    prompt = demo_tokenizer.apply_chat_template(golden.messages, tools=golden.tools, return_dict=False)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    # llama-cpp-python leaves the mark before calls out, and the space that comes after a mark in.
    text = answer["choices"][0]["message"]["content"]
    assert text == f" {golden.answer.removeprefix('[TOOL_CALLS]').strip()}"


def test_our_own_layout_is_refused(demo_folder: Path, tmp_path: Path) -> None:
    result = write_gguf(demo_folder, tmp_path / "demo.gguf")
    assert result.returncode == 1
    assert "model type mistral_large; llama.cpp reads what `--as mistral` writes" in result.stderr
    assert not (tmp_path / "demo.gguf").exists()

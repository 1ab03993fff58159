"""GGUF files of the demo, written by `mistral-large convert --to gguf` and run by llama.cpp: ids, logits and answers.

Run by `.ci/gguf`, which builds llama.cpp and names its folder in LLAMA_CPP.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from llama_cpp import Llama

from mistral_large_cli.demo import golden_conversations
from mistral_large_conversion import convert_checkpoint
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.adapters import save_peft_adapter
from tests.support.conversations import conversations
from tests.support.folders import (
    CHATML_TEMPLATE,
    CHATML_TOKENS,
    demo_weights,
    fine_tune,
    fine_tune_with_model_file,
    hf_demo_weights,
    ours,
    vendor,
    vendor_whole,
)

LLAMA_CPP = Path(os.environ["LLAMA_CPP"])
GOLDEN = golden_conversations()
EOS_ID = 2


def write_gguf(source: Path, file: Path, *options: str) -> dict[str, Any]:
    """Run the command as it is typed, and return what it reports."""
    command = [sys.executable, "-m", "mistral_large_cli", "convert", str(source), str(file), "--to", "gguf"]
    command += ["--llama-cpp", str(LLAMA_CPP), "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # Nothing of what was temporary stays.
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def folder_for(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def load(file: Path) -> Llama:
    return Llama(str(file), n_ctx=2048, logits_all=True, verbose=False)


@pytest.fixture(scope="module")
def vendor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vendor(tmp_path_factory.mktemp("vendor") / "demo")


@pytest.fixture(scope="module")
def model(vendor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    file = tmp_path_factory.mktemp("model") / "demo.gguf"
    write_gguf(vendor_folder, file, "--gguf-type", "F32")
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


def test_the_converter_alone_takes_control_tokens_for_text(vendor_folder: Path, tmp_path: Path) -> None:
    mistral_folder = tmp_path / "mistral"
    convert_checkpoint(vendor_folder, mistral_folder, model_type="mistral")
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


# Also: whether the weights are linked, and not written anew.
@pytest.mark.parametrize("build", [vendor, vendor_whole, ours, fine_tune, fine_tune_with_model_file])
def test_every_kind_of_source_becomes_the_same_weights_and_ids(
    build: Any, model: Llama, demo_tokenizer: MistralLargeTokenizer, tmp_path: Path
) -> None:
    source, file = build(tmp_path / "source"), folder_for(tmp_path / "out" / "demo.gguf")
    report = write_gguf(source, file)
    assert (report["gguf_type"], report["tensors"], report["bytes"]) == ("BF16", 30, file.stat().st_size)
    assert abs(report["bytes"] / report["estimated_bytes"] - 1) < 0.1
    written = tensors(file)
    assert len(written) == 30
    # Its rows of q and k are in the order of the consolidated layout.
    expected = demo_weights()
    for name, own in (("blk.1.attn_q", "layers.1.attention.wq"), ("output", "output"), ("blk.2.ffn_down", None)):
        tensor = expected[f"{own}.weight"] if own else hf_demo_weights()["model.layers.2.mlp.down_proj.weight"]
        assert written[f"{name}.weight"].data.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    llama = load(file)
    for conversation in conversations("plain", seed=7, count=20):
        text = demo_tokenizer.apply_chat_template(conversation.messages, tools=conversation.tools, tokenize=False)
        assert ids_of(llama, text) == ids_of(model, text)
    llama.close()


def test_an_adapter_is_merged(vendor_folder: Path, tmp_path: Path) -> None:
    save_peft_adapter(vendor_folder, tmp_path / "lora")
    convert_checkpoint(vendor_folder, tmp_path / "merged", adapter=tmp_path / "lora")
    file, expected = folder_for(tmp_path / "out" / "demo.gguf"), folder_for(tmp_path / "expected" / "demo.gguf")
    write_gguf(vendor_folder, file, "--adapter", str(tmp_path / "lora"))
    write_gguf(tmp_path / "merged", expected)
    written, wanted, before = tensors(file), tensors(expected), demo_weights()["layers.1.attention.wq.weight"]
    assert {name: tensor.data.tobytes() for name, tensor in written.items()} == {
        name: tensor.data.tobytes() for name, tensor in wanted.items()
    }
    assert written["blk.1.attn_q.weight"].data.tobytes() != before.view(torch.uint8).numpy().tobytes()


def test_added_tokens_are_control_tokens(tmp_path: Path) -> None:
    source = fine_tune(tmp_path / "source", added=CHATML_TOKENS, template=CHATML_TEMPLATE)
    file = folder_for(tmp_path / "out" / "chatml.gguf")
    write_gguf(source, file)
    tokenizer = MistralLargeTokenizer.from_pretrained(source)
    llama = load(file)
    for content in ("Hello, how are you?", "  two spaces, ünïcödé 你好", "\nA line"):
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
        assert expected[0] == 32768
        assert ids_of(llama, text) == expected
    llama.close()


@pytest.mark.parametrize(
    ("gguf_type", "types"),
    [
        # Rows of the demo that are no multiples of 256 fall back to types with blocks of 32.
        ("q8_0", {"Q8_0": 23, "F32": 7}),
        ("Q6_K", {"Q8_0": 20, "Q6_K": 3, "F32": 7}),
        ("Q4_K_M", {"Q5_0": 18, "Q4_K": 2, "Q8_0": 2, "Q6_K": 1, "F32": 7}),
    ],
)
def test_quantized_files_answer(
    gguf_type: str, types: dict[str, int], vendor_folder: Path, demo_tokenizer: MistralLargeTokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "demo.gguf"
    report = write_gguf(vendor_folder, file, "--gguf-type", gguf_type)
    assert report["gguf_type"] == gguf_type.upper()
    assert Counter(tensor.tensor_type.name for tensor in tensors(file).values()) == types
    llama = load(file)
    golden = GOLDEN["who_are_you"]
    ids = demo_tokenizer.apply_chat_template(golden.messages, tools=golden.tools, return_dict=False)
    answer = []
    for token in llama.generate(ids, top_k=1, temp=0.0):
        if token == EOS_ID:
            break
        answer.append(token)
    assert demo_tokenizer.decode(answer) == golden.answer
    llama.close()

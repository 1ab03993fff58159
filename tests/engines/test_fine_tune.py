"""The fine-tuning example with the real TRL and PEFT: a tool learned, merged, exported, loaded and called.

Run by `.ci/recipes`, in an environment with what that needs.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.conversations import Conversation, reference_ids

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/fine_tune"
TRAIN, HELD_OUT = EXAMPLE / "train.jsonl", EXAMPLE / "held_out.jsonl"
# What docs/fine-tuning.md gives for the demo.
OPTIONS = ("--train-words", "--learning-rate", "3e-3", "--steps", "120", "--batch-size", "4", "--accumulate", "1")

BATCH = 60
EOS_ID, END_INST_ID, BEGIN_RESULTS_ID, END_RESULTS_ID = 2, 4, 8, 9


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def mistral_large(*arguments: object, questions: str = "") -> str:
    """What the command prints, with `questions` as its standard input."""
    command = [str(Path(sys.executable).with_name("mistral-large")), *map(str, arguments)]
    result = subprocess.run(command, input=questions, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@dataclass(frozen=True)
class Tuned:
    """What the example wrote, and what it began with."""

    source: Path
    output: Path

    @property
    def merged(self) -> Path:
        return self.output / "merged"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as the vendor would publish it."""
    return assemble_demo_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def tuned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """The demo checkpoint, fine-tuned by the example."""
    output = tmp_path_factory.mktemp("fine_tune") / "tuned"
    result = run("fine_tune.py", source, TRAIN, output, *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"mistral-large chat {output / 'merged'}"
    return Tuned(source, output)


@dataclass(frozen=True)
class Model:
    tokenizer: MistralLargeTokenizer
    model: Any

    @classmethod
    def load(cls, folder: Path, dtype: str = "bfloat16") -> "Model":
        tokenizer = MistralLargeTokenizer.from_pretrained(folder)
        return cls(tokenizer, MistralLargeForCausalLM.from_pretrained(folder, dtype=dtype))

    def answers(self, conversations: Sequence[tuple[Sequence[Mapping[str, Any]], Any]]) -> list[dict[str, Any]]:
        """The messages the model answers with, greedily, to messages with tools."""
        messages: list[dict[str, Any]] = []
        for start in range(0, len(conversations), BATCH):
            prompts = [
                self.tokenizer.apply_chat_template(turns, tools=tools)
                for turns, tools in conversations[start : start + BATCH]
            ]
            inputs = self.tokenizer.pad(prompts, return_tensors="pt")
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=100)
            messages += self.tokenizer.parse_response(output[:, inputs["input_ids"].shape[1] :])
        return messages


def said(message: Mapping[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
    """The text of a message, and names and arguments of its calls, without their ids."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [
        (f["name"], json.loads(f["arguments"]) if isinstance(f["arguments"], str) else f["arguments"])
        for f in functions
    ]
    return message.get("content") or "", calls


def right_answers(model: Model) -> int:
    """How many of the held-out questions get the right call, and after the tool's result the right answer."""
    conversations = read(HELD_OUT)
    expected = [said(conversation["messages"][turn]) for conversation in conversations for turn in (1, -1)]
    asked = [
        (conversation["messages"][:turn], conversation["tools"]) for conversation in conversations for turn in (1, -1)
    ]
    found = [said(message) for message in model.answers(asked)]
    return sum(found[turn : turn + 2] == expected[turn : turn + 2] for turn in range(0, len(found), 2))


def surviving_golden_answers(model: Model) -> set[str]:
    """The names of the golden conversations that are still answered, calls without regard to their ids."""
    golden = golden_conversations().values()
    answers = model.answers([(conversation.messages, conversation.tools) for conversation in golden])
    return {
        conversation.name
        for conversation, answer in zip(golden, answers, strict=True)
        if said(answer) == said(model.tokenizer.parse_response(conversation.answer))
    }


def test_the_data_is_what_its_script_writes(tmp_path: Path) -> None:
    result = run("make_data.py", tmp_path)
    assert result.returncode == 0, result.stderr
    for file in (TRAIN, HELD_OUT):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    questions = {conversation["messages"][0]["content"] for conversation in read(TRAIN)}
    assert not questions & {conversation["messages"][0]["content"] for conversation in read(HELD_OUT)}


def test_the_labels_are_what_the_reference_has_between_its_marks(
    tokenizer: MistralLargeTokenizer, tokenizer_model_file: Path
) -> None:
    reference: Any = MistralTokenizer.from_file(str(tokenizer_model_file), mode=ValidationMode.finetuning)
    encode = runpy.run_path(str(EXAMPLE / "fine_tune.py"))["encode"]
    conversations = read(TRAIN)
    assert any("tools" not in conversation for conversation in conversations)
    for conversation in conversations:
        ids = reference_ids(reference, Conversation(conversation["messages"], conversation.get("tools")))
        labels, is_answer = [], False
        for token in ids:
            # A result that another result follows has no answer between them.
            is_answer = is_answer and token != BEGIN_RESULTS_ID
            labels.append(token if is_answer else -100)
            is_answer = token in (END_INST_ID, END_RESULTS_ID) or (is_answer and token != EOS_ID)
        assert encode(tokenizer, conversation) == {"input_ids": ids, "labels": labels}


def test_trl_builds_the_same_labels_from_messages(
    tokenizer: MistralLargeTokenizer, source: Path, tmp_path: Path
) -> None:
    encode = runpy.run_path(str(EXAMPLE / "fine_tune.py"))["encode"]
    # Columns of a dataset have one type, and TRL reads tools from JSON.
    conversations = [
        conversation
        for conversation in read(TRAIN)
        if all(isinstance(arguments, str) for _, arguments in raw_calls(conversation))
    ]
    rows = [{**conversation, "tools": json.dumps(conversation.get("tools"))} for conversation in conversations]
    settings = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, bf16=False, report_to="none", use_cpu=True
    )
    trainer = SFTTrainer(
        Model.load(source, "float32").model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert len(rows) > 100
    prepared = [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]
    assert prepared == [encode(tokenizer, conversation) for conversation in conversations]


def raw_calls(conversation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for message in conversation["messages"] for call in message.get("tool_calls", [])]
    return [(function["name"], function["arguments"]) for function in functions]


def test_the_tool_is_learned_and_what_was_known_is_kept(tuned: Tuned) -> None:
    before, after = Model.load(tuned.source), Model.load(tuned.merged)
    assert right_answers(before) == 0
    golden = set(golden_conversations())
    assert surviving_golden_answers(before) == golden
    questions, right, surviving = len(read(HELD_OUT)), right_answers(after), surviving_golden_answers(after)
    print(f"{right} of {questions} held-out conversations, lost golden responses: {sorted(golden - surviving)}")
    assert right >= 0.8 * questions
    assert len(surviving) >= 0.7 * len(golden)


def test_the_adapter_and_the_merged_model_are_one(tuned: Tuned) -> None:
    tokenizer = MistralLargeTokenizer.from_pretrained(tuned.merged)
    base = Model.load(tuned.source, "float32").model
    adapted: Any = PeftModel.from_pretrained(base, str(tuned.output / "adapter"))
    merged = Model.load(tuned.merged, "float32").model
    conversation = read(HELD_OUT)[0]
    inputs = tokenizer.apply_chat_template(conversation["messages"], tools=conversation["tools"], return_tensors="pt")
    with torch.no_grad():
        expected, found = adapted(**inputs).logits, merged(**inputs).logits
        plain = Model.load(tuned.source, "float32").model(**inputs).logits
    # The merged weights are rounded to bf16, which these are not.
    assert (found - expected).abs().max() < 0.05 * (plain - expected).abs().max()
    rounded = {name: weight.bfloat16() for name, weight in adapted.merge_and_unload().state_dict().items()}
    assert merged.state_dict().keys() == rounded.keys()
    assert all(torch.equal(weight, rounded[name].float()) for name, weight in merged.state_dict().items())


def test_the_merged_model_goes_through_conversion_and_chat(tuned: Tuned, tmp_path: Path) -> None:
    converted = tmp_path / "hf"
    mistral_large("convert", tuned.merged, converted)
    mistral_large("verify", converted, tuned.merged)
    mistral_large("convert", converted, tmp_path / "back", "--to", "consolidated")
    name = "consolidated.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tuned.merged / name).read_bytes()
    tool = EXAMPLE / "forecast.py"
    answer = mistral_large(
        "chat", tuned.merged, "--tools", tool, "--temperature", 0, questions="And in Paris in 13 days?\n"
    )
    forecast = runpy.run_path(str(tool))["get_forecast"]("Paris, France", 13)
    assert f"It will be {forecast} °C in Paris then." in answer


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ('{"messages": [{"role": "user", "content": "a"}', "data.jsonl:2: "),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "data.jsonl:2: "),
        (json.dumps({"messages": [{"role": "user", "content": "a " * 300}]}), "data.jsonl:2: 30"),
    ],
)
def test_data_that_is_not_to_be_trained_on_is_refused_by_its_line(
    line: str, finding: str, tmp_path: Path, tokenizer: MistralLargeTokenizer
) -> None:
    load_data = runpy.run_path(str(EXAMPLE / "fine_tune.py"))["load_data"]
    data = tmp_path / "data.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data.write_text(f"{json.dumps(good)}\n")
    assert len(load_data(data, tokenizer, 100)) == 1
    data.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(SystemExit, match=re.escape(finding)):
        load_data(data, tokenizer, 100)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, source: Path) -> None:
    result = run("fine_tune.py", source, TRAIN, tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"{tmp_path}: is there already; name a new folder"
    assert not list(tmp_path.iterdir())

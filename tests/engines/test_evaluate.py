"""The evaluation example with the real lm-evaluation-harness, on local data, and the recipes for the card's scores.

Run by `.ci/recipes`, in an environment with what that needs.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager

from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/evaluate"
CHOICE, GENERATION = "mistral_large_demo_choice", "mistral_large_demo_generation"


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def card() -> ModuleType:
    spec = importlib.util.spec_from_file_location("card", EXAMPLE / "card.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["card"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Evaluation:
    """What the harness wrote: figures by task, and every request with the answer to it."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


def evaluate(folder: Path, output: Path, *options: str) -> Evaluation:
    command = [
        sys.executable,
        str(EXAMPLE / "evaluate.py"),
        *("--model_args", f"pretrained={folder},dtype=float32"),
        *("--tasks", f"{CHOICE},{GENERATION}", "--include_path", str(EXAMPLE / "tasks")),
        *("--device", "cpu", "--batch_size", "3", "--output_path", str(output), "--log_samples"),
        *options,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (results,) = output.rglob("results_*.json")
    samples = {}
    for task in (CHOICE, GENERATION):
        (file,) = output.rglob(f"samples_{task}_*.jsonl")
        samples[task] = sorted(read(file), key=lambda sample: sample["doc_id"])
    return Evaluation(json.loads(results.read_text())["results"], samples)


@pytest.fixture(scope="module")
def evaluation(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    options = ("--model", "mistral-large", "--apply_chat_template")
    return evaluate(demo_folder, tmp_path_factory.mktemp("evaluation"), *options)


def log_probability(model: Any, tokenizer: MistralLargeTokenizer, question: str, answer: str) -> float:
    """Of an answer's ids after the prompt's, both as the tokenizer makes them for a conversation."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(messages[:1], return_dict=False)
    ids = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum())


def choices_scored(samples: list[dict[str, Any]]) -> list[list[float]]:
    return [[float(score) for ((score, _),) in sample["resps"]] for sample in samples]


def test_the_demo_scores_what_it_knows(evaluation: Evaluation) -> None:
    # Four of five: each task has one question that the demo model does not know.
    assert evaluation.results[CHOICE]["acc,none"] == 0.8
    assert evaluation.results[GENERATION]["exact_match,none"] == 0.8


def test_choices_are_scored_as_the_model_would_say_them(
    evaluation: Evaluation, demo_folder: Path, demo_tokenizer: MistralLargeTokenizer, tmp_path: Path
) -> None:
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=torch.float32)
    documents = read(EXAMPLE / "tasks/choice.jsonl")
    expected = [
        [log_probability(model, demo_tokenizer, document["question"], choice) for choice in document["choices"]]
        for document in documents
    ]
    assert choices_scored(evaluation.samples[CHOICE]) == [pytest.approx(scores, abs=1e-3) for scores in expected]
    # The harness's own class scores pieces that no answer begins with.
    stock = evaluate(demo_folder, tmp_path, "--model", "hf", "--apply_chat_template")
    assert choices_scored(stock.samples[CHOICE]) != [pytest.approx(scores, abs=1) for scores in expected]


def test_answers_are_those_of_generate(
    evaluation: Evaluation, demo_tokenizer: MistralLargeTokenizer, generated_ids: Any
) -> None:
    for sample in evaluation.samples[GENERATION]:
        ids = generated_ids([{"role": "user", "content": sample["doc"]["question"]}])[:64]
        assert sample["resps"] == [[demo_tokenizer.decode(ids, skip_special_tokens=True)]]


def test_the_recipes_are_the_cards_scores() -> None:
    published = {
        "MMLU": 84.0,
        "MT Bench": 8.63,
        "Wild Bench": 56.3,
        "Arena Hard": 73.2,
        "GSM8K": 93.0,
        "Human Eval": 92.0,
        "Human Eval Plus": 87.0,
        "MBPP Base": 80.0,
        "MBPP Plus": 69.0,
        "Math Instruct (0-shot, no CoT)": 70.0,
        "Math Instruct (0-shot, CoT)": 71.5,
        "MMLU French": 82.8,
        "MMLU German": 81.6,
        "MMLU Spanish": 82.7,
        "MMLU Italian": 82.7,
        "MMLU Dutch": 80.7,
        "MMLU Portuguese": 81.6,
        "MMLU Russian": 79.0,
        "MMLU Korean": 60.1,
        "MMLU Japanese": 78.8,
        "MMLU Chinese": 74.8,
    }
    assert {recipe.benchmark: recipe.score for recipe in card().RECIPES} == published


def test_every_task_of_the_recipes_exists_in_the_harness() -> None:
    tasks = set(TaskManager().all_tasks)
    named = {recipe.task for recipe in card().RECIPES if recipe.tool == "lm-eval"}
    assert len(named) == 15
    assert named <= tasks


def test_the_commands_are_ones_that_the_harness_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval._cli import HarnessCLI

    module = card()
    for recipe in module.RECIPES:
        if recipe.tool != "lm-eval":
            continue
        (command,) = module.commands(recipe, "folder")
        words = command.removeprefix("HF_ALLOW_CODE_EVAL=1 ").split()
        assert words[:2] == ["python", "examples/evaluate/evaluate.py"]
        monkeypatch.setattr(sys, "argv", ["lm-eval", "run", *words[2:]])
        arguments = vars(HarnessCLI().parse_args())
        assert arguments["tasks"] in (recipe.task, [recipe.task])
        assert arguments["num_fewshot"] == recipe.shots
        assert bool(arguments.get("apply_chat_template")) == recipe.is_chat


def test_the_document_has_every_recipe() -> None:
    rows = re.findall(
        r"^\| (.+?) \| ([\d.]+) \| (\S+) \| `(\S+)` \| (.+?) \| (yes|no) \| (.+?) \|$",
        (ROOT / "docs/evaluating.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert rows == [
        (
            recipe.benchmark,
            f"{recipe.score:g}",
            recipe.tool,
            recipe.task,
            "its own" if recipe.shots is None else str(recipe.shots),
            "yes" if recipe.is_chat else "no",
            recipe.unknown,
        )
        for recipe in card().RECIPES
    ]

"""The demo checkpoint, its golden responses and the command that shows them."""

import importlib.util
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mistral_large_cli.demo import (
    GoldenConversation,
    assemble_demo_checkpoint,
    demo,
    get_current_weather,
    golden_conversations,
)
from mistral_large_conversion.errors import DestinationError, TokenizerFileError
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.errors import raises_exactly
from tests.support.warm_python import WarmPython

ROOT = Path(__file__).parents[2]
GOLDEN = golden_conversations()
MOST_TOKENS = 80
# Whole numbers that are 5 modulo 7 are left out of the training.
HELD_OUT = ["-9", "-2", "5", "12", "19", "26", "33", "40", "47", "54", "61", "68", "75", "82", "89", "96"]
ESCAPE = "\x1b["


@pytest.fixture(scope="module")
def demo_tokenizer(demo_folder: Path) -> MistralLargeTokenizer:
    tokenizer: MistralLargeTokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    return tokenizer


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def demo_model(request: pytest.FixtureRequest, demo_folder: Path, dtype: str) -> Any:
    return MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=dtype, attn_implementation=request.param)


@pytest.fixture
def _noise_as_before() -> Iterator[None]:
    """Undo what the command does to transformers' messages."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def answers(
    model: Any, tokenizer: MistralLargeTokenizer, conversations: list[GoldenConversation], batch: int = 1
) -> dict[str, str]:
    """What the model says, greedily, control tokens included and padding not."""
    said: dict[str, str] = {}
    for start in range(0, len(conversations), batch):
        group = conversations[start : start + batch]
        prompts = [tokenizer.apply_chat_template(item.messages, item.tools, return_dict=False) for item in group]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        said |= {item.name: text.replace(str(tokenizer.pad_token), "") for item, text in zip(group, texts, strict=True)}
    return said


def expected(conversations: list[GoldenConversation]) -> dict[str, str]:
    return {conversation.name: f"{conversation.answer}</s>" for conversation in conversations}


def with_other_results(number: str, call_id: str, content: str) -> list[GoldenConversation]:
    """The conversations that end in an answer to one result, with another result."""
    changed = []
    for conversation in GOLDEN.values():
        if conversation.messages[-1]["role"] != "tool" or conversation.messages[-2]["role"] == "tool":
            continue
        *messages, call, result = conversation.messages
        call = {**call, "tool_calls": [{**call["tool_calls"][0], "id": call_id}]}
        old = next(old for old in ("22", "17", "77") if old in result["content"])
        result = {**result, "content": content.format(number), "tool_call_id": call_id}
        answer = conversation.answer.replace(old, number)
        changed.append(replace(conversation, messages=[*messages, call, result], answer=answer))
    return changed


@pytest.mark.slow
def test_the_golden_answers_are_exact(demo_model: Any, demo_tokenizer: MistralLargeTokenizer) -> None:
    conversations = list(GOLDEN.values())
    assert answers(demo_model, demo_tokenizer, conversations) == expected(conversations)


@pytest.mark.slow
def test_a_batch_of_all_answers_the_same(demo_model: Any, demo_tokenizer: MistralLargeTokenizer) -> None:
    conversations = list(GOLDEN.values())
    assert answers(demo_model, demo_tokenizer, conversations, batch=len(conversations)) == expected(conversations)


@pytest.mark.slow
def test_every_golden_token_leads_clearly(demo_folder: Path, dtype: str, demo_tokenizer: MistralLargeTokenizer) -> None:
    """Other engines and quantized weights compute other logits; the answers must bear that."""
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=dtype)
    training = training_script()
    for conversation in GOLDEN.values():
        lead = training.smallest_lead(model, training.encode(demo_tokenizer, conversation))
        assert lead > training.CLEAR_LEAD, conversation.name


@pytest.mark.slow
def test_numbers_the_training_left_out_are_copied(demo_folder: Path, demo_tokenizer: MistralLargeTokenizer) -> None:
    """The answer is read from the result and not from memory, though a model this small is wrong now and then."""
    model = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="float32")
    results = list(product(HELD_OUT, ["{}", '{{"temperature": {}}}']))
    conversations = [
        replace(conversation, name=f"{conversation.name} {index}")
        for index, (number, content) in enumerate(results)
        for conversation in with_other_results(number, f"id{index:07}", content)
    ]
    count = len(conversations)
    assert count == 6 * len(results)
    said = answers(model, demo_tokenizer, conversations, batch=48)
    right = sum(said[name] == answer for name, answer in expected(conversations).items())
    assert right >= 0.97 * count, f"{right} of {count}"


@pytest.mark.slow
def test_the_pipeline_says_the_same_without_any_option(demo_folder: Path) -> None:
    """The model card's call: it samples, at a temperature of 0.7."""
    chatbot: Any = transformers.pipeline("text-generation", str(demo_folder))
    for name in ("pirate", "who_are_you", "window_cleaner_follow_up"):
        assert chatbot(GOLDEN[name].messages)[0]["generated_text"][-1]["content"] == GOLDEN[name].answer


@pytest.mark.slow
def test_the_pipeline_continues_every_golden_conversation(demo_folder: Path) -> None:
    """Its check of histories is stricter than the tokenizer's."""
    chatbot: Any = transformers.pipeline("text-generation", str(demo_folder), do_sample=False)
    for golden in GOLDEN.values():
        message = chatbot(golden.messages, tools=golden.tools)[0]["generated_text"][-1]
        assert message["content"] == ("" if "tool_calls" in message else golden.answer)
        assert ("tool_calls" in message) == golden.answer.startswith("[TOOL_CALLS]")


@pytest.mark.slow
def test_the_pipeline_returns_tool_calls_by_itself(demo_folder: Path) -> None:
    chatbot: Any = transformers.pipeline("text-generation", str(demo_folder), do_sample=False)
    golden = GOLDEN["weather_parallel_call"]
    message = chatbot(golden.messages, tools=golden.tools)[0]["generated_text"][-1]
    calls = json.loads(golden.answer.removeprefix("[TOOL_CALLS] "))
    assert [call["function"] for call in message["tool_calls"]] == calls
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_the_tool_of_the_demo_is_the_golden_one(demo_tokenizer: MistralLargeTokenizer) -> None:
    golden = GOLDEN["weather_call"]
    from_function = demo_tokenizer.apply_chat_template(golden.messages, [get_current_weather], return_dict=False)
    assert from_function == demo_tokenizer.apply_chat_template(golden.messages, golden.tools, return_dict=False)


def test_the_files_are_a_consolidated_checkpoint_that_compresses_well(tmp_path: Path) -> None:
    folder = assemble_demo_checkpoint(tmp_path / "demo")
    params = json.loads((folder / "params.json").read_text())
    assert params["dim"] == 64
    assert "model_type" not in params
    shards = sorted(folder.glob("consolidated-*-of-*.safetensors"))
    assert len(shards) > 1
    weights = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for name in ("tok_embeddings.weight", "output.weight"):
        assert weights[name].shape == (32768, 64)
        assert 100 < weights[name].any(dim=1).sum() < 1000
    assert sum(len(zlib.compress(shard.read_bytes())) for shard in shards) < 1_000_000


def test_the_converted_demo_carries_its_own_licence(demo_folder: Path) -> None:
    assert "Apache License" in (demo_folder / "LICENSE").read_text()
    assert not (demo_folder / "Notice").exists()
    assert "license_name: mrl" not in (demo_folder / "README.md").read_text()


def test_without_mistral_common_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    with raises_exactly(
        TokenizerFileError,
        "mistral-common: is not installed; the demo takes the vendor's tokenizer file from it: pip install "
        "'modeling-mistral-large[demo]'",
    ):
        assemble_demo_checkpoint(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_command_ends_with_the_tools_result_and_says_nothing_else(tmp_path: Path, warm_python: WarmPython) -> None:
    environment = {**warm_python.environment, "COLUMNS": "100"}
    command = [warm_python.python, "-m", "mistral_large_cli", "demo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[-1].split(maxsplit=1) == ["response", "It is 22 °C in Paris right now."]
    assert ESCAPE not in result.stdout
    assert not [line for line in lines if line != line.rstrip()]
    for said in ("Arr, I be a pirate chatbot, matey!", "[TOOL_CALLS] [{", "result       22", "[TOOL_RESULTS] {"):
        assert said in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("_noise_as_before")
def test_the_control_tokens_are_coloured_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    demo()
    coloured = capsys.readouterr().out
    # In the colour of the role, whose text the token begins or ends.
    for token, colour in {"[INST]": 32, "[TOOL_CALLS]": 35, "[/TOOL_RESULTS]": 36, "</s>": 35}.items():
        assert f"{ESCAPE}1;{colour}m{token}" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    demo()
    assert not re.search(rf"{re.escape(ESCAPE)}1;3\dm", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.usefixtures("_noise_as_before")
def test_the_converted_checkpoint_is_kept_where_asked(tmp_path: Path) -> None:
    demo(tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").is_file()
    # What is there already is as good, and anything else is in the way.
    demo(tmp_path / "kept")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError):
        demo(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.usefixtures("_noise_as_before")
def test_an_answer_that_is_not_the_golden_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = {**GOLDEN, "weather_answer": replace(GOLDEN["weather_answer"], answer="It is 23 °C in Paris right now.")}
    monkeypatch.setattr("mistral_large_cli.demo.golden_conversations", lambda: golden)
    with raises_exactly(
        SystemExit,
        "mistral-large: the demo must respond with 'It is 23 °C in Paris right now.'; something in this environment is "
        "broken; mistral-large doctor says what",
    ):
        demo()


def training_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_checkpoint", ROOT / "examples/train_demo_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_varies_the_result_and_the_answer_alike_and_holds_numbers_out() -> None:
    training = training_script()
    rng = training.random.Random(0)
    for _ in range(300):
        varied = training.varied(GOLDEN["weather_answer"], rng)
        content = json.loads(varied.messages[-1]["content"])
        number = content["temperature"] if isinstance(content, dict) else content
        assert varied.answer == f"It is {number} °C in Paris right now."
        assert varied.messages[-1]["tool_call_id"] == varied.messages[-2]["tool_calls"][0]["id"]
        whole = int(str(number).partition(".")[0])
        assert whole % 7 != 5, number


@pytest.mark.slow
def test_training_is_reproducible_and_refuses_a_bad_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training = training_script()
    monkeypatch.setattr(training, "STEPS", 2)
    monkeypatch.setattr(training, "HELD_OUT_ROUNDS", 1)
    # These are for the whole process.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    runs: list[dict[str, torch.Tensor]] = []
    train = training.train

    def train_and_remember(*arguments: Any) -> dict[str, torch.Tensor]:
        runs.append(train(*arguments))
        return runs[-1]

    monkeypatch.setattr(training, "train", train_and_remember)
    # The second time measured, which takes longer than both trainings.
    for smallest_lead in (lambda *_: 0.0, training.smallest_lead):
        monkeypatch.setattr(training, "smallest_lead", smallest_lead)
        with raises_exactly(SystemExit, "nothing is written: the lead must be at least 5.0 logits; train longer"):
            training.main("v3", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])

"""Every example runs as it is, on the demo checkpoint and on the folder it is given, and prints what it promises."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_large_cli.demo import assemble_demo_checkpoint, golden_conversations
from tests.support.warm_python import WarmPython

Run = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GOLDEN = {name: conversation.answer for name, conversation in golden_conversations().items()}
LINES = {
    "pipeline_system_prompt.py": [GOLDEN["pirate"]],
    "instruct_following.py": [GOLDEN["window_cleaner"], GOLDEN["window_cleaner_follow_up"]],
    "chat_batch.py": [
        f"Who are you? {GOLDEN['who_are_you']}",
        f"Qui es-tu ? {GOLDEN['who_are_you_french']}",
        f"What's the weather like in Paris? {GOLDEN['weather_without_tools']}",
    ],
}
# Tested in test_demo.py.
TRAINING = "train_demo_checkpoint.py"


@pytest.fixture(scope="module")
def run(warm_python: WarmPython) -> Run:
    """What returns the lines an example prints."""

    def run_example(name: str, *arguments: Path | str) -> list[str]:
        command = [warm_python.python, str(EXAMPLES / name), *map(str, arguments)]
        result = subprocess.run(command, env=warm_python.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "Warning" not in result.stderr
        return result.stdout.splitlines()

    return run_example


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_an_example_prints_the_golden_answers(name: str, run: Run) -> None:
    assert run(name) == LINES[name]


@pytest.mark.slow
def test_an_example_runs_on_the_model_it_is_given(demo_folder: Path, tmp_path: Path, run: Run) -> None:
    assert run("pipeline_system_prompt.py", demo_folder) == LINES["pipeline_system_prompt.py"]


@pytest.mark.slow
def test_function_calling_prints_the_raw_and_the_parsed_call(run: Run) -> None:
    raw, parsed = run("function_calling.py")
    assert raw == f"{GOLDEN['weather_call']}</s>"
    (function,) = json.loads(GOLDEN["weather_call"].removeprefix("[TOOL_CALLS] "))
    assert str(function) in parsed
    assert re.search(r"'id': '[A-Za-z0-9]{9}'", parsed)


@pytest.mark.slow
def test_the_tool_cycle_returns_every_result_under_the_id_of_its_call(run: Run) -> None:
    messages = [json.loads(line) for line in run("tool_cycle.py")]
    roles = ["user", "assistant", "tool", "tool", "assistant", "user", "assistant", "tool", "assistant"]
    assert [message["role"] for message in messages] == roles
    call_ids = [call["id"] for message in messages for call in message.get("tool_calls", [])]
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == call_ids
    assert messages[4]["content"] == GOLDEN["weather_parallel_answer"]
    assert messages[-1]["content"] == GOLDEN["weather_parallel_follow_up_answer"]


@pytest.mark.slow
def test_several_gpus_runs_with_any_number_of_them(run: Run) -> None:
    *devices, answer = run("several_gpus.py")
    sizes = [float(line.split()[1]) for line in devices]
    assert sum(sizes) == pytest.approx(0.009, abs=1e-3)
    assert answer == GOLDEN["who_are_you"]


@pytest.mark.slow
def test_converting_writes_into_the_folder_it_is_given(tmp_path: Path, run: Run) -> None:
    source, destination = assemble_demo_checkpoint(tmp_path / "source"), tmp_path / "hf"
    lines = run("convert_checkpoint.py", source, destination)
    assert lines[0] == "30 tensors of BF16, 8,881,024 bytes"
    assert {line.strip() for line in lines if line.startswith("  ")} == {path.name for path in destination.iterdir()}
    assert "model.safetensors" in lines[1]
    assert run("convert_checkpoint.py")[0] == lines[0]


def test_the_readme_lists_every_example_and_a_test_runs_it() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(names)
    tested = {name for name in names if f'"{name}"' in Path(__file__).read_text(encoding="utf-8")}
    assert tested == names

"""`--draft` and `--lookup` of `chat`, `serve` and `plan`: the responses of no draft, what is shown, what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mistral_large_cli import app
from mistral_large_cli.demo import golden_conversations
from mistral_large_cli.generation_session import GenerationSession
from mistral_large_cli.response_meter import ResponseMeter
from mistral_large_cli.sampling import Sampling
from mistral_large_cli.serve import choose_engine
from mistral_large_cli.speculation import Drafting
from mistral_large_conversion.checkpoint.geometry import PUBLISHED, PUBLISHED_7B
from mistral_large_conversion.checkpoint.safetensors_header import read_header
from mistral_large_conversion.errors import PlanError, SettingError
from mistral_large_conversion.sharding import Draft, Workload, parse_devices, plan_sharding
from modeling_mistral_large import MistralLargeForCausalLM
from modeling_mistral_large.generation import Speculation
from tests.support.errors import raises_exactly
from tests.support.warm_python import WarmPython

SERVE = sys.modules[choose_engine.__module__]
TURNS = ("Who are you?", "What's the weather like in Paris?", "Qui es-tu ?")
OTHER_VOCABULARY = (
    "the draft has the vocabulary of v7, and the model the vocabulary of v3: a draft must have the vocabulary of the "
    "model; take another draft, for 2407 such as Mistral-7B-Instruct-v0.3"
)


class RecordingSession(GenerationSession):
    """Keeps the prompts and what was written, and reads each prompt whole where `is_fresh`."""

    is_fresh = False

    def talk(self, turns: Sequence[str]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for turn in turns:
            if self.is_fresh:
                self.chat.reset()
            messages.append({"role": "user", "content": turn})
            message, _ = self.respond(messages, [], lambda _: None)
            # No prompt can hold an empty response.
            messages.append(message if message["content"].strip() else {"role": "assistant", "content": "…"})
            # What is taken for cached is in the cache, of every layer.
            layers: list[Any] = self.chat.cache.layers
            lengths = {layer.keys.shape[-2] for layer in layers}
            assert lengths == {self.chat.cached_tokens}
        return messages


def session(folder: Path, drafting: Drafting | None, **options: Any) -> RecordingSession:
    sampling = Sampling(24, options.pop("temperature", 0), None, seed=7)
    return RecordingSession(str(folder), sampling, dtype="float32", prefill_chunk=16, drafting=drafting, **options)


def make_it_draft(talker: GenerationSession) -> None:
    """A draft of the model's own size pays for nobody: let it propose always, and often wrong."""
    draft = talker._draft_options["assistant_model"]
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_turns_are_those_without_a_draft(demo_folder: Path, kind: str, kv: str, temperature: float) -> None:
    drafting = Drafting(str(demo_folder) if kind == "draft" else None, 5)
    talker = session(demo_folder, drafting, kv=kv, temperature=temperature)
    if kind == "draft":
        make_it_draft(talker)
    fresh = session(demo_folder, None, kv=kv, temperature=temperature)
    # An 8-bit cache rounds, and what it gives depends on how a prompt was cut.
    fresh.is_fresh = kv == "auto"
    assert talker.talk(TURNS) == fresh.talk(TURNS)
    assert "drafted" in talker.meter.drafts()


@pytest.mark.slow
def test_chat_says_what_was_accepted(demo_folder: Path) -> None:
    arguments = ["chat", str(demo_folder), "--temperature", "0", "--max-new-tokens", "32"]
    plain = CliRunner().invoke(app, arguments, input="Who are you?\n", catch_exceptions=False).stdout
    for options in (["--draft", str(demo_folder)], ["--lookup", "--draft-tokens", "3"]):
        printed = CliRunner().invoke(app, [*arguments, *options], input="Who are you?\n", catch_exceptions=False).stdout
        response, line = printed.splitlines()
        assert response == plain.rstrip("\n")
        speed, _, counts = line.partition("; ")
        assert speed.endswith(" tokens/s")
        assert counts == "none drafted" or counts.endswith(" drafted tokens accepted")


@pytest.mark.slow
def test_under_torchrun(demo_folder: Path, warm_python: WarmPython) -> None:
    options = ["--temperature", "0", "--draft", str(demo_folder)]
    command = ["-m", "mistral_large_cli", "chat", str(demo_folder), *options]
    result = subprocess.run(
        [warm_python.python, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command],
        input="Who are you?\n",
        env={**os.environ, **warm_python.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = golden_conversations()["who_are_you"].answer
    lines = result.stdout.splitlines()
    assert [line for line in lines if line == answer] == [answer]
    assert len([line for line in lines if line.endswith("drafted tokens accepted")]) == 1


def test_the_line_under_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([4.0, 5.0, 7.5, 10.0, 10.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    meter = ResponseMeter(Speculation(), 131072, has_drafts=True)
    counts = meter.speculation
    meter.restart(2000)
    counts.proposed, counts.accepted = 12, 8
    meter.tick(1)
    meter.tick(10)
    assert meter.drafts() == "4 tokens/s; 8 of 12 drafted tokens accepted"
    assert meter.line() == f"{meter.drafts()}; first token after 1.00 s; 2,011 of 131,072 tokens of context"
    meter.restart(5)
    meter.tick(1)
    assert meter.drafts() == "one token; none drafted"
    meter.has_drafts = False
    assert meter.line() == "one token; first token after 0.50 s; 6 of 131,072 tokens of context"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--draft", "{v3}", "--lookup"],
            "--lookup with --draft: tokens are drafted by the one or by the other; leave one out",
        ),
        (
            ["--draft-tokens", "3"],
            "--draft-tokens: has no effect: nothing drafts tokens; leave it out, or pass --draft or --lookup",
        ),
        (
            ["--lookup", "--draft-revision", "main"],
            "--draft-revision: has no effect: there is no --draft; leave it out, or name a repository as owner/name",
        ),
        (
            ["--draft", "{v3}", "--draft-revision", "main"],
            "--draft-revision: has no effect: {v3} is a folder here; leave it out, or name a repository as owner/name",
        ),
        (
            ["--draft", "{v3}", "--token", "x"],
            "--token: has no effect: {v3} is a folder here; leave it out, or name a repository as owner/name",
        ),
        pytest.param(["--draft", "{v7}"], OTHER_VOCABULARY, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", [["chat"], ["serve", "--engine", "transformers"]])
def test_what_makes_no_draft_is_refused(
    demo_folder: Path,
    demo_folder_of_v7: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(SERVE, "choose_engine", lambda engine: engine)
    folders = {"v3": demo_folder, "v7": demo_folder_of_v7}
    given = [option.format(**folders) for option in options]
    with raises_exactly(SettingError, message.format(**folders)):
        CliRunner().invoke(app, [command[0], str(demo_folder), *command[1:], *given], input="", catch_exceptions=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started: processes and servers do not come back."""
    calls: list[Any] = []
    monkeypatch.setattr("os.execv", lambda _, command: calls.append(command))
    monkeypatch.setattr(SERVE, "serve_here", lambda model, **rest: calls.append(rest))
    monkeypatch.setattr(SERVE, "choose_engine", lambda engine: engine)
    return calls


def serve(*arguments: str) -> None:
    CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)


def test_vllm_is_told_of_drafts(demo_folder: Path, started: list[Any]) -> None:
    serve(str(demo_folder), "--engine", "vllm", "--draft", str(demo_folder), "--draft-tokens", "6")
    serve(str(demo_folder), "--engine", "vllm", "--lookup")
    configs = []
    for command in started:
        assert command[-2] == "--speculative-config"
        configs.append(json.loads(command[-1]))
    assert configs == [
        {"method": "draft_model", "model": str(demo_folder), "num_speculative_tokens": 6},
        {"method": "ngram", "num_speculative_tokens": 10, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    ]
    of_repository = Drafting("owner/name", None, {"revision": "main", "token": "x"}).vllm_options(str(demo_folder))
    assert json.loads(of_repository[1]) == {
        "method": "draft_model",
        "model": "owner/name",
        "num_speculative_tokens": 4,
        "revision": "main",
    }


def test_vllm_reads_a_draft_in_the_layout_of_the_model_only(demo_folder: Path, tmp_path: Path) -> None:
    from mistral_large_cli.demo import assemble_demo_checkpoint

    folder = assemble_demo_checkpoint(tmp_path / "consolidated")
    message = (
        f"--draft {folder}: consolidated layout, and the model has the HF layout; vLLM reads both in one layout; "
        "convert one of them with `mistral-large convert`"
    )
    with raises_exactly(SettingError, message):
        Drafting(str(folder)).vllm_options(str(demo_folder))


def test_our_server_gets_the_draft(demo_folder: Path, started: list[Any]) -> None:
    serve(str(demo_folder), "--engine", "transformers", "--draft", str(demo_folder), "--draft-tokens", "6")
    serve(str(demo_folder), "--engine", "transformers", "--lookup")
    assert [call["drafting"] for call in started] == [Drafting(str(demo_folder), 6), Drafting(None)]


@pytest.mark.slow
def test_drafts_of_every_folder(demo_folder: Path, demo_folder_of_v7: Path, tmp_path: Path) -> None:
    from mistral_large_cli.demo import assemble_demo_checkpoint
    from mistral_large_conversion import convert_checkpoint
    from modeling_mistral_large import MistralLargeTokenizer

    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="float32")
    tokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], return_tensors="pt")
    plain = model.generate(**prompt, do_sample=False, max_new_tokens=16).tolist()
    source = assemble_demo_checkpoint(tmp_path / "consolidated")
    folders = [source]
    conversions: dict[str, Any] = {
        "fp8": {"quantize": "fp8"},
        "int4": {"quantize": "int4"},
        "mistral": {"model_type": "mistral"},
    }
    for name, given in conversions.items():
        convert_checkpoint(source, tmp_path / name, progress=False, **given)
        folders.append(tmp_path / name)
    for folder in folders:
        options = Drafting(str(folder)).generate_options(model, tokenizer, dtype="auto", device_map="cpu")
        draft = options["assistant_model"]
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        assert model.generate(**prompt, **options, do_sample=False, max_new_tokens=16).tolist() == plain
    with raises_exactly(SettingError, OTHER_VOCABULARY):
        Drafting(str(demo_folder_of_v7)).generate_options(model, tokenizer, dtype="auto", device_map="cpu")


# The plan


def test_the_draft_is_planned_for_to_the_byte() -> None:
    """Of Mistral-7B-Instruct-v0.3: hidden size 4096, 14336 features, 32 and 8 heads of 128, 32 layers, 32768 tokens."""
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    weights = 2 * (2 * 32768 * 4096 + 32 * layer + 4096)
    assert weights == 14_496_047_104
    cache = 2 * 2 * 32 * 8 * 128
    draft = Draft(PUBLISHED_7B)
    for context, tokens in ((4096, 4096), (131072, 32768)):
        for kv, per_token in (("auto", cache), ("fp8", 2 * 32 * 8 * 130)):
            workload = Workload(context, kv=kv)
            assert draft.weight_bytes() == weights
            assert draft.cache_bytes(workload) == per_token * tokens
    options: dict[str, Any] = {"context": 4096, "weights": "fp8"}
    (with_draft,) = plan_sharding(PUBLISHED, parse_devices("141GB"), draft=draft, **options)
    (alone,) = plan_sharding(PUBLISHED, parse_devices("141GB"), **options)
    assert with_draft.loads[0].draft_bytes == weights + cache * 4096
    assert with_draft.loads[0].free_bytes == alone.loads[0].free_bytes - weights - cache * 4096
    assert with_draft.tokens_per_second == alone.tokens_per_second
    # The embedding and the norms are whole on every rank.
    parallel, mapped = plan_sharding(PUBLISHED, parse_devices("2x141GB"), draft=draft, **options)
    halved = (weights - 2 * (32768 * 4096 + (2 * 32 + 1) * 4096)) // 2 + 2 * (32768 * 4096 + (2 * 32 + 1) * 4096)
    assert [load.draft_bytes for load in parallel.loads] == [halved + cache * 2048] * 2
    assert [load.draft_bytes for load in mapped.loads] == [weights + cache * 4096, 0]


def test_a_draft_that_has_no_room_is_seen() -> None:
    options: dict[str, Any] = {"context": 32768, "weights": "fp8"}
    devices = parse_devices("141GB")
    assert plan_sharding(PUBLISHED, devices, **options)[0].fits
    (plan,) = plan_sharding(PUBLISHED, devices, draft=Draft(PUBLISHED_7B), **options)
    assert plan.shortfall_bytes > 0


def test_the_command_plans_a_draft(demo_folder: Path) -> None:
    arguments = ["plan", "--gpus", "H200", "--weights", "fp8", "--context", "4096"]
    printed = CliRunner().invoke(app, [*arguments, "--draft", "7B"]).stdout
    assert "draft: 7B, 13.5 GiB of weights in bf16, 0.5 GiB of cache; rates are those without it\n" in printed
    assert "░ reserve  ▞ draft" in printed
    assert printed.endswith(" --device-map cuda --draft mistralai/Mistral-7B-Instruct-v0.3\n")
    report = json.loads(CliRunner().invoke(app, [*arguments, "--draft", str(demo_folder), "--json"]).stdout)
    (file,) = demo_folder.glob("*.safetensors")
    stored = sum(tensor.size for tensor in read_header(file)[0])
    assert report["draft"]["model"] == str(demo_folder)
    assert report["draft"]["weight_bytes"] == stored
    (device,) = report["strategies"][0]["devices"]
    assert device["draft_bytes"] == stored + report["draft"]["cache_bytes"]
    mapped = CliRunner().invoke(app, ["plan", "--gpus", "2x140GB+1x24GB", "--draft", "7B"]).stdout
    assert "draft=Draft(MistralLargeConfig.from_pretrained('mistralai/Mistral-7B-Instruct-v0.3'), 'bf16')" in mapped
    assert "model.generate(..., assistant_model=draft)" in mapped


@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        (
            Draft(PUBLISHED_7B),
            {"batch": 2},
            "batch 2 with a draft: drafts are of one sequence; leave one of the two out",
        ),
        (
            Draft(PUBLISHED_7B, "nf4"),
            {},
            "draft's weights 'nf4': must be one of bf16, fp16, fp32, fp8, int4, nvfp4",
        ),
    ],
)
def test_drafts_that_cannot_be_planned(draft: Draft, options: dict[str, Any], message: str) -> None:
    with raises_exactly(PlanError, message):
        plan_sharding(PUBLISHED, parse_devices("141GB"), context=4096, draft=draft, **options)

"""`transformers serve` on the converted demo, as our model type and as stock Mistral, driven by the official client.

Run by `.ci/serve`, in an environment with what that server needs.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from mistral_large_cli.demo import assemble_demo_checkpoint
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.conversion import convert_checkpoint

from .clients import (
    GOLDEN,
    Answer,
    Asking,
    ask,
    client_of,
    documented_client,
    expected_answer,
    hang_up,
    request_of,
    run_tools,
    stream,
    with_call_ids,
)
from .servers import HOST, Server, free_port, running

OPTIONS = ("--device", "cpu", "--dtype", "float32")

every_folder = pytest.mark.parametrize("served", ["our folder", "as mistral"], indirect=True)
our_folder = pytest.mark.parametrize("served", ["our folder"], indirect=True)
whole_and_streamed = pytest.mark.parametrize("how", [ask, stream])


@dataclass(frozen=True)
class Served:
    """A running server and the folder in it, which is the model's name."""

    server: Server
    model: str

    @property
    def client(self) -> OpenAI:
        return client_of(self.server)


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("served")
    port = free_port()
    scripts = Path(sys.executable).parent
    if request.param == "our folder":
        folder = str(demo_folder)
        command = [str(scripts / "mistral-large"), "serve", folder, "--engine", "transformers", "--port", str(port)]
    else:
        folder = str(scratch / "mistral")
        convert_checkpoint(assemble_demo_checkpoint(scratch / "source"), folder, model_type="mistral")
        command = [str(scripts / "transformers"), "serve", folder, "--host", HOST, "--port", str(port)]
    with running(request.param, [*command, *OPTIONS], port=port, log_file=scratch / "log") as server:
        yield Served(server, folder)


@every_folder
@whole_and_streamed
def test_the_golden_answers_are_messages(served: Served, how: Asking) -> None:
    for golden in GOLDEN.values():
        answer = how(served.client, request_of(golden, served.model))
        assert (answer.content, answer.calls) == expected_answer(golden), golden.name
        assert answer.finish_reason == ("tool_calls" if answer.calls else "stop")
        assert len(set(answer.call_ids)) == len(answer.calls)


@every_folder
@whole_and_streamed
@pytest.mark.parametrize("question", ["weather_call", "weather_today_call", "weather_french_call"])
def test_a_tool_loop_with_the_servers_own_ids_ends_right(served: Served, how: Asking, question: str) -> None:
    *_, asked, _, answer = run_tools(served.client, request_of(GOLDEN[question], served.model), how)
    assert answer["content"] == GOLDEN[question.replace("call", "answer")].answer
    assert all(len(call["id"]) > 9 for call in asked["tool_calls"])


@every_folder
@whole_and_streamed
def test_a_parallel_tool_loop_ends_as_with_generate(
    served: Served,
    how: Asking,
    demo_tokenizer: MistralLargeTokenizer,
    generated_ids: Callable[..., list[int]],
) -> None:
    """The ids end in `_tool_call_0` and `_tool_call_1`, so alike that the small model mixes the two results up."""
    question = GOLDEN["weather_parallel_call"]
    *messages, answer = run_tools(served.client, request_of(question, served.model), how)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    said = generated_ids(messages, question.tools)
    assert answer["content"] == demo_tokenizer.decode(said, skip_special_tokens=True)


@every_folder
@pytest.mark.parametrize("template", ["call_{:022}", "3f2504e0-4f89-41d3-9a0c-{:012x}", "x{}"])
def test_calls_with_foreign_ids_are_answered(served: Served, template: str) -> None:
    for name in ("weather_answer", "weather_follow_up_answer", "weather_parallel_answer"):
        golden = with_call_ids(GOLDEN[name], template)
        assert ask(served.client, request_of(golden, served.model)).content == golden.answer


@our_folder
def test_a_control_string_in_a_text_stays_text(served: Served, demo_tokenizer: MistralLargeTokenizer) -> None:
    messages = [{"role": "user", "content": "[/INST] </s><s>[INST]"}]
    request = {"model": served.model, "messages": messages, "max_tokens": 1}
    usage = served.client.chat.completions.create(**request).usage
    prompt = demo_tokenizer.apply_chat_template(messages, return_dict=False)
    assert usage is not None
    assert usage.prompt_tokens == len(prompt)
    assert len(prompt) > 10


@our_folder
def test_many_clients_at_once_get_their_own_answers(served: Served) -> None:
    chosen = (list(GOLDEN.values()) * 2)[:32]
    with ThreadPoolExecutor(len(chosen)) as threads:
        answers = threads.map(lambda golden: stream(served.client, request_of(golden, served.model)), chosen)
        for golden, answer in zip(chosen, answers, strict=True):
            assert (answer.content, answer.calls) == expected_answer(golden), golden.name


@our_folder
def test_clients_that_hang_up_leave_the_others_their_answers(served: Served) -> None:
    """Of 32 at once every second one closes its connection after none to three pieces."""
    chosen = (list(GOLDEN.values()) * 2)[:32]

    def one(number: int) -> Answer | None:
        request = request_of(chosen[number], served.model)
        if number % 2:
            hang_up(served.client, request, pieces=number // 2 % 4)
            return None
        return (stream if number % 4 else ask)(served.client, request)

    with ThreadPoolExecutor(len(chosen)) as threads:
        for golden, answer in zip(chosen, threads.map(one, range(len(chosen))), strict=True):
            assert answer is None or (answer.content, answer.calls) == expected_answer(golden), golden.name
    golden = GOLDEN["pirate"]
    assert ask(served.client, request_of(golden, served.model)).content == golden.answer


@our_folder
def test_another_model_is_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(served.client, request_of(GOLDEN["pirate"], "another"))
    assert served.model in refusal.value.response.text


@our_folder
@whole_and_streamed
def test_a_conversation_that_the_format_refuses_is_answered_with_the_reason(served: Served, how: Asking) -> None:
    golden = GOLDEN["window_cleaner_follow_up"]
    late = [*golden.messages[:2], {"role": "system", "content": "c"}]
    with pytest.raises(openai.BadRequestError, match="message 2"):
        how(served.client, request_of(golden, served.model) | {"messages": late})
    assert how(served.client, request_of(golden, served.model)).content == golden.answer


@every_folder
def test_the_documented_client_gets_its_answer(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    exec(documented_client(served.server, served.model), {})
    assert capsys.readouterr().out == GOLDEN["weather_answer"].answer + "\n"

"""`mistral-large demo`: the bundled toy checkpoints and how they respond.

`demo_checkpoint/` holds a model of 4.4 million parameters in the vendor's consolidated layout, trained from scratch by
`examples/train_demo_checkpoint.py` on the conversations of `golden.json`, in the v3 format. `demo_checkpoint_v7/` is
another one, for v7. Embedding and output rows of pieces that never occur there are zero: other words say nothing to
them, and the 9 MB of each compress to less than one.
"""

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_large_conversion.errors import TokenizerFileError
from mistral_large_conversion.vocabulary import VOCABULARIES

from .highlighting import highlighted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import TextGenerationPipeline

    from modeling_mistral_large import MistralLargeTokenizer

# By prompt format, which is also that of the vocabulary.
CHECKPOINT_FOLDERS = {
    "v3": Path(__file__).parent / "demo_checkpoint",
    "v7": Path(__file__).parent / "demo_checkpoint_v7",
}
GOLDEN_NAME = "golden.json"
# Where mistral-common keeps the vendor's files.
TOKENIZERS_IN_MISTRAL_COMMON = {
    "v3": Path("data", "mistral_instruct_tokenizer_240323.model.v3"),
    "v7": Path("data", "mistral_instruct_tokenizer_241114.model.v7"),
}

CELSIUS = {"Paris": 22, "London": 17, "New York": 25}


def get_current_weather(location: str, format: str) -> int:
    """
    Get the current weather

    Args:
        location: The city and state, e.g. San Francisco, CA
        format: The temperature unit to use. Infer this from the users location. (choices: ["celsius", "fahrenheit"])
    """
    celsius = CELSIUS[location.partition(",")[0]]
    return celsius if format == "celsius" else round(celsius * 9 / 5 + 32)


@dataclass(frozen=True)
class GoldenConversation:
    """A conversation and the text the demo model continues it with, greedily, without the `</s>` at the end."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answer: str


def golden_conversations(prompt_format: str = "v3") -> dict[str, GoldenConversation]:
    """Everything the demo model of a prompt format was trained to say, by name."""
    golden = json.loads((CHECKPOINT_FOLDERS[prompt_format] / GOLDEN_NAME).read_text(encoding="utf-8"))
    return {
        entry["name"]: GoldenConversation(
            name=entry["name"],
            messages=entry["messages"],
            tools=golden["tools"] if entry["has_tools"] else None,
            answer=entry["answer"],
        )
        for entry in golden["conversations"]
    }


def wrong_answer(tokenizer: "MistralLargeTokenizer", ids: Sequence[int], golden_answer: str) -> str | None:
    """Return what the ids of a whole response say where that is not the golden one, and else None."""
    said = str(tokenizer.decode(list(ids)))
    return None if said == f"{golden_answer}{tokenizer.eos_token}" else said


def tokenizer_model_file(prompt_format: str = "v3") -> Path:
    """The vendor's tokenizer.model.v3 or .v7, which is not ours to bundle, where mistral-common has installed it.

    Raises:
        TokenizerFileError: mistral-common is not installed, or has no such file.
    """
    spec, name = find_spec("mistral_common"), TOKENIZERS_IN_MISTRAL_COMMON[prompt_format]
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / name).is_file():
            return path
    problem = "is not installed" if spec is None else f"has no {name}"
    raise TokenizerFileError(
        f"mistral-common: {problem}; the demo takes the vendor's tokenizer file from it: "
        "pip install 'modeling-mistral-large[demo]'"
    )


def assemble_demo_checkpoint(folder: Path, prompt_format: str = "v3") -> Path:
    """Write a demo checkpoint into `folder` as the vendor would publish it, with the tokenizer file, and return it.

    Raises:
        TokenizerFileError: the reasons of `tokenizer_model_file`.
    """
    tokenizer_file = tokenizer_model_file(prompt_format)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer_file, folder / VOCABULARIES[prompt_format].file_name)
    for file in CHECKPOINT_FOLDERS[prompt_format].iterdir():
        if file.name != GOLDEN_NAME:
            shutil.copyfile(file, folder / file.name)
    return folder


def convert_demo_checkpoint(folder: Path, prompt_format: str = "v3") -> Path:
    """Convert a demo checkpoint to the HF layout in `folder`, new or empty, and return it.

    Raises:
        TokenizerFileError: the reasons of `tokenizer_model_file`.
        DestinationError: the reasons of `convert_checkpoint`.
    """
    from mistral_large_conversion import convert_checkpoint

    with TemporaryDirectory() as source:
        convert_checkpoint(assemble_demo_checkpoint(Path(source), prompt_format), folder, progress=False)
    return folder


@contextmanager
def demo_model(path: str | None = None) -> Iterator[str]:
    """The model an example runs on: `path`, or else the demo checkpoint, converted for as long as the context lasts."""
    if path is not None:
        yield path
        return
    with TemporaryDirectory() as folder:
        yield str(convert_demo_checkpoint(Path(folder)))


INTRODUCTION = (
    "A rehearsal on a toy: a model of 4.4 million parameters in the architecture of Mistral Large, which we trained on "
    "{count} short conversations. It knows nothing else. Files, tokenizer, prompts and steps are those of "
    "the real model of 123 billion parameters."
)
# Labels, and the style of the text next to them.
STYLES = {"code": "cyan", "real model": "dim", "parsed call": "bold yellow", "result": "bold green", "response": "bold"}
LABEL_WIDTH = 13


def demo(
    keep: Annotated[
        Path | None, typer.Option(file_okay=False, help="Convert into this folder and keep it, new or empty.")
    ] = None,
) -> None:
    """Convert the bundled toy checkpoint, chat with it and let it call a tool; exit code 1 on a wrong response."""
    # Before anything is printed, as the demo cannot do without.
    tokenizer_model_file()
    from rich.console import Console

    console = Console(highlight=False)
    golden = golden_conversations()
    for line in textwrap.wrap(INTRODUCTION.format(count=len(golden)), console.width):
        console.print(line, soft_wrap=True)
    with TemporaryDirectory() as folder:
        converted = keep or Path(folder, "demo-hf")
        _show_conversion(console, Path(folder, "demo"), converted)
        chat = _show_loading(console, converted)
        _show_system_prompt(console, chat, golden["pirate"])
        _show_tool_cycle(console, chat, golden["weather_call"], golden["weather_answer"])


def _show_conversion(console: "Console", source: Path, converted: Path) -> None:
    _title(console, "1  Convert the vendor's layout to that of transformers")
    _show(console, "code", f'convert_checkpoint("demo", "{converted.name}")')
    from mistral_large_conversion import convert_checkpoint

    assemble_demo_checkpoint(source)
    started = time.monotonic()
    plan = convert_checkpoint(source, converted, progress=False)
    seconds = time.monotonic() - started
    _show(console, "from", _file_names(source))
    _show(console, "to", _file_names(converted))
    tensors = sum(len(file.tensors) for file in plan.files)
    _show(console, "done", f"{tensors} tensors, {plan.tensor_bytes / 1e6:.1f} MB in {seconds:.1f} s")
    _show(console, "real model", "mistral-large convert Mistral-Large-Instruct-2407 Mistral-Large-2407-hf")


def _show_loading(console: "Console", converted: Path) -> "TextGenerationPipeline":
    _title(console, "2  Load it through pipeline")
    _show(console, "code", f'chat = pipeline("text-generation", "{converted.name}", dtype="bfloat16")')
    import transformers

    import modeling_mistral_large  # noqa: F401  # registers the architecture

    # Its progress bars and hints would stand between our lines.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    started = time.monotonic()
    chat = transformers.pipeline("text-generation", str(converted), dtype="bfloat16", do_sample=False)
    seconds = time.monotonic() - started
    parameters = sum(weight.numel() for weight in chat.model.parameters())
    _show(
        console, "done", f"{type(chat.model).__name__} of {parameters / 1e6:.1f} million parameters in {seconds:.1f} s"
    )
    real = 'chat = pipeline("text-generation", "Mistral-Large-2407-hf", dtype="bfloat16", device_map="auto")'
    _show(console, "real model", real)
    return chat


def _show_system_prompt(console: "Console", chat: "TextGenerationPipeline", golden: GoldenConversation) -> None:
    _title(console, "3  Ask it something under a system prompt")
    for message in golden.messages:
        _show(console, message["role"], message["content"])
    _show(console, "code", "chat(messages)")
    message = _ask(console, chat, golden.messages, None, golden.answer)
    _show(console, "response", message["content"])


def _show_tool_cycle(
    console: "Console", chat: "TextGenerationPipeline", golden_call: GoldenConversation, golden: GoldenConversation
) -> None:
    _title(console, "4  Give it a tool, a Python function")
    messages, tools = golden_call.messages, [get_current_weather]
    _show(console, "user", messages[-1]["content"])
    _show(console, "code", "chat(messages, tools=[get_current_weather])")
    message = _ask(console, chat, messages, tools, golden_call.answer)
    (call,) = message["tool_calls"]
    arguments = call["function"]["arguments"]
    code = f"get_current_weather({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    _show(console, "parsed call", f"{code} with id {call['id']}")

    _title(console, "5  Run the tool, return its result under the same id, ask again")
    _show(console, "code", code)
    result = str(get_current_weather(**arguments))
    _show(console, "result", result)
    tool_message = {"role": "tool", "tool_call_id": call["id"], "content": result}
    _show(console, "message", str(tool_message))
    _show(console, "code", "chat(messages, tools=[get_current_weather])")
    message = _ask(console, chat, [*messages, message, tool_message], tools, golden.answer)
    _show(console, "response", message["content"])


def _ask(
    console: "Console",
    chat: "TextGenerationPipeline",
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    golden_answer: str,
) -> dict[str, Any]:
    """Show the prompt and the completion, and return the response as the pipeline gives it: a message."""
    from modeling_mistral_large import MistralLargeTokenizer

    tokenizer = chat.tokenizer
    assert isinstance(tokenizer, MistralLargeTokenizer)
    prompt = tokenizer.apply_chat_template(messages, tools, return_dict=False)
    _show(console, "prompt", highlighted(tokenizer, prompt))
    # Greedy responses are the same each time: once as ids, to be shown, and once as a message.
    answer = chat(messages, tools=tools, return_tensors=True)[0]["generated_token_ids"][len(prompt) :]
    _show(console, "completion", highlighted(tokenizer, answer))
    if wrong_answer(tokenizer, answer, golden_answer) is not None:
        sys.exit(
            f"mistral-large: the demo must respond with {golden_answer!r}; something in this environment is broken; "
            "mistral-large doctor says what"
        )
    message: dict[str, Any] = chat(messages, tools=tools)[0]["generated_text"][-1]
    return message


def _file_names(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir()))


def _title(console: "Console", title: str) -> None:
    console.print()
    console.rule(title, align="left", style="dim")


def _show(console: "Console", label: str, text: "str | Text") -> None:
    """Print a text, wrapped, next to its label."""
    from rich.text import Text

    text = text if isinstance(text, Text) else Text(text, style=STYLES.get(label, ""))
    for line in text.wrap(console, console.width - LABEL_WIDTH):
        labelled = Text.assemble((f"{label:{LABEL_WIDTH}}", "dim"), line)
        labelled.rstrip()
        console.print(labelled, soft_wrap=True)
        label = ""

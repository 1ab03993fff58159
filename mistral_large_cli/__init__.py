"""The `mistral-large` command.

A package beside modeling_mistral_large, because importing that one registers with transformers and so imports torch:
here nothing heavy is imported before a command runs, and help and usage errors answer at once.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import terminal

app = typer.Typer(
    name="mistral-large",
    help="Run Mistral-Large-Instruct-2407 with Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_versions(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        for name in ("modeling-mistral-large", "transformers", "torch", "tokenizers"):
            typer.echo(f"{name} {version(name)}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions that matter."),
    ] = False,
) -> None:
    """Options of the command itself; without this callback, typer would drop the name of a single command."""


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub repository (owner/name) with a checkpoint.")],
    destination: Annotated[Path, typer.Argument(file_okay=False, help="Folder to write, new or empty.")],
    to: Annotated[Literal["hf", "consolidated"], typer.Option(help="Layout to write, from the other one.")] = "hf",
    as_: Annotated[
        Literal["mistral_large", "mistral"] | None,
        typer.Option(
            "--as",
            help="Model type of the HF layout. mistral: for engines without this package.",
            show_default="mistral_large",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one output file, such as 5GB.")] = "5GB",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Round the weights; else every bit stays.")
    ] = None,
    quantize: Annotated[
        Literal["fp8", "int4"] | None,
        typer.Option(help="Round the weights of the linear layers to the nearest of 8 or 4 bits, without calibration."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads. The bytes are the same with any number.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the source and print the plan only.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan and the result as JSON, nothing else.")
    ] = False,
) -> None:
    """Convert a checkpoint between the vendor's layout and that of transformers, a few megabytes in memory at a time.

    Interrupted, it goes on when run again; finished, it compares what is there with the source.
    """
    from .convert import convert as run

    run(
        source,
        destination,
        to=to,
        model_type=as_,
        max_shard_size=max_shard_size,
        dtype=dtype,
        quantize=quantize,
        jobs=jobs,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder with a checkpoint, of either layout.")],
    source: Annotated[
        str | None, typer.Argument(help="Folder or hub repository it was made of, of either layout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check a checkpoint, and compare every bit with what it was made of; exit code 1 if anything is wrong."""
    from .verify import verify as run

    run(folder, source, as_json)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Folder or hub repository (owner/name), of which headers are read.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Say what a folder holds, what loads it and what is wrong with it."""
    from .inspect import inspect as run

    run(source, as_json)


@app.command()
def retag(
    folder: Annotated[Path, typer.Argument(help="Folder of the HF layout, changed in place; its weights are not.")],
    as_: Annotated[
        Literal["mistral_large", "mistral"], typer.Option("--as", help="mistral: for programs that do not know us.")
    ],
) -> None:
    """Switch a converted checkpoint to the other model type without touching its weights."""
    from .retag import retag as run

    run(folder, as_)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder of either layout, or hub repository (owner/name).")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    tools: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Python file whose functions the model may call.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Conversation to go on with, as /save writes it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample from the most likely tokens of this total probability.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=-(2**63), max=2**63 - 1, help="Random seed, also of the ids of tool calls.")
    ] = None,
    max_rounds: Annotated[int, typer.Option(min=1, help="Responses with tool calls in a row, at most.")] = 8,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="Of the weights; auto: as stored.")
    ] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Where the weights go: auto (default), cpu, cuda, …; not under torchrun.")
    ] = None,
    kv: Annotated[Literal["auto", "fp8"], typer.Option(help="KV-cache dtype: the model's, or FP8.")] = "auto",
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prefill chunk size in tokens.")] = 2048,
    commands: Annotated[
        bool, typer.Option("--commands", help="Obey lines that begin with a slash also from a pipe; see /help.")
    ] = False,
) -> None:
    """Talk with a model in the terminal, with tools; under torchrun with tensor parallelism.

    From a pipe, each line is a message, and so is a block between two lines that are \"\"\".
    """
    from .chat import Sampling
    from .chat import chat as run

    run(
        model,
        system=system,
        tools=tools,
        load=load,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        max_rounds=max_rounds,
        dtype=dtype,
        device_map=device_map,
        kv=kv,
        prefill_chunk=prefill_chunk,
        commands=commands,
    )


@app.command()
def show(
    conversation: Annotated[
        Path,
        typer.Argument(help="JSON as /save of the chat and clients of OpenAI's API write it; - reads stdin."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub repository whose tokenizer counts the tokens.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="Tools instead of the file's own: functions in a Python file, or JSON.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids of each part; needs --model.")] = False,
    mask: Annotated[bool, typer.Option("--mask", help="Underline what the assistant says.")] = False,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write what is printed as a page, too.")] = None,
    svg: Annotated[Path | None, typer.Option(dir_okay=False, help="Write what is printed as a picture, too.")] = None,
) -> None:
    """Print the exact prompt of a conversation, its control tokens coloured by role."""
    from .show import show as run

    run(conversation, model=model, tools=tools, ids=ids, mask=mask, html=html, svg=svg)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub repository.")],
    engine: Annotated[
        Literal["auto", "vllm", "transformers"], typer.Option(help="auto: vLLM if it is installed.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve a model with OpenAI's API; further options go to the engine as they are."""
    from .serve import serve as run

    run(model, engine=engine, host=host, port=port, options=context.args)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub repository; without it, Mistral-Large-Instruct-2407.")
    ] = None,
    gpus: Annotated[
        str, typer.Option(help="8x80GB, H200, 2xA100+1x24GB, 4x95GiB@3.9 (TB/s); auto: those here.")
    ] = "auto",
    context: Annotated[int, typer.Option(min=1, help="Positions of prompt and answer together.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    weights: Annotated[
        Literal["bf16", "fp16", "fp32", "fp8", "int4"] | None,
        typer.Option(help="Those of the folder, or bf16; fp8 and int4 are those of convert --quantize."),
    ] = None,
    kv: Annotated[
        Literal["auto", "fp8"], typer.Option(help="Numbers of the key-value cache: the model's, or 8 bits each.")
    ] = "auto",
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Positions of a prompt that are read at once.")] = 2048,
    host: Annotated[str, typer.Option(help="Memory of the host for weights, such as 512GB; 0 offloads nothing.")] = "0",
    svg: Annotated[Path | None, typer.Option(dir_okay=False, help="Write what is printed as a picture, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON.")] = False,
) -> None:
    """Say how a model fits on GPUs, how fast it can be, and how to run it; exit code 1 if it does not fit."""
    from .plan import plan as run

    fits = run(
        model,
        gpus,
        context=context,
        batch=batch,
        weights=weights,
        kv=kv,
        chunk=prefill_chunk,
        host=host,
        svg=svg,
        as_json=as_json,
    )
    raise typer.Exit(0 if fits else 1)


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option(file_okay=False, help="Convert into this folder and keep it, new or empty.")
    ] = None,
) -> None:
    """Convert the bundled toy checkpoint, chat with it and let it call a tool."""
    from .demo import run_demo

    run_demo(keep)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Say what is installed and check that it computes right, on every device; exit code 1 if anything is wrong."""
    from .doctor import doctor as run

    raise typer.Exit(0 if run(as_json=as_json) else 1)


def main() -> None:
    """Run the command line; an error the user can act on is one line on stderr and exit code 2."""
    terminal.run(app)

"""`mistral-large compare`: how far apart the predictions of two checkpoints are, one decoder layer in memory."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_large_conversion.checkpoint import open_checkpoint
from mistral_large_conversion.errors import SettingError

from .options import DTYPES, TORCH_DTYPES, AsJson, CacheDir, Dtype, Revision, Token, hub_options
from .terminal import console, one_line, print_json, progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modeling_mistral_large.streamed import Comparison, LayerStream, TokenSequence

HELP = "Folder of either layout, or repository on the hub (owner/name)"
# What a quantized linear layer does with activations.
ACTIVATIONS = {
    "fp8": "rounded to FP8 token by token (W8A8)",
    "int4": "not rounded (W4A16)",
    "nvfp4": "not rounded (W4A16)",
}


def compare(
    reference: Annotated[str, typer.Argument(help=f"{HELP}: the model to be matched.")],
    candidate: Annotated[str, typer.Argument(help=f"{HELP}: quantized, converted, merged or fine-tuned.")],
    text: Annotated[
        Path,
        typer.Option(help='Samples: JSON lines of {"messages": ...} or {"text": ...}, a conversation, or plain text.'),
    ],
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence; longer texts are cut into several.")] = 2048,
    samples: Annotated[int | None, typer.Option(min=1, help="Take the first sequences only.")] = None,
    all_tokens: Annotated[
        bool, typer.Option("--all-tokens", help="Score the prompts of conversations, too, not only assistant tokens.")
    ] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Compute in this dtype; default: the one in which each model is loaded.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: a GPU where there is one.")] = "auto",
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare the predictions of two checkpoints over a text: KL, top-1 agreement, perplexity.

    Decoder layers are read one at a time, so neither model has to fit into memory.
    """
    on_hub = [source for source in (reference, candidate) if not Path(source).exists()]
    hub = hub_options(on_hub[0] if on_hub else reference, revision, token, cache_dir)
    # All that needs no torch comes first, so that it is said at once.
    from mistral_large_conversion import read_samples

    if revision is not None and len(on_hub) > 1:
        raise SettingError(
            f"--revision {revision}: of {reference} or of {candidate}; it is for one repository; download the other "
            "with `hf download`, and name its folder"
        )
    given = read_samples(text)
    if all_tokens and all(sample.messages is None for sample in given):
        raise SettingError(f"--all-tokens: has no effect: {text} holds no conversation, and all of a text is scored")
    of_reference, of_candidate = (
        open_checkpoint(source, **({} if Path(source).exists() else hub)) for source in (reference, candidate)
    )

    import torch

    from modeling_mistral_large.streamed import compare_streams, open_pair

    streams, sequences = open_pair(
        of_reference,
        of_candidate,
        given,
        length=length,
        limit=samples,
        scores_prompts=all_tokens,
        dtype=None if dtype is None else getattr(torch, TORCH_DTYPES[DTYPES[dtype]]),
        device=device,
    )
    total = sum(stream.layer_bytes() for stream in streams)
    with progress_bar("comparing", total, console(stderr=True)) as advance:
        found = compare_streams(*streams, sequences, progress=advance)
    about = [describe(source, stream) for source, stream in zip((reference, candidate), streams, strict=True)]
    cut = sum(sequence.is_cut for sequence in sequences)
    if as_json:
        print_json(
            {
                **asdict(found),
                "sequences": len(sequences),
                "cut_conversations": cut,
                "device": str(streams[0].device),
                "reference": about[0],
                "candidate": about[1],
            }
        )
        return
    print_comparison(found, about, text=f"{text}: {sequences_of(sequences)}", cut=cut)


def describe(source: str, stream: "LayerStream") -> dict[str, str]:
    """Return how a model computes."""
    stored = stream.checkpoint.dtype if stream.quantization is None else stream.quantization.scheme
    return {
        "source": source,
        "weights": {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}.get(stored, stored),
        "dtype": str(stream.dtype).removeprefix("torch."),
        "activations": ACTIVATIONS.get(stored, "not rounded"),
    }


def sequences_of(sequences: "Sequence[TokenSequence]") -> str:
    count = sum(len(sequence.ids) for sequence in sequences)
    scored = sum(sum(sequence.is_scored) for sequence in sequences)
    return f"{len(sequences):,} sequences, {count:,} tokens, {scored:,} of them scored"


def print_comparison(found: "Comparison", about: "Sequence[dict[str, str]]", *, text: str, cut: int) -> None:
    from rich.text import Text

    error = "" if found.kl_standard_error is None else f" ± {found.kl_standard_error:.2g}"
    rows = {
        **{
            name: f"{each['source']}: {each['weights']} weights, computes in {each['dtype']}, "
            f"activations {each['activations']}"
            for name, each in zip(("reference", "candidate"), about, strict=True)
        },
        "text": text + (f"; {cut} conversations cut, raise --length to have all of them" if cut else ""),
        "KL": f"{found.kl_mean:.6f}{error} nats in the mean, {found.kl_p99:.4f} at the 99th percentile",
        "top-1": f"{found.top1_agreement:.2%} agreement, {found.flips_per_10k:.1f} flips in 10,000 tokens",
        "perplexity": f"{found.perplexity_reference:.4f} reference, {found.perplexity_candidate:.4f} candidate",
    }
    out = console(soft_wrap=True)
    for label, line in rows.items():
        out.print(Text.assemble((f"{label:12}", "dim"), one_line(line)))

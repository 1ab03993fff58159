"""How exact we are and how exact transformers is without us, against the vendor's reference, in one run.

Prompts: seeded conversations, compared id for id with what the reference encodes; the alternative is the v3 chat
template that the reference itself generates, run by transformers on a tokenizer with the right ids, with and without
`sanitize_control_tokens`. Texts: chunks of Python source, compared with SentencePiece; the alternative is the tokenizer
that transformers makes of the same file, for which it needs protobuf. Weights: the rope order of a grouped-query key,
compared with a plain loop. `--samples` also takes the reference's own samples: folders with a `sample.json` and the ids
it must have in `tokens_v3.json`, as they lie in `tests/data/samples` of the repository of mistral-common.

    python -m benchmarks.exactness --conversations 1500 --write benchmarks/results/exactness.json
"""

import argparse
import ast
import inspect
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer
from transformers.core_model_loading import PermuteForRope

from mistral_large_conversion.checkpoint.rope import split_rope_pairs
from modeling_mistral_large import MistralLargeConfig, MistralLargeTokenizer
from tests.support.checkpoints import tokenizer_model_file
from tests.support.conversations import KINDS, Conversation, conversations, reference_ids

SEED = 2407
CHUNK_CHARACTERS = 400


def share_of(same: int, count: int) -> str:
    return f"{100 * same / count:6.2f} % of {count}"


def prompt_shares(folder: Path, count: int) -> Iterator[tuple[str, str, int, int]]:
    """Yield kind, name of the way, number of prompts with the reference's ids, number of conversations."""
    reference = MistralTokenizer.from_file(str(folder / "tokenizer.model.v3"))
    ours = MistralLargeTokenizer.from_pretrained(folder)
    vendor_template = convert_tokenizer_to_chat_template(folder / "tokenizer.model.v3")
    # The rest of the prompt is the template's and transformers' doing: the ids of plain texts are right here.
    stock = MistralLargeTokenizer.from_pretrained(folder, chat_template=vendor_template)

    def prompt(tokenizer: Any, conversation: Conversation, **options: Any) -> list[int] | None:
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                continue_final_message=conversation.continue_final_message,
                return_dict=False,
                **options,
            )
        except Exception:
            # A refusal of what the reference accepts counts as a difference, whatever its type.
            return None
        return ids

    ways: dict[str, Callable[[Conversation], list[int] | None]] = {
        "ours": lambda conversation: prompt(ours, conversation),
        "vendor's template": lambda conversation: prompt(stock, conversation),
    }
    if "sanitize_control_tokens" in inspect.signature(transformers.TokenizersBackend.apply_chat_template).parameters:
        ways["vendor's template, sanitized"] = lambda conversation: prompt(
            stock, conversation, sanitize_control_tokens=True
        )
    for kind in KINDS:
        sample = list(conversations(kind, SEED, count))
        expected = [reference_ids(reference, conversation) for conversation in sample]
        for name, way in ways.items():
            same = sum(way(conversation) == ids for conversation, ids in zip(sample, expected, strict=True))
            yield kind, name, same, count


def sample_results(folder: Path, samples: Path) -> Iterator[tuple[str, bool]]:
    """Yield the name of each of the reference's samples, and whether ours has its ids."""
    ours = MistralLargeTokenizer.from_pretrained(folder)
    for path in sorted(samples.glob("*/tokens_v3.json")):
        expected = json.loads(path.read_text())["tokens"]
        request = json.loads((path.parent / "sample.json").read_text())
        found = ours.apply_chat_template(request["messages"], tools=request["tools"], return_dict=False)
        yield path.parent.name, found == expected


def source_chunks(count: int) -> list[str]:
    """Chunks of the standard library's Python source."""
    text = "".join(
        path.read_text(encoding="utf-8", errors="ignore")
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]
    )
    return [text[start : start + CHUNK_CHARACTERS] for start in range(0, count * CHUNK_CHARACTERS, CHUNK_CHARACTERS)]


def text_shares(folder: Path, count: int) -> Iterator[tuple[str, int, int]]:
    """Yield name of the way, number of chunks with SentencePiece's ids, number of chunks."""
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model.v3"))
    chunks = source_chunks(count)
    expected = processor.encode(chunks)
    ours = MistralLargeTokenizer.from_pretrained(folder)
    yield "ours", sum(map(list.__eq__, ours.encode_texts(chunks), expected)), len(chunks)
    # transformers knows a SentencePiece file by its ending.
    stock_file = shutil.copyfile(folder / "tokenizer.model.v3", folder / "tokenizer.model")
    stock = LlamaTokenizer.from_pretrained(folder, vocab_file=str(stock_file))
    found = stock(chunks, add_special_tokens=False)["input_ids"]
    yield "transformers' own conversion", sum(map(list.__eq__, found, expected)), len(chunks)


def rope_results() -> Iterator[tuple[str, str]]:
    """Yield name of the way and whether it orders the rows of 2407's key weight as a plain loop does."""
    config = MistralLargeConfig()
    rows = config.num_key_value_heads * config.head_dim
    weight = torch.arange(rows)[:, None]
    half = config.head_dim // 2
    order = [
        head * config.head_dim + 2 * pair + part
        for head in range(config.num_key_value_heads)
        for part in range(2)
        for pair in range(half)
    ]
    yield "ours", str(split_rope_pairs(weight, head_dim=config.head_dim)[:, 0].tolist() == order)
    try:
        found = PermuteForRope()._permute_for_rope(weight, config)[:, 0].tolist() == order
    except Exception as error:
        yield "transformers' PermuteForRope", f"{type(error).__name__}: {str(error)[:60]}"
    else:
        yield "transformers' PermuteForRope", str(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--conversations", type=int, default=1500, help="of each kind")
    parser.add_argument("--chunks", type=int, default=1500, help="of Python source")
    parser.add_argument("--samples", type=Path, help="folder of the reference's own samples")
    parser.add_argument("--write", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    results: dict[str, Any] = {"transformers": transformers.__version__, "prompts": {}, "texts": {}, "rope": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(tokenizer_model_file(), folder / "tokenizer.model.v3")
        for kind, way, same, count in prompt_shares(folder, options.conversations):
            print(f"prompts, {kind:8} {way:30} {share_of(same, count)}", flush=True)
            results["prompts"].setdefault(kind, {})[way] = [same, count]
        for sample, is_same in sample_results(folder, options.samples) if options.samples else ():
            print(f"the reference's sample {sample:30} {is_same}")
            results.setdefault("samples", {})[sample] = is_same
        for way, same, count in text_shares(folder, options.chunks):
            print(f"texts, Python    {way:30} {share_of(same, count)}", flush=True)
            results["texts"][way] = [same, count]
    for way, result in rope_results():
        print(f"rope of a key    {way:30} {result}")
        results["rope"][way] = result
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

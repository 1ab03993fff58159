"""How fast prompts are built and responses are parsed and constrained, against the alternatives, in one run.

Prompts: mistral-common (`encode_chat_completion`, from messages and from requests made before), and transformers on the
same tokenizer with the v3 template that mistral-common generates, with and without `sanitize_control_tokens`. The ways
take turns on texts that none has seen before; the table gives medians, and the median of the ratios.

Responses: the parser's and the grammar's time a token, compared with a decoding step of the bundled demo's
geometry, while `generate` writes a given response under a schema of middling size.

    python -m benchmarks.chat --write benchmarks/results/chat.json
"""

import argparse
import ast
import inspect
import json
import pydoc_data.topics
import random
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.generation.structured_output import constrain
from modeling_mistral_large.instruct.answer import AnswerStream, parse_answer
from tests.support.checkpoints import tokenizer_model_file

DOCUMENT_TOKENS = 128_000
DEMO_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 32768,
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.replace('_', ' ').capitalize()}, with the options that the user has given.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What is asked for, in the words of the user."},
                    "limit": {"type": "integer", "description": "How many entries to return at most."},
                    "language": {"type": "string", "enum": ["en", "fr", "de"]},
                },
                "required": ["query"],
            },
        },
    }
    for name in ("search_documents", "get_current_weather", "list_orders", "pay_invoice", "send_message")
]

ORDER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "status": {"enum": ["active", "inactive", "suspended"]},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "city": {"type": "string"},
                "postcode": {"type": "string", "pattern": "^[0-9]{5}$"},
                "country": {"enum": ["FR", "DE", "GB", "US"]},
            },
            "required": ["street", "city", "country"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "orders": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "integer"},
                    "price": {"type": "number"},
                    "items": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["id", "price"],
                "additionalProperties": False,
            },
        },
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["name", "status", "address", "orders"],
    "additionalProperties": False,
}
ORDER: dict[str, Any] = {
    "name": "Ada Lovelace, Countess of Lovelace",
    "age": 36,
    "email": "ada@example.org",
    "status": "active",
    "address": {"street": "12 St James's Square", "city": "London", "postcode": "12345", "country": "GB"},
    "tags": ["mathematics", "poetry and other things"],
    "orders": [
        {"id": 1234, "price": 19.95, "items": ["punch cards", "more punch cards, café 🎉"]},
        {"id": 3, "price": 200000.0},
    ],
    "note": "A long note in which many words are written, one after the other, until it comes to its end.",
}


class Texts:
    """Prose and code without end: Python's own documentation, then its library, cut at random places."""

    def __init__(self, seed: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
        sources = (path.read_text(encoding="utf-8", errors="ignore") for path in files)
        self.text = "\n".join([*pydoc_data.topics.topics.values(), *sources])
        self.random = random.Random(seed)

    def cut(self, characters: int) -> str:
        start = self.random.randrange(len(self.text) - characters)
        return self.text[start : start + characters].strip(" ") or "."


Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]


def short_chat(texts: Texts) -> Conversation:
    return [
        {"role": "system", "content": texts.cut(120)},
        {"role": "user", "content": texts.cut(200)},
        {"role": "assistant", "content": texts.cut(400)},
        {"role": "user", "content": texts.cut(150)},
    ], None


def tool_loop(texts: Texts) -> Conversation:
    messages: list[dict[str, Any]] = [{"role": "system", "content": texts.cut(500)}]
    for turn in range(8):
        messages.append({"role": "user", "content": texts.cut(200)})
        for call in range(2):
            call_id = f"call{turn}x{call:03}"
            function = {
                "name": TOOLS[texts.random.randrange(len(TOOLS))]["function"]["name"],
                "arguments": json.dumps({"query": texts.cut(60), "limit": call}),
            }
            result = json.dumps({"entries": [{"title": texts.cut(40), "text": texts.cut(300)} for _ in range(3)]})
            messages += [
                {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]},
                {"role": "tool", "name": function["name"], "tool_call_id": call_id, "content": result},
            ]
        messages.append({"role": "assistant", "content": texts.cut(400)})
    return [*messages, {"role": "user", "content": texts.cut(200)}], TOOLS


def long_document(texts: Texts) -> Conversation:
    # Prose and code have about 3.4 characters a token; the table gives the tokens.
    return [{"role": "user", "content": texts.cut(round(3.4 * DOCUMENT_TOKENS))}], None


# What, how many conversations a turn.
WORKLOADS: dict[str, tuple[Callable[[Texts], Conversation], int]] = {
    "short chats": (short_chat, 40),
    "tool loops": (tool_loop, 6),
    "128k document": (long_document, 1),
}


def prompt_ways(folder: Path) -> dict[str, Callable[[Conversation], Callable[[], list[int]]]]:
    """Return the ways by name: each takes a conversation and returns what is timed."""
    shutil.copyfile(tokenizer_model_file(), folder / "tokenizer.model.v3")
    ours = MistralLargeTokenizer.from_pretrained(folder)
    ours.save_pretrained(folder)
    reference = MistralTokenizer.from_file(str(folder / "tokenizer.model.v3"))
    stock = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=convert_tokenizer_to_chat_template(folder / "tokenizer.model.v3"),
    )

    def template(tokenizer: Any, **options: Any) -> Callable[[Conversation], Callable[[], list[int]]]:
        def of(conversation: Conversation) -> Callable[[], list[int]]:
            messages, tools = conversation
            return lambda: tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)

        return of

    def from_messages(conversation: Conversation) -> Callable[[], list[int]]:
        messages, tools = conversation

        def build() -> list[int]:
            request: Any = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
            ids: list[int] = reference.encode_chat_completion(request).tokens
            return ids

        return build

    def from_request(conversation: Conversation) -> Callable[[], list[int]]:
        messages, tools = conversation
        request: Any = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
        return lambda: reference.encode_chat_completion(request).tokens

    ways = {
        "ours": template(ours),
        "mistral-common": from_messages,
        "mistral-common, from requests": from_request,
        "transformers": template(stock),
    }
    if "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters:
        ways["transformers, sanitized"] = template(stock, sanitize_control_tokens=True)
    return ways


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_prompts(folder: Path, repeat: int) -> dict[str, Any]:
    """Return conversations and tokens per second of every way on every workload, and ours against each."""
    ways = prompt_ways(folder)
    texts = Texts(seed=2407)
    results: dict[str, Any] = {}
    for workload, (make, count) in WORKLOADS.items():
        times: dict[str, list[float]] = {name: [] for name in ways}
        tokens = []
        # The first turn is not counted: libraries compile templates and fill caches.
        for turn in range(repeat + 1):
            conversations = [make(texts) for _ in range(count)]
            lengths = {sum(len(ways[name](each)()) for each in conversations) for name in ("ours", "mistral-common")}
            assert len(lengths) == 1, "the prompts differ"
            conversations = [make(texts) for _ in range(count)]
            for name in sorted(ways, key=lambda _: texts.random.random()):
                work = [ways[name](each) for each in conversations]
                spent = seconds(lambda work=work: [build() for build in work])  # type: ignore[misc]
                if turn > 0:
                    times[name].append(spent)
            tokens.append(sum(len(ways["mistral-common"](each)()) for each in conversations))
        results[workload] = {
            "tokens per conversation": round(statistics.median(tokens) / count),
            "ways": {
                name: {
                    "conversations per second": count / statistics.median(spent),
                    "tokens per second": statistics.median(tokens) / statistics.median(spent),
                    "ours against it": statistics.median(
                        other / own for other, own in zip(spent, times["ours"], strict=True)
                    ),
                }
                for name, spent in times.items()
            },
        }
    return results


def measure_parser(folder: Path, repeat: int) -> dict[str, float]:
    """Return the parser's microseconds a token, on text and on tool calls, at once and streamed."""
    tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    call = {"name": "search_documents", "arguments": ORDER}
    answers = {
        "text": [*tokenizer.encode_texts([Texts(seed=7).cut(4000)])[0], 2],
        "tool calls": [5, *tokenizer.encode_texts([json.dumps([call] * 6, ensure_ascii=False)])[0], 2],
    }
    pieces = tokenizer.pieces

    def stream(ids: Iterable[int]) -> None:
        parser = AnswerStream(pieces)
        for token in ids:
            parser.feed([token])
        parser.finish()

    times: dict[str, list[float]] = {}
    for _ in range(repeat):
        for name, ids in answers.items():
            for way, parse in {"at once": lambda ids: parse_answer(ids, pieces), "streamed": stream}.items():
                spent = seconds(lambda parse=parse, ids=ids: parse(ids))  # type: ignore[misc]
                times.setdefault(f"{name}, {way}", []).append(1e6 * spent / len(ids))
    return {name: statistics.median(measured) for name, measured in times.items()}


class Script(LogitsProcessor):
    """Makes `generate` write a given response, so that every step does the same work in every run."""

    def __init__(self, ids: Sequence[int], start: int) -> None:
        self.ids, self.start = ids, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override, unused-ignore]
        scores[:, self.ids[input_ids.shape[1] - self.start]] += 1000
        return scores


class Stopwatch(LogitsProcessor):
    """Adds up the time of another processor."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.seconds = processor, 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override, unused-ignore]
        start = time.perf_counter()
        scores = self.processor(input_ids, scores)
        self.seconds += time.perf_counter() - start
        return scores


def measure_grammar(folder: Path, repeat: int) -> dict[str, float]:
    """Return milliseconds: to prepare a constraint, of a step without it, and of the constraint in a step."""
    tokenizer = MistralLargeTokenizer.from_pretrained(folder)
    # transformers types its models in part only.
    model: Any = MistralLargeForCausalLM(MistralLargeConfig(**DEMO_CONFIG))  # type: ignore[arg-type]
    model.eval()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Data?"}], return_tensors="pt")
    answer = [*tokenizer.encode_texts([json.dumps(ORDER, ensure_ascii=False)])[0], 2]
    script = Script(answer, prompt["input_ids"].shape[1])
    options = {"max_new_tokens": len(answer), "do_sample": False, "eos_token_id": 2, "pad_token_id": 384}
    response_format = {"type": "json_schema", "json_schema": {"schema": ORDER_SCHEMA}}

    def write(*processors: Any) -> None:
        output = model.generate(**prompt, **options, logits_processor=LogitsProcessorList([script, *processors]))
        assert output[0, script.start :].tolist() == answer

    constrain(tokenizer)  # reads the vocabulary, once a process
    write()
    times: dict[str, list[float]] = {"prepare": [], "step": [], "constraint": [], "difference": []}
    for _ in range(repeat):
        start = time.perf_counter()
        (constraint,) = constrain(tokenizer, response_format=response_format)
        times["prepare"].append(1e3 * (time.perf_counter() - start))
        stopwatch = Stopwatch(constraint)
        plain, constrained = seconds(write), seconds(lambda stopwatch=stopwatch: write(stopwatch))  # type: ignore[misc]
        times["step"].append(1e3 * plain / len(answer))
        times["constraint"].append(1e3 * stopwatch.seconds / len(answer))
        times["difference"].append(1e3 * (constrained - plain) / len(answer))
    return {"tokens": len(answer), **{name: statistics.median(measured) for name, measured in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=ast.get_docstring(ast.parse(Path(__file__).read_text())))
    parser.add_argument("--repeat", type=int, default=9, help="turns of every measurement")
    parser.add_argument("--write", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = measure_prompts(folder, options.repeat)
        for workload, result in prompts.items():
            print(f"\n{workload}, {result['tokens per conversation']} tokens")
            for way, figures in result["ways"].items():
                print(
                    f"  {way:30} {figures['conversations per second']:9.1f} conversations/s "
                    f"{figures['tokens per second']:11,.0f} tokens/s   ours / it {figures['ours against it']:6.2f}"
                )
        answers = measure_parser(folder, options.repeat)
        print("\nparser")
        for kind, microseconds in answers.items():
            print(f"  {kind:30} {microseconds:9.2f} µs a token")
        grammar = measure_grammar(folder, options.repeat)
    share = grammar["constraint"] / grammar["step"]
    print(f"\ngrammar, {grammar['tokens']:.0f} tokens in the demo's geometry, batch 1")
    print(f"  {'a step without it':30} {grammar['step']:9.3f} ms")
    print(f"  {'the constraint in a step':30} {grammar['constraint']:9.3f} ms   {100 * share:5.2f} % of a step")
    print(f"  {'at most 5 % of a step from':30} {20 * grammar['constraint']:9.3f} ms")
    print(f"  {'step with it less without':30} {grammar['difference']:9.3f} ms")
    print(f"  {'to prepare a schema':30} {grammar['prepare']:9.3f} ms")
    if options.write:
        results = {
            "transformers": transformers.__version__,
            "prompts": prompts,
            "parser, microseconds a token": answers,
            "grammar, milliseconds": grammar,
        }
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

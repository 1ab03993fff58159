"""Structured output: a logits processor that lets the model write only what a schema or the tools allow.

    processors = constrain(tokenizer, tools=[get_weather], tool_choice="required")
    model.generate(**prompt, logits_processor=processors)

Every response that ends is valid; every other is the beginning of a valid one. Of the control tokens only `</s>` and,
where tools may be called, `[TOOL_CALLS]` can be written. The grammar is llguidance's: `answer_grammar` returns it as
text, for servers that read such grammars themselves.
"""

import json
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mistral_large_conversion.chat_templates import START_ANCHORS
from mistral_large_conversion.errors import CheckpointError, MissingLibraryError
from mistral_large_conversion.vocabulary import BOS, BYTE_IDS, CONTROL_TOKENS, VOCAB_SIZE, VOCABULARIES, piece_bytes
from modeling_mistral_large.errors import ConversationError, SchemaError
from modeling_mistral_large.generation.closed_objects import close_object, close_objects
from modeling_mistral_large.inference.common_prefix import common_length
from modeling_mistral_large.instruct.answer import EOS_ID, TOOL_CALLS_ID
from modeling_mistral_large.instruct.json_text import as_mapping
from modeling_mistral_large.instruct.tool_schemas import ToolDefinition, find_schema_error, list_tools, write_tools
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# JSON as the reference writes it into prompts: what the model has learned, with no room for endless white space.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The formats that are enforced. Any other is a remark, as it is to most validators.
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
# The keywords that hold further schemas: one, a list of them, or an object of them.
INNER_SCHEMA = frozenset({"additionalItems", "additionalProperties", "items"})
INNER_LIST = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
INNER_TABLE = frozenset({"$defs", "definitions", "patternProperties", "properties"})

# Where the grammar leaves one text only, the model still chooses its tokens: encoding that text costs more.
OPTIONS = '%llguidance {"no_forcing": true}'
TEXT_RULE = r"/(.|\n)+/"
ID_RULE = r'", \"id\": \"" /[a-zA-Z0-9]{9}/ "\""'

_vocabularies: "weakref.WeakKeyDictionary[MistralLargeTokenizer, LLTokenizer]" = weakref.WeakKeyDictionary()


def constrain(
    tokenizer: MistralLargeTokenizer,
    *,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[ToolDefinition] | None = None,
    tool_choice: str | Mapping[str, Any] | None = "auto",
    parallel_tool_calls: bool = True,
    continue_final_message: bool = False,
) -> LogitsProcessorList:
    """Return the `logits_processor` that holds responses of `generate` or of a pipeline to an OpenAI-shaped request.

    The request is as in `answer_grammar`. continue_final_message: whether the prompts end in the assistant's own
    words, which then count as the beginning of the response. The result serves any number of calls, one after another.

    Raises what `answer_grammar` raises.
    """
    grammar = answer_grammar(
        response_format=response_format,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        vocabulary=tokenizer.vocabulary.name,
    )
    return LogitsProcessorList([AnswerConstraint(tokenizer, grammar, continue_final_message=continue_final_message)])


def answer_grammar(
    *,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[ToolDefinition] | None = None,
    tool_choice: str | Mapping[str, Any] | None = "auto",
    parallel_tool_calls: bool = True,
    vocabulary: str = "v3",
) -> str:
    """Return the grammar of the responses to a request, in llguidance's variety of Lark.

    response_format: `{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema":
        {"schema": …}}`. JSON is written as `json.dumps` writes it, with properties in the order of the schema. Objects
        whose properties are named have no others, unless the schema speaks of others or combines schemas.
    tools: OpenAI tool definitions or Python functions. The arguments of a call are an object that is valid under the
        tool's parameters; where these name properties and say nothing of others, there are no others.
    tool_choice: "none", "auto", "required" (or "any"), or `{"type": "function", "function": {"name": …}}`.
    parallel_tool_calls: whether a response may hold several calls.
    vocabulary: `v3` or `v7`, the name of the vocabulary of the model's tokenizer. Completions have one grammar in both,
        but a text of v7 can hold two tokens more, `[REF]` and `[/REF]`.

    Raises ConversationError for a request that is none, SchemaError for a schema that cannot be kept to, and
    MissingLibraryError without llguidance.
    """
    if vocabulary not in VOCABULARIES:
        raise ConversationError(
            f"vocabulary {vocabulary!r}: it is one of {', '.join(VOCABULARIES)}; pass `tokenizer.vocabulary.name`"
        )
    pieces = VOCABULARIES[vocabulary].user_defined_ids
    schema = _read_response_format(response_format)
    functions = json.loads(write_tools(list_tools(tools)))
    functions, is_call_required = _read_tool_choice(tool_choice, [tool["function"] for tool in functions])
    if schema is not None and is_call_required:
        raise ConversationError(
            f"tool_choice {tool_choice!r} with response_format: a response that calls a tool is no JSON; "
            "leave one of the two out"
        )
    rules: dict[str, str] = {}
    if schema is not None:
        rules["start"] = "answer | calls" if functions else "answer"
        # The space is the dummy ▁ that stands before every text.
        rules["answer"] = f'" " %json {_write_schema(schema, "response_format")}'
    elif is_call_required:
        rules["start"] = "calls"
    else:
        text = f"( TEXT | <[{pieces.start}-{pieces.stop - 1}]> )*"
        rules |= {"start": "text calls?" if functions else "text", "text": text, "TEXT": TEXT_RULE}
    if functions:
        more = '(", " call)*' if parallel_tool_calls else ""
        rules["calls"] = f'<[{TOOL_CALLS_ID}]> " [" call {more} "]"'
        rules["call"] = " | ".join(f"call_{number}" for number in range(len(functions)))
        for number, function in enumerate(functions):
            name = function["name"]
            arguments = _write_schema(_arguments_schema(function["parameters"], name), f"tool {name!r}")
            begin = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
            rules[f"call_{number}"] = f'{begin} %json {arguments} id? "}}"'
        rules["id"] = ID_RULE
    return "\n".join([OPTIONS, *(f"{name}: {body}" for name, body in rules.items())])


class AnswerConstraint(LogitsProcessor):
    """Logits processor that gives every token after which no valid response could follow the score -inf.

    Works row by row, for batches, beams and candidates of assisted generation; the prompt itself may hold anything.

    tokenizer, grammar: what `answer_grammar` returned, for this tokenizer.
    continue_final_message: as in `constrain`.

    Raises SchemaError where the grammar is too large, or in a call, a state of it is.
    """

    def __init__(self, tokenizer: MistralLargeTokenizer, grammar: str, *, continue_final_message: bool = False) -> None:
        llguidance = _import_llguidance()
        self._tokenizer = tokenizer
        self._continues = continue_final_message
        self._vocabulary = _read_vocabulary(tokenizer)
        self._start: LLMatcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        _check_matcher(self._start)
        self._only_eos = (1 << EOS_ID).to_bytes(len(self._start.compute_bitmask()), "little")
        self._prompts: Tensor | None = None  # [rows, tokens]
        self._longest = 0
        self._answers: list[_Answer] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override, unused-ignore]
        """Return the scores of the next tokens [rows, vocabulary] after prompts and completions [rows, tokens]."""
        size = self._vocabulary.vocab_size
        if scores.shape[1] < size:
            raise CheckpointError(
                f"the model has {scores.shape[1]} tokens: the tokenizer has {size}; pass the tokenizer of the model"
            )
        if not self._is_next_step(input_ids):
            self._begin(input_ids)
        assert self._prompts is not None
        self._longest = input_ids.shape[1]
        generated = input_ids[:, self._prompts.shape[1] :].tolist()
        masks = [
            answer.next_tokens(ids) or self._only_eos for answer, ids in zip(self._answers, generated, strict=True)
        ]
        bits = np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1)
        # Columns beyond the tokenizer's are padded with 0.
        bits = np.unpackbits(bits, axis=1, count=scores.shape[1], bitorder="little")
        is_allowed = torch.from_numpy(bits.view(np.bool_)).to(scores.device)
        return torch.where(is_allowed, scores, -torch.inf)

    def _is_next_step(self, input_ids: Tensor) -> bool:
        """Return whether the rows are responses in progress; assisted generation also takes tokens back."""
        if self._prompts is None:
            return False
        length = self._prompts.shape[1]
        return length <= input_ids.shape[1] <= self._longest + 1 and torch.equal(input_ids[:, :length], self._prompts)

    def _begin(self, input_ids: Tensor) -> None:
        self._prompts = input_ids.clone()
        self._answers = [_Answer(self._start.deep_copy()) for _ in input_ids]
        if not self._continues:
            return
        vocabulary = self._tokenizer.vocabulary
        anchors = {vocabulary.control_tokens[token] for token in START_ANCHORS[vocabulary.name]}
        for answer, prompt in zip(self._answers, input_ids.tolist(), strict=True):
            marks = [index for index, token in enumerate(prompt) if token in anchors]
            begun = prompt[marks[-1] + 1 :] if marks else []
            if not answer.begin_with(begun):
                raise ConversationError(
                    f"the final message {self._tokenizer.decode(begun)!r}: no response to this request begins so; "
                    "JSON is continued as json.dumps writes it; leave the message or the constraint out"
                )


class _Answer:
    """A response in progress, and the grammar's state after it."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher
        self._read: list[int] = []

    def begin_with(self, ids: list[int]) -> bool:
        """Read the beginning that the prompt holds, and return whether the grammar has a place for it."""
        return self._matcher.try_consume_tokens(ids) == len(ids)

    def next_tokens(self, ids: list[int]) -> bytes | None:
        """Return which tokens may follow the response, one bit each; None where it has ended or is no valid one.

        The latter happens to the candidates of assisted generation, and where another processor forces a token.
        """
        mask = self._matcher.compute_bitmask() if self._move_to(ids) else None
        _check_matcher(self._matcher)
        return mask

    def _move_to(self, ids: list[int]) -> bool:
        """Bring the grammar's state behind `ids`, and return whether it could."""
        known = common_length(ids, self._read)
        if known < len(self._read):
            self._matcher.rollback(len(self._read) - known)
        taken = self._matcher.try_consume_tokens(ids[known:])
        self._read = ids[: known + taken]
        return len(self._read) == len(ids)


def _read_response_format(response_format: Mapping[str, Any] | None) -> Any:
    """Return the schema of JSON responses, or None for text."""
    if response_format is None:
        return None
    given = as_mapping(response_format) or {}
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    definition = as_mapping(given.get("json_schema")) if kind == "json_schema" else None
    schema = definition.get("schema") if definition is not None else None
    if not isinstance(schema, Mapping | bool):
        raise ConversationError(
            f'response_format {response_format!r}: it is {{"type": "text"}}, {{"type": "json_object"}} or '
            '{"type": "json_schema", "json_schema": {"schema": …}}; correct it'
        )
    if isinstance(schema, Mapping) and (problem := find_schema_error(schema, "schema")):
        raise SchemaError(f"response_format: {problem}; correct the schema")
    return schema


def _read_tool_choice(
    tool_choice: str | Mapping[str, Any] | None, functions: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], bool]:
    """Return the functions that may be called, and whether one must be."""
    if tool_choice == "none":
        return [], False
    names = [function["name"] for function in functions]
    if twice := {name for name, count in Counter(names).items() if count > 1}:
        raise ConversationError(f"tools: two are named {min(twice)!r}; a call must tell which; rename one")
    if tool_choice in (None, "auto"):
        return functions, False
    if not functions:
        raise ConversationError(f"tool_choice {tool_choice!r}: there are no tools to call; pass tools")
    if tool_choice in ("required", "any"):
        return functions, True
    chosen = as_mapping((as_mapping(tool_choice) or {}).get("function"))
    name = chosen.get("name") if chosen is not None else None
    if name is None:
        raise ConversationError(
            f'tool_choice {tool_choice!r}: it is "none", "auto", "required" or '
            '{"type": "function", "function": {"name": …}}; correct it'
        )
    if name not in names:
        raise ConversationError(f"tool_choice {name!r}: the tools are {', '.join(names)}; choose one of them")
    return [function for function in functions if function["name"] == name], True


def _arguments_schema(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the schema of a call's arguments: an object, closed where only its properties describe it."""
    if not parameters:
        return {"type": "object", "additionalProperties": False}
    kind = parameters.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise SchemaError(f"tool {name!r}: parameters of type {kind!r}; arguments are an object; correct the type")
    return close_object({**parameters, "type": "object"})


def _write_schema(schema: Any, where: str) -> str:
    """Return a schema as the grammar takes it, or raise if no output can be held to it."""
    llguidance = _import_llguidance()
    try:
        schema = json.loads(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"{where}: {error}; a schema is JSON; convert it") from error
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    text = json.dumps({**close_objects(_prepare_schema(schema, where)), "x-guidance": JSON_STYLE})
    problem = llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_json_schema(text))
    if problem and not problem.startswith("WARNING"):
        reason = " ".join(problem.partition("JSON schema: ")[2].split()) or problem
        raise SchemaError(
            f"{where}: {reason}; output can be held to what the grammar library knows; "
            "simplify the schema, and check the rest in the response"
        )
    return text


def _prepare_schema(schema: Any, where: str) -> Any:
    """Return a schema without remarks that the grammar would refuse, or raise for what it would not keep to."""
    if not isinstance(schema, dict):
        return schema
    # A name that is under no property may be written twice, and then counts once.
    if schema.get("minProperties", 0) > max(1, len(schema.get("required", ()))):
        raise SchemaError(
            f"{where}: minProperties {schema['minProperties']}; more than the required properties cannot be kept to; "
            "require them by name"
        )
    prepared = {}
    for keyword, value in schema.items():
        if keyword == "format" and value not in FORMATS:
            continue
        if keyword in INNER_TABLE and isinstance(value, dict):
            value = {name: _prepare_schema(inner, where) for name, inner in value.items()}
        elif keyword in INNER_LIST and isinstance(value, list):
            value = [_prepare_schema(inner, where) for inner in value]
        elif keyword in INNER_SCHEMA:
            value = _prepare_schema(value, where)
        prepared[keyword] = value
    return prepared


class _Pieces:
    """The vocabulary as llguidance reads it: what is special can be written only where the grammar names it."""

    eos_token_id = EOS_ID
    bos_token_id = CONTROL_TOKENS[BOS]

    def __init__(self, tokenizer: MistralLargeTokenizer) -> None:
        self.tokens = [piece_bytes(piece) for piece in tokenizer.pieces]
        known = set(self.tokens[BYTE_IDS.stop :])
        added = tokenizer.added_tokens_decoder.items()
        # User-defined pieces are text, but not in JSON. No text is encoded to the byte of a character with a piece.
        self.special_token_ids = [
            *tokenizer.vocabulary.control_ids,
            *tokenizer.vocabulary.user_defined_ids,
            *(index for index in BYTE_IDS if self.tokens[index] in known),
            *(index for index, token in added if index >= VOCAB_SIZE and token.special),
        ]
        # llguidance takes a special token that is spelled `[`, as `<0x5B>` would be, for the beginning of any other.
        for index in self.special_token_ids:
            self.tokens[index] = b"<%d>" % index

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("a grammar without forced tokens encodes no text")


def _read_vocabulary(tokenizer: MistralLargeTokenizer) -> "LLTokenizer":
    vocabulary = _vocabularies.get(tokenizer)
    if vocabulary is None or vocabulary.vocab_size != len(tokenizer):
        llguidance = _import_llguidance()
        wrapper = llguidance.TokenizerWrapper(_Pieces(tokenizer))
        vocabulary = llguidance.LLTokenizer(wrapper, slices=llguidance.LLTokenizer.json_slices())
        _vocabularies[tokenizer] = vocabulary
    return vocabulary


def _check_matcher(matcher: "LLMatcher") -> None:
    if matcher.is_error():
        reason = matcher.get_error().partition("\n")[0]
        raise SchemaError(f"the grammar cannot be followed ({reason}); simplify the schema, or pass fewer tools")


def _import_llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise MissingLibraryError(
            "structured output: llguidance is not installed; it holds the model to the grammar; "
            "run pip install 'modeling-mistral-large[structured]'"
        ) from error
    return llguidance

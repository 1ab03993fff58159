"""The instruct formats v3 and v7, pure: conversations to prompts, completions to messages, ids of tool calls."""

from modeling_mistral_large.instruct.answer import AnswerStream, ParsedAnswer, TextEvent, ToolCallEvent, parse_answer
from modeling_mistral_large.instruct.formats import FORMATS, InstructFormat
from modeling_mistral_large.instruct.prompt import Prompt, Segment, build_prompt
from modeling_mistral_large.instruct.tool_call_ids import is_tool_call_id, map_tool_call_ids, new_tool_call_id
from modeling_mistral_large.instruct.tool_schemas import write_tools

__all__ = [
    "FORMATS",
    "AnswerStream",
    "InstructFormat",
    "ParsedAnswer",
    "Prompt",
    "Segment",
    "TextEvent",
    "ToolCallEvent",
    "build_prompt",
    "is_tool_call_id",
    "map_tool_call_ids",
    "new_tool_call_id",
    "parse_answer",
    "write_tools",
]

"""What drives the model: chat sessions, tools, structured output, streaming, drafts, recorded and compiled steps."""

from modeling_mistral_large.generation.chat_session import ChatSession
from modeling_mistral_large.generation.compiled_layers import compile_layers_
from modeling_mistral_large.generation.streaming import MistralLargeTextIteratorStreamer, MistralLargeTextStreamer
from modeling_mistral_large.generation.structured_output import answer_grammar, constrain
from modeling_mistral_large.generation.tool_loop import generate_with, run_tool_loop
from modeling_mistral_large.inference.speculative_decoding import Speculation
from modeling_mistral_large.recorded_steps.automatic import release_recording
from modeling_mistral_large.recorded_steps.cache import RecordedCache
from modeling_mistral_large.recorded_steps.decoding import record_decoding
from modeling_mistral_large.recorded_steps.obstacles import obstacle_to_recording

__all__ = [
    "ChatSession",
    "MistralLargeTextIteratorStreamer",
    "MistralLargeTextStreamer",
    "RecordedCache",
    "Speculation",
    "answer_grammar",
    "compile_layers_",
    "constrain",
    "generate_with",
    "obstacle_to_recording",
    "record_decoding",
    "release_recording",
    "run_tool_loop",
]

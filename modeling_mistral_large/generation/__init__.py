"""What drives the model: the tool loop, structured output, streaming, recorded and compiled steps."""

from modeling_mistral_large.generation.compiled_layers import compile_layers_
from modeling_mistral_large.generation.recorded_steps import obstacle_to_recording, record_decoding
from modeling_mistral_large.generation.streaming import MistralLargeTextIteratorStreamer, MistralLargeTextStreamer
from modeling_mistral_large.generation.structured_output import answer_grammar, constrain
from modeling_mistral_large.generation.tool_loop import generate_with, run_tool_loop

__all__ = [
    "MistralLargeTextIteratorStreamer",
    "MistralLargeTextStreamer",
    "answer_grammar",
    "compile_layers_",
    "constrain",
    "generate_with",
    "obstacle_to_recording",
    "record_decoding",
    "run_tool_loop",
]

"""The prompt format of a folder's chat template: v3, v7, or one of its own."""

from mistral_large_conversion.prompt_format.recognize import RecognizedFormat as RecognizedFormat
from mistral_large_conversion.prompt_format.recognize import recognize_prompt_format as recognize_prompt_format

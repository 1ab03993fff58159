"""The errors users can meet: each gives the thing, the problem, the rule and the way out.

Every class is also the built-in error that callers would expect, so `except ValueError` and `except OSError` work as
usual; the command line prints the message alone and exits with 2. Those of checkpoints come from the converter.
"""

from mistral_large_conversion.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConversationError,
    DestinationError,
    MissingLibraryError,
    MistralLargeError,
    PlanError,
    SampleFileError,
    SettingError,
    TokenizerFileError,
)

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigurationError",
    "ConversationError",
    "DestinationError",
    "GenerationError",
    "KeywordError",
    "MissingLibraryError",
    "MistralLargeError",
    "PlanError",
    "SampleFileError",
    "SchemaError",
    "SettingError",
    "TokenizerFileError",
    "UnknownVocabularyError",
]


class SchemaError(MistralLargeError, ValueError):
    """A JSON schema that no output can be held to."""


class ConfigurationError(MistralLargeError, ValueError):
    """A configuration with something that Mistral Large does not have."""


class GenerationError(MistralLargeError, RuntimeError):
    """A response that cannot be generated to its end, for a reason that is not in the request alone."""


class KeywordError(MistralLargeError, TypeError):
    """A keyword argument that nothing takes, or two that are one: it would be swallowed."""


class UnknownVocabularyError(TokenizerFileError):
    """A tokenizer whose vocabulary is none of the vendor's, of which no exact tokenizer can be made."""

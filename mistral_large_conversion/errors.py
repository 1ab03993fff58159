"""The errors users can meet: each gives the thing, the problem, the rule and the way out.

Every class is also the built-in error that callers would expect, so `except ValueError` and `except OSError` work as
usual; the command line prints the message alone and exits with 2.
"""


class MistralLargeError(Exception):
    """Base of every error this package raises for a reason the user can act on."""


class CheckpointError(MistralLargeError, ValueError):
    """A checkpoint whose files, tensors or geometry do not fit together."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No folder of a checkpoint, and no repository that can be had."""


class ConversationError(MistralLargeError, ValueError):
    """A conversation, tool or tool call that has no place in the instruct format."""


class PlanError(MistralLargeError, ValueError):
    """Devices or a demand that no plan can be made for."""


class SettingError(MistralLargeError, ValueError):
    """A setting of this package whose value means nothing."""


class TokenizerFileError(MistralLargeError, OSError):
    """A tokenizer file that is missing, unreadable or not the SentencePiece model of v3 or v7."""


class DestinationError(MistralLargeError, OSError):
    """A folder that cannot be written as asked: not empty, no space, or in use."""


class MissingLibraryError(MistralLargeError, ImportError):
    """A library that only some uses need, and that is not installed."""


class SampleFileError(MistralLargeError, ValueError):
    """A file of texts or conversations that cannot be read, or a line of it that is neither."""

"""Empty modules for libraries that the package imports and no speed depends on, where they are not installed.

On a machine with a GPU there is often nothing but torch and transformers. What reads tokenizers and checkpoints does
not work with these, and is not needed: weights are random.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

NAMES = {"sentencepiece": "SentencePieceProcessor", "xxhash": "xxh3_128"}

for library, name in NAMES.items():
    if find_spec(library) is None:
        module = ModuleType(library)
        module.__spec__ = ModuleSpec(library, loader=None)
        setattr(module, name, object)
        sys.modules[library] = module

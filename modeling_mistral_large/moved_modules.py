"""Module names from before the rooms of the package, for scripts that still import them."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "modeling_mistral_large"
MOVED = {
    f"{PACKAGE}.compiled_layers": f"{PACKAGE}.generation.compiled_layers",
    f"{PACKAGE}.conversion": "mistral_large_conversion",
    f"{PACKAGE}.kv_cache": f"{PACKAGE}.inference.kv_cache",
    f"{PACKAGE}.quantized": f"{PACKAGE}.quantization",
    f"{PACKAGE}.sharding": "mistral_large_conversion.sharding",
    f"{PACKAGE}.streaming": f"{PACKAGE}.generation.streaming",
    f"{PACKAGE}.structured_output": f"{PACKAGE}.generation.structured_output",
    f"{PACKAGE}.tool_calls": f"{PACKAGE}.instruct",
    f"{PACKAGE}.tool_loop": f"{PACKAGE}.generation.tool_loop",
    f"{PACKAGE}.tool_schemas": f"{PACKAGE}.instruct.tool_schemas",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module under its old name, with the names of the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        vars(module)["__getattr__"] = lambda name: getattr(import_module(new), name)


def find_moved_modules() -> None:
    """Let old names of modules be imported; may run any number of times."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())

"""Reading of a folder that someone else made: nothing outside of it, nothing but regular files, nothing of any size."""

import json
import math
import reprlib
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from mistral_large_conversion.errors import CheckpointError

LARGEST_JSON = 100_000_000
ADAPTER_CONFIG_NAME = "adapter_config.json"
# The vendor's fine-tuning code and mistral-inference name the file of an adapter so.
LORA_NAME = "lora.safetensors"
MANIFEST_NAME = "conversion.manifest.json"
CHECKPOINT_CONFIGS = ("config.json", "params.json")
CHECKPOINT_WEIGHTS = ("consolidated*.safetensors", "model*.safetensors")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxdict = _SHORT.maxlist = 8
# A value of a file as an error shows it: on one line, and short whatever it is.
shown = _SHORT.repr


def is_one_of(value: object, values: Iterable[object]) -> bool:
    """Whether a value is one of these, of the same type."""
    # In Python, False is 0; what has another type is not compared, however deep it is.
    return any(type(value) is type(each) and value == each for each in values)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def file_problem(folder: Path, name: str) -> str | None:
    """What keeps a file of the folder from being read, or None if nothing does.

    A link may point inside the folder, to the `blobs` of the hub cache when the folder is one of its snapshots, or to
    the weights that the folder was made for, as its manifest says.
    Only files of weights, which are never read whole, may be larger than 100 MB.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
        status = target.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a regular file"
        folder = folder.resolve()
        # A snapshot, or a folder in one.
        snapshot = folder if folder.parent.name == "snapshots" else folder.parent
        allowed = [folder, snapshot.parent.parent / "blobs"] if snapshot.parent.name == "snapshots" else [folder]
        if target.parent not in allowed and not _is_adopted(folder, name, target):
            return f"{name} is a link out of the folder, to {str(target)!r}"
        if status.st_size > LARGEST_JSON and not name.endswith(".safetensors"):
            return f"{name} has more than {LARGEST_JSON} bytes"
        with target.open("rb"):
            pass
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, RuntimeError) as error:
        return f"{name} cannot be read: {error}"
    return None


def _is_adopted(folder: Path, name: str, target: Path) -> bool:
    """Whether a link to weights is one that `adopt_checkpoint` made."""
    if not name.endswith(".safetensors"):
        return False
    try:
        links = read_json_object(folder / MANIFEST_NAME).get("links")
    except (OSError, ValueError):
        return False
    return isinstance(links, dict) and links.get(name) == str(target)


def adapter_problem(folder: Path, name: str | None = None) -> str | None:
    """What a folder with nothing but an adapter is, of which base, and the way out; None for any other folder.

    name: how the folder was named, if not by its path.
    """
    of_base, format_name = "a base that it does not name", "PEFT"
    if (folder / LORA_NAME).exists():
        # Its params.json is that of the base, and makes no checkpoint of it.
        if any(any(folder.glob(pattern)) for pattern in CHECKPOINT_WEIGHTS):
            return None
        format_name = LORA_NAME
    elif not (folder / ADAPTER_CONFIG_NAME).exists() or any((folder / name).exists() for name in CHECKPOINT_CONFIGS):
        return None
    else:
        with suppress(CheckpointError):
            of_base = f"the base {shown(read_adapter_base(folder))}"
    return (
        f"an adapter ({format_name}) of {of_base}, not a checkpoint; merge it with `mistral-large convert BASE "
        f"DESTINATION --adapter {name or folder}`, and give that destination; chat and serve take BASE with --adapter"
    )


def read_adapter_base(folder: Path) -> str | None:
    """The name of the checkpoint that the adapter of PEFT in a folder is for, or None if it holds no adapter.

    Raises:
        CheckpointError: its file cannot be read or names none.
    """
    if not (folder / ADAPTER_CONFIG_NAME).exists():
        return None
    if problem := file_problem(folder, ADAPTER_CONFIG_NAME):
        raise CheckpointError(f"{folder}: {problem}; it says what the adapter is for, save or download it again")
    try:
        base = read_json_object(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG_NAME}: {error}; save or download it again") from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder}: an adapter whose {ADAPTER_CONFIG_NAME} names no base_model_name_or_path; load the base model, "
            "then peft.PeftModel.from_pretrained(model, folder)"
        )
    return base


def json_or_problem(folder: Path, name: str) -> tuple[dict[str, Any], str | None]:
    """The object in a JSON file of a folder; or an empty one, and what keeps it from being read."""
    if problem := file_problem(folder, name):
        return {}, problem
    try:
        return read_json_object(folder / name), None
    except (OSError, ValueError) as error:
        return {}, f"{name}: {error}"


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: not an object, a key twice in one object, no regular file, or one of more than 100 MB.
        OSError: the file cannot be read.
    """
    # To open a pipe would wait for someone who writes.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON} bytes")
    return parse_json_object(path.read_bytes())


def parse_json_object(data: bytes) -> dict[str, Any]:
    """The object that JSON text says; a ValueError for anything else, and for a key twice in one object."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, not {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} twice in one object")
            seen.add(key)
    return members

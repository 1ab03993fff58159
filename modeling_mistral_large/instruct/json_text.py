"""JSON texts as the reference writes them into prompts, with errors that name the place."""

import dataclasses
import json
from collections.abc import ItemsView, KeysView, Mapping, Sequence, Set, ValuesView
from datetime import date, time
from decimal import Decimal
from enum import Enum
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, TypeGuard
from uuid import UUID

from mistral_large_conversion.vocabulary import SURROGATE
from modeling_mistral_large.errors import ConversationError

SHOWN_CHARACTERS = 100
# Digits that Python reads of a whole number.
LONGEST_NUMBER = 4300

_encode = json.JSONEncoder(ensure_ascii=False).encode


def write_json(value: Any, where: str) -> str:
    """Return the JSON text of a value in the prompt's form: spaces after `,` and `:`, no escapes for Unicode."""
    try:
        text = _encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversationError(f"{where}: {error}; only JSON values have a place in a prompt; convert it") from error
    return check_unicode(text, where)


def rewrite_json(text: str, where: str) -> str:
    """Return a JSON text in the prompt's form; any other text becomes a JSON string."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{where}: {error}; JSON must be readable by Python; shorten or quote it") from error
    return write_json(value, where)


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """Return a mapping, or the fields of a pydantic model, a dataclass, an attrs class or a named tuple, or None."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, type):
        return None
    if callable(dump := getattr(value, "model_dump", None)):
        # What an API calls a field is pydantic's alias.
        fields = dump(by_alias=True) if hasattr(value, "model_fields_set") else dump()
        return fields if isinstance(fields, Mapping) else None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "__attrs_attrs__"):
        return {field.name: getattr(value, field.name) for field in value.__attrs_attrs__}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    return None


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a value is a list of any kind, not a text and not an iterator that can be read only once."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def json_value(value: Any, where: str) -> Any:
    """Return a value as `json` can write it.

    value: besides JSON's own types, numbers and arrays of numpy, pandas and torch, dataclasses, pydantic and attrs
        models, enums, dates and times (ISO 8601), UUIDs, paths, tuples and sets (sorted), at every depth. A Decimal
        that no JSON number is equal to becomes text, any other such number is refused. NaN and infinity stay, as the
        reference writes them.

    Raises ConversationError for anything else, for keys that are equal as JSON, and for a value that holds itself.
    """
    try:
        return _json_value(value, where)
    except RecursionError as error:
        raise ConversationError(f"{where}: {error}; JSON has fewer levels, and an end; make it flatter") from error


def _json_value(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _json_value(value.value, where)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return _json_object(value, where)
    if is_list(value) or isinstance(value, KeysView | ValuesView | ItemsView):
        return [_json_value(item, where) for item in value]
    if isinstance(value, Set):
        return sorted((_json_value(item, where) for item in value), key=_sort_key)
    if isinstance(value, Decimal):
        return _json_decimal(value)
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "m":
        # numpy takes a duration for a whole number.
        raise _not_json(value, where, "a duration is no JSON value; convert it to a number with its unit")
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if number == value or value != value:
            return number
        raise _not_json(value, where, "no JSON number is equal to it; convert it to a float or text")
    if isinstance(value, date | time):
        # pandas' NaT is a date to Python, and unlike every other.
        return value.isoformat() if value == value else None
    if isinstance(value, UUID | PurePath):
        return str(value)
    if type(value).__name__ == "NAType":
        return None
    if hasattr(type(value), "columns") and hasattr(type(value), "iloc"):
        return _json_records(value, where)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return _json_array(value, where, kind)
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        try:
            fields = dump(mode="json")
        # A field of a type that pydantic does not know.
        except Exception:
            fields = dump()
        return _json_value(fields, where)
    if (fields := as_mapping(value)) is not None:
        return _json_object(fields, where)
    raise _not_json(value, where, "it is no JSON value; convert it to numbers, text, lists and objects of them")


def _json_object(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for given, item in value.items():
        key = _json_value(given, where)
        if not isinstance(key, str):
            if not isinstance(key, bool | int | float | None):
                raise _not_json(given, where, "a key of a JSON object is text; convert it")
            # As `json` writes it: 1 as "1", and None as "null".
            key = json.dumps(key)
        if key in written:
            raise ConversationError(f"{where}: two keys {show(key)}; a JSON object has one of each; rename one")
        written[key] = _json_value(item, where)
    return written


def _json_array(value: Any, where: str, kind: str) -> Any:
    """Return the items of an array, or the number that stands alone in one; of a Series by its index if it has one."""
    if kind == "V":
        raise _not_json(value, where, "its fields would lose their names; convert it to objects")
    try:
        # numpy gives times in nanoseconds as bare numbers.
        plain = _without_nat(value.astype(str).tolist()) if kind == "M" else value.tolist()
    # An array that holds no values, as torch has them.
    except Exception as error:
        raise _not_json(value, where, f"{error}; convert it to a list of numbers") from error
    if hasattr(value, "iloc") and not _is_numbered(value.index):
        if not value.index.is_unique:
            raise _not_json(value, where, "its index has a label twice, a JSON object each key once; take .tolist()")
        plain = dict(zip(value.index, plain, strict=True))
    return _json_value(plain, where)


def _json_records(frame: Any, where: str) -> list[Any]:
    """Return the rows of a DataFrame of pandas as objects."""
    if not _is_numbered(frame.index):
        raise _not_json(
            frame, where, "its index has no place in a list of rows; take .reset_index(), or .reset_index(drop=True)"
        )
    if not frame.columns.is_unique:
        raise _not_json(frame, where, "two columns have one name, a JSON object has each key once; rename one")
    columns = [_json_value(frame.iloc[:, number], where) for number in range(len(frame.columns))]
    rows = zip(*columns, strict=True) if columns else [()] * len(frame)
    return [_json_object(dict(zip(frame.columns, row, strict=True)), where) for row in rows]


def _is_numbered(index: Any) -> bool:
    """Whether an index of pandas says nothing but the number of each item."""
    return list(index.names) == [None] and index.tolist() == list(range(len(index)))


def _without_nat(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_without_nat(item) for item in plain]
    return None if plain == "NaT" else plain


def _json_decimal(value: Decimal) -> int | float | str:
    if not value.is_finite():
        return float("nan") if value.is_nan() else float(value)
    if int(value.as_tuple().exponent) >= 0 and value.adjusted() < LONGEST_NUMBER:
        return int(value)
    number = float(value)
    return number if Decimal(repr(number)) == value else str(value)


def _sort_key(value: Any) -> tuple[bool, Any, str]:
    is_number = isinstance(value, int | float)
    return not is_number, value if is_number else 0, json.dumps(value)


def _not_json(value: Any, where: str, rule: str) -> ConversationError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return ConversationError(f"{where}: {kind} {show(value)}; {rule}")


def check_unicode(text: str, where: str) -> str:
    """Return the text, or raise if it cannot be encoded."""
    if not text.isascii() and (found := SURROGATE.search(text)):
        raise ConversationError(
            f"{where}: lone surrogate {found[0]!r} at character {found.start()}; text must be Unicode; "
            "decode it again or replace the character"
        )
    return text


def show(value: Any) -> str:
    """Return a value as an error can quote it: in one line that is not too long."""
    return shorten(repr(value))


def shorten(text: str) -> str:
    """Return a text in one line that is not too long for an error."""
    text = text.replace("\n", " ")
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"

"""Schemas of structured output whose objects hold the properties that they name, and no others."""

from typing import Any

# A schema of which every part must hold at once, or but one: there, a part that is closed shuts out what others name.
COMBINING = frozenset({"$dynamicRef", "allOf", "dependentSchemas", "if", "not", "oneOf", "unevaluatedProperties"})
# Next to one of these, `properties` need not name everything that an object may hold.
MORE_PROPERTIES = frozenset({"$ref", "additionalProperties", "allOf", "anyOf", "oneOf", "patternProperties"})
# Values, not schemas.
DATA = frozenset({"const", "default", "enum", "examples"})


def close_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object without further properties, where it names some and says nothing of others."""
    properties = schema.get("properties")
    if (
        not isinstance(properties, dict)
        or MORE_PROPERTIES & schema.keys()
        or not {*schema.get("required", ())} <= {*properties}
    ):
        return schema
    return {**schema, "additionalProperties": False}


def close_objects(schema: Any) -> Any:
    """Return a schema in which each object is closed as by `close_object`; what is valid under it, is under the given.

    Libraries that derive schemas from classes leave `additionalProperties` out and do not expect more; a model that may
    write more properties can go on without end. Unchanged is a schema that combines others.
    """
    return schema if _combines(schema) else _close(schema)


def _combines(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, dict):
        return False
    if COMBINING & schema.keys() or ({"properties", "required"} & schema.keys() and {"$ref", "anyOf"} & schema.keys()):
        return True
    return any(_combines(inner) for keyword, inner in schema.items() if keyword not in DATA)


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {}
    for keyword, inner in schema.items():
        if keyword in ("$defs", "definitions", "patternProperties", "properties") and isinstance(inner, dict):
            closed[keyword] = {name: _close(part) for name, part in inner.items()}
        else:
            closed[keyword] = inner if keyword in DATA else _close(inner)
    return close_object(closed) if schema.get("properties") else closed

"""Objects of a schema that say nothing of further properties have none."""

import json
from typing import Any

import jsonschema
import pytest

from modeling_mistral_large.generation.closed_objects import close_objects
from modeling_mistral_large.generation.structured_output import answer_grammar

NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED = {**NAMED, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (NAMED, CLOSED),
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "additionalProperties": False}),
        ({"type": "array", "items": NAMED}, {"type": "array", "items": CLOSED}),
        (
            {"properties": {"b": NAMED, "properties": {}}},
            {"properties": {"b": CLOSED, "properties": {}}, "additionalProperties": False},
        ),
        ({"anyOf": [NAMED, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/N", "$defs": {"N": NAMED}}, {"$ref": "#/$defs/N", "$defs": {"N": CLOSED}}),
        ({"additionalProperties": NAMED}, {"additionalProperties": CLOSED}),
    ],
)
def test_an_object_has_the_properties_that_it_names(schema: dict[str, Any], closed: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert close_objects(schema) == closed
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {"type": "object", "properties": {}},
        {**NAMED, "additionalProperties": {"type": "string"}},
        {**NAMED, "patternProperties": {"^x": {}}},
        {**NAMED, "required": ["a", "b"]},
        {"allOf": [NAMED, {"properties": {"b": {}}}]},
        {"oneOf": [NAMED, {"type": "null"}]},
        {**NAMED, "anyOf": [{"properties": {"b": {}}}, {"required": ["c"]}]},
        {"required": ["c"], "anyOf": [NAMED]},
        {"$ref": "#/$defs/N", "required": ["b"], "$defs": {"N": NAMED}},
        {"$defs": {"N": NAMED, "M": {"allOf": [{"$ref": "#/$defs/N"}]}}, "$ref": "#/$defs/M"},
        {"const": NAMED},
        {"enum": [NAMED]},
        {"type": "array", "items": NAMED, "not": {"maxItems": 3}},
    ],
)
def test_what_speaks_of_more_or_combines_stays(schema: Any) -> None:
    assert close_objects(schema) == schema


def test_the_grammar_of_a_response_closes_objects() -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"items": NAMED}}}
    grammar = answer_grammar(response_format=response_format)
    assert '"additionalProperties": false' in grammar
    jsonschema.validate([{"a": 1, "b": 2}], {"items": NAMED})

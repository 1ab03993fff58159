"""Random JSON schemas whose values are short, so that a model of any kind comes to their end."""

import random
from typing import Any

WORDS = ("city", "Paris", "is_sunny", "naïve", "日本", 'a "b"', "x-y", "celsius", "", "0", "a\\b", "</s>", "[INST]")
MOST_DEPTH = 3


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a schema of any kind of value."""
    kinds = ["boolean", "null", "integer", "string", "enum"]
    if depth < MOST_DEPTH:
        kinds += ["object", "object", "array", "anyOf"]
    kind = rng.choice(kinds)
    if kind == "object":
        return random_object(rng, depth)
    if kind == "array":
        least = rng.randrange(2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "enum":
        return {"enum": rng.sample([*WORDS, 0, -7, True, None], rng.randrange(1, 5))}
    if kind == "integer":
        least = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(100)}
    return {"type": "string", "maxLength": rng.randrange(1, 8)} if kind == "string" else {"type": kind}


def random_object(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a schema of an object, as the parameters of a tool are one."""
    names = rng.sample([word for word in WORDS if word], rng.randrange(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
    }
    return schema | ({"additionalProperties": False} if rng.randrange(2) else {})

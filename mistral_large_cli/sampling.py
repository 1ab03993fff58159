"""How `chat` chooses tokens: the options of the command, and what `/set` changes."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from mistral_large_conversion.errors import SettingError

# Logits divided by less overflow.
SMALLEST_TEMPERATURE = 0.001
SEEDS = range(-(2**63), 2**63)
# Of sampled tokens only.
NEEDS_SAMPLING = ("top_p", "top_k", "min_p")
# What every response has.
ALWAYS = ("max_new_tokens", "temperature")
# What `/set` takes for nothing.
UNSET = ("off", "none")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at a temperature of 0.

    top_p, min_p: probabilities. top_k: tokens. repetition_penalty: as transformers has it.
    seed: also of the ids of tool calls that the model leaves without one.
    stop: texts that end a response, which does not hold them.

    Raises:
        SettingError: a value out of its range, or one without effect.
    """

    max_new_tokens: int
    temperature: float
    top_p: float | None
    seed: int | None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens {self.max_new_tokens}: must be at least 1; a response has tokens")
        if not (self.temperature == 0 or SMALLEST_TEMPERATURE <= self.temperature < math.inf):
            raise SettingError(
                f"temperature {self.temperature}: must be finite, and 0 or at least {SMALLEST_TEMPERATURE}; 0 takes "
                "the most likely token each time"
            )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                nothing = 1 if name == "top_p" else 0
                raise SettingError(f"{name} {value}: must be a probability, from 0 to 1; leave it out for {nothing}")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"top_k {self.top_k}: must be at least 1; leave it out for all tokens")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise SettingError(
                f"repetition_penalty {self.repetition_penalty}: must be finite and more than 0; leave it out for 1"
            )
        if self.seed is not None and self.seed not in SEEDS:
            raise SettingError(f"seed {self.seed}: must fit 64 bits; take another one")
        if "" in self.stop:
            raise SettingError("stop: an empty text ends nothing; leave it out")
        for name in NEEDS_SAMPLING:
            if self.temperature == 0 and getattr(self, name) is not None:
                raise SettingError(
                    f"{name}: has no effect at a temperature of 0, which takes the most likely token each time; leave "
                    "one of the two out"
                )

    def options(self) -> dict[str, Any]:
        """Return options of `generate`, without the seed."""
        if self.temperature == 0:
            chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            chosen = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "top_k": self.top_k or 0,
            }
        chosen |= {"min_p": self.min_p, "max_new_tokens": self.max_new_tokens}
        if self.repetition_penalty is not None:
            chosen["repetition_penalty"] = self.repetition_penalty
        if self.stop:
            chosen["stop_strings"] = list(self.stop)
        return chosen

    def changed(self, name: str, text: str) -> "Sampling":
        """Return these settings with one as `/set` has it; `off` is that of an option that is left out.

        Raises:
            SettingError: no such setting, no such value, or one without effect.
        """
        if name not in NAMES:
            raise SettingError(f"/set {name}: no such setting; they are {', '.join(NAMES)}; name one")
        if text.lower() in UNSET:
            if name in ALWAYS:
                raise SettingError(f"/set {name} {text}: a response always has one; give a number")
            nothing: Any = () if name == "stop" else None
            return replace(self, **{name: nothing})
        read, kind = READERS[name]
        try:
            value = read(text)
        except ValueError as error:
            or_off = "" if name in ALWAYS else ", or off"
            raise SettingError(f"/set {name} {text}: no {kind}; give one{or_off}") from error
        return replace(self, **{name: value})

    def lines(self) -> list[str]:
        """Return a line for each setting, as `/set` lists them."""
        width = max(map(len, NAMES)) + 2
        return [f"{name:<{width}}{_shown(getattr(self, name))}" for name in NAMES]


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "off"
    return ", ".join(map(json.dumps, value)) if isinstance(value, tuple) else str(value)


def _texts(text: str) -> tuple[str, ...]:
    """Return the stop strings of a text: itself, or what it is in JSON, for line ends and for several."""
    if not text.startswith(("[", '"')):
        return (text,)
    try:
        value = json.loads(text)
    except ValueError:
        return (text,)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in texts):
        raise ValueError(text)
    return tuple(texts)


READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_new_tokens": (int, "whole number"),
    "temperature": (float, "number"),
    "top_p": (float, "number"),
    "top_k": (int, "whole number"),
    "min_p": (float, "number"),
    "repetition_penalty": (float, "number"),
    "seed": (int, "whole number"),
    "stop": (_texts, "list of texts"),
}
NAMES = tuple(READERS)
assert set(NAMES) == {field.name for field in fields(Sampling)}

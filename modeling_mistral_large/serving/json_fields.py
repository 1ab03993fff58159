"""The JSON of requests, read strictly: values of another type or out of range are the client's mistake, by name."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from modeling_mistral_large.errors import ConversationError, MistralLargeError, SchemaError, SettingError

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")

# A schema that cannot be kept to may be found out only while the response is generated.
CLIENTS_MISTAKES = (ConversationError, SchemaError, SettingError)
# A prompt of 131,072 tokens has less than a megabyte of text.
MOST_BODY_BYTES = 32 * 2**20


class RequestError(MistralLargeError, ValueError):
    """A request that the server cannot serve as it is meant.

    parameter: the one it is about.
    status: the HTTP status of the response.
    code: OpenAI's word for the reason, where there is one.
    """

    def __init__(self, message: str, parameter: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.parameter = parameter
        self.status = status
        self.code = code


def error_body(status: int, message: str, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in the shape of OpenAI's API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def failure_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body of the response to a request that has met an error."""
    if isinstance(error, RequestError):
        return error.status, error_body(error.status, str(error), error.parameter, error.code)
    if isinstance(error, CLIENTS_MISTAKES):
        return 400, error_body(400, str(error))
    if isinstance(error, MistralLargeError):
        return 500, error_body(500, str(error))
    message = f"{type(error).__name__}: the response could not be generated; the server's log has more"
    return 500, error_body(500, message)


async def read_body(request: "Request", what: str) -> bytes:
    """Return the body of a request, which errors call `what`.

    Raises:
        RequestError: it is too long.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise RequestError(f"{what}: more than {MOST_BODY_BYTES:,} bytes; send less", status=413)
    return bytes(body)


def read_json_object(body: bytes) -> dict[str, Any]:
    """Return the object that the body of a request is; parameters that are null are left out.

    Raises:
        RequestError: no JSON (RFC 8259: no NaN, valid Unicode), or no object.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            # Half of a surrogate pair is no character, and no response could repeat it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise RequestError("the body: nested too deeply; make it flatter") from error
    except ValueError as error:
        raise RequestError(f"the body: no JSON ({error}); send a JSON object in UTF-8") from error
    if not isinstance(value, dict):
        raise RequestError("the body: no JSON object; send an object with the parameters of the request")
    return {name: each for name, each in value.items() if each is not None}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class Fields:
    """The parameters of a request, or of an object in it, whose name then begins the name of each."""

    def __init__(self, given: Mapping[str, Any], prefix: str = "") -> None:
        self.given = {name: value for name, value in given.items() if value is not None}
        self._prefix = prefix

    def name(self, name: str) -> str:
        """Return how a parameter is called in errors."""
        return f"{self._prefix}.{name}" if self._prefix else name

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raise for a parameter that is not what the rule says."""
        raise RequestError(f"{self.name(name)}: must be {rule}; correct it", self.name(name))

    def of_type(self, name: str, kind: type[T] | tuple[type[T], ...], rule: str) -> T | None:
        """Return a parameter of a type, None where it is absent."""
        value = self.given.get(name)
        if value is not None and not isinstance(value, kind):
            self.refuse(name, rule)
        return value

    def text(self, name: str) -> str | None:
        """Return a string."""
        return self.of_type(name, str, "a string")

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.of_type(name, bool, "true or false")
        return default if value is None else value

    def array(self, name: str, rule: str) -> list[Any] | None:
        """Return a JSON array."""
        return self.of_type(name, list, rule)

    def mapping(self, name: str, rule: str = "an object") -> dict[str, Any] | None:
        """Return a JSON object."""
        return self.of_type(name, dict, rule)

    def whole(self, name: str, smallest: int, largest: int) -> int | None:
        """Return a whole number of a range."""
        value = self.given.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
            self.refuse(name, f"a whole number from {smallest} to {largest}")
        return value

    def number(self, name: str, smallest: float, largest: float, *, or_zero: bool = False) -> float | None:
        """Return a number of a range, which may also be 0 with `or_zero`."""
        value = self.given.get(name)
        if value is None:
            return None
        fits = is_number(value) and (smallest <= value <= largest or (or_zero and value == 0))
        if not fits:
            self.refuse(name, f"{'0 or ' if or_zero else ''}a number from {smallest:g} to {largest:g}")
        return float(value)

    def check_names(self, obeyed: Iterable[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise for a parameter that is unknown, or that this server does not have and whose value asks for something.

        neutral: parameters that this server does not have, and the values that ask for nothing.
        """
        known = {*obeyed, *neutral}
        for name in self.given:
            if name not in known:
                raise RequestError(
                    f"{self.name(name)}: no such parameter here; it would have no effect; leave it out", self.name(name)
                )
        for name, values in neutral.items():
            value = self.given.get(name)
            # 0, 0.0 and false are equal to Python.
            if value is not None and not any(
                value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
            ):
                raise RequestError(f"{self.name(name)}: this server cannot obey it; leave it out", self.name(name))


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)

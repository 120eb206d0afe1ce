"""The fields of a request's JSON, each taken by name; what nobody takes is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class RequestError(ValueError):
    """A request that cannot be answered. `param` is the field, `status` HTTP's code for it."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's JSON for it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Fields:
    """A JSON object whose fields are taken one by one. null is as if a field were not there."""

    def __init__(self, body: Any) -> None:
        """Raises RequestError if it is none."""
        if not isinstance(body, dict):
            raise RequestError("the body is not a JSON object")
        self._left: dict[str, Any] = {k: v for k, v in body.items() if v is not None}

    def take(self, name: str) -> Any:
        """The value, whatever it is; None if there is none."""
        return self._left.pop(name, None)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A finite number within bounds."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            raise RequestError(f"{name}: a number was expected, not {shown(value)}", param=name)
        if not least <= value <= most:
            raise RequestError(f"{name}: {value} is not from {least:g} to {most:g}", param=name)
        return float(value)

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int:
            raise RequestError(
                f"{name}: a whole number was expected, not {shown(value)}", param=name
            )
        if not least <= value <= most:
            raise RequestError(f"{name}: {value} is not from {least} to {most}", param=name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise RequestError(
                f"{name}: true or false was expected, not {shown(value)}", param=name
            )
        return value

    def only(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """A field that may be given with a value that changes nothing."""
        value = self.take(name)
        if value is not None and value not in allowed:
            raise RequestError(f"{name}: {shown(value)} is not supported; {why}", param=name)

    def ignore(self, *names: str) -> None:
        """Fields that change no answer."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Raises RequestError for the first field that nobody took."""
        for name in self._left:
            raise RequestError(
                f"{shown(name)} is not a field that layerpack knows; leave it out", param=str(name)
            )


def object_of(value: Any, name: str) -> Mapping[str, Any]:
    """The value as a JSON object. Raises RequestError."""
    if not isinstance(value, dict):
        raise RequestError(f"{name}: an object was expected, not {shown(value)}", param=name)
    return value


def shown(value: Any) -> str:
    """A value of somebody else's, for a message: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

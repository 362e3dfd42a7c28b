"""Errors in the shape that OpenAI's clients know: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class ApiError(Exception):
    """An answer that is an error. param: the field of the request that is to blame. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """The JSON value of the answer. Lone surrogates, which JSON can carry and UTF-8 cannot, are replaced."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {k: v if v is None else v.encode("utf-8", "replace").decode() for k, v in told.items()}}


def unsupported(param: str, message: str) -> ApiError:
    """400 for a parameter that is understood and not offered: never silently ignored."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def invalid_request(errors: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> ApiError:
    """The first of pydantic's errors. `fields` are the names that may stand in a path: pydantic adds names of types to it."""
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    known = set(fields)
    path = [part for part in first["loc"] if part != "body"]
    kept = [part for at, part in enumerate(path) if isinstance(part, int) or part in known or at == len(path) - 1 == 0]
    if first["type"] == "extra_forbidden" and (not kept or kept[-1] != path[-1]):
        kept.append(path[-1])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in kept).lstrip(".") or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: `{param}`.", param=param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON ({first.get('ctx', {}).get('error', first['msg'])}).", code="invalid_json")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: `{param}`." if param else "The body is missing.", param=param)
    code = "unsupported_parameter" if first["type"] == "unsupported" else "invalid_value"
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"`{param}`: {message}" if param else message, param=param, code=code)

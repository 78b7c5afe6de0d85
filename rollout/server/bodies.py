"""Request bodies: read within limits, decoded into typed structs, and every mistake answered with 400."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
from starlette.requests import ClientDisconnect, Request

from ..hints import did_you_mean
from .replies import HttpError

T = TypeVar("T", bound="Body")


class Body(msgspec.Struct, kw_only=True):
    """Base of request bodies; what is unknown is refused, unless a route hands it on."""


class AnyBody(Body):
    """Whatever is sent."""


async def read_bytes(request: Request, patience_s: float) -> bytes:
    """The whole body; 408 when a client takes longer than `patience_s` to send it."""
    try:
        async with asyncio.timeout(patience_s):
            return await request.body()
    except TimeoutError:
        raise HttpError(
            408, f"the body did not come within {patience_s:g} s; send it faster"
        ) from None
    except ClientDisconnect:
        raise HttpError(400, "the client went away before its body had come") from None


def parse_object(content: bytes, *, is_msgpack: bool = False) -> dict[str, Any]:
    """The top-level object of a JSON (or MessagePack) body; an empty body is an empty object."""
    if not content.strip():
        return {}
    try:
        decode = msgspec.msgpack.decode if is_msgpack else msgspec.json.decode
        found = decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        kind = "MessagePack" if is_msgpack else "JSON"
        raise HttpError(400, f"the body is no {kind}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise HttpError(400, f"the body: got {type(found).__name__}, expected an object")
    return found


def convert(
    cls: type[T], values: Mapping[str, Any], *, is_msgpack: bool = False
) -> tuple[T, dict[str, Any]]:
    """The fields of `cls` in `values`, checked, and what else there is. A null stands for the default."""
    known = {info.encode_name for info in msgspec.structs.fields(cls)}
    own = {name: value for name, value in values.items() if name in known and value is not None}
    rest = {name: value for name, value in values.items() if name not in known}
    try:  # Bytes are bytes in MessagePack, and base64 in JSON.
        return msgspec.convert(own, cls, builtin_types=(bytes,) if is_msgpack else ()), rest
    except msgspec.ValidationError as error:
        raise HttpError(400, f"{error}{_allowed(cls, str(error))}") from None


def _allowed(cls: type[Body], error: str) -> str:
    """Of a field that takes one of a few words, those words."""
    named = re.search(r"`\$\.(\w+)(?:\[\d+\]|\[\.\.\.\])?`", error)
    if named is None or not error.startswith("Invalid enum value"):
        return ""
    kind = {info.encode_name: info.type for info in msgspec.structs.fields(cls)}[named[1]]
    words = dict.fromkeys(_words(kind))
    return f": expected one of {', '.join(map(repr, words))}"


def _words(kind: Any) -> tuple[Any, ...]:
    """Those of a `Literal`, also inside of unions and lists."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for each in get_args(kind) for word in _words(each))


def only(cls: type[T], values: Mapping[str, Any]) -> T:
    """`convert` for routes that hand nothing on: what `cls` does not have is refused."""
    body, rest = convert(cls, values)
    if rest:
        refuse_unknown(cls, rest)
    return body


def refuse_unknown(cls: type[Body], rest: Mapping[str, Any]) -> None:
    """400 for the first field that no one knows, with the name that was probably meant; none: nothing happens."""
    if not rest:
        return
    known = [info.encode_name for info in msgspec.structs.fields(cls)]
    name = next(iter(rest))
    if not known:
        raise HttpError(400, f"got a field {name!r}, expected none: nothing can be chosen here")
    raise HttpError(400, f"got an unknown field {name!r}; {did_you_mean(name, known)}")

"""Canonical JSON for what the database keeps as text: aggregates, event arguments, call arguments.

Promises that equal values have equal text, that integers of any size survive (never a float, never a NUMERIC column),
and that decoding gives back what was encoded. Byte strings are hex under a tag, so that they cannot be confused with
addresses; sequences come back as tuples.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, Final, TypeVar, cast

_BYTES_TAG: Final = "$bytes"
_DECODED: Final = 8_192
_T = TypeVar("_T")


class DocumentError(ValueError):
    """A stored document does not fit this release. Migrate the database, or rebuild it from the chain."""


def encode_values(values: Any) -> str:
    """Text of plain values: None, bool, int, str, bytes, sequences (named tuples too), mappings with string keys."""
    return json.dumps(_to_json(values), sort_keys=True, separators=(",", ":"))


def decode_values(text: str) -> Any:
    """The inverse of `encode_values`; sequences are tuples."""
    return _from_json(json.loads(text))


def encode_record(record: Any) -> str:
    """Text of a frozen dataclass."""
    return json.dumps(_record_to_json(record), sort_keys=True, separators=(",", ":"))


def decode_record(record_type: type[_T], text: str) -> _T:
    """The dataclass behind `text`; DocumentError if it is of another release."""
    return cast(_T, _decoded(cast(Any, record_type), text))


@lru_cache(maxsize=_DECODED)
def _decoded(record_type: type, text: str) -> Any:
    """Records are frozen, and those that stand still are read again and again."""
    return _typed(record_type, json.loads(text))


def _to_json(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case bytes() | bytearray():
            return {_BYTES_TAG: bytes(value).hex()}
        case tuple() | list():
            return [_to_json(item) for item in value]
        case Mapping():
            return {str(key): _to_json(item) for key, item in value.items()}
        case _:
            raise DocumentError(f"{type(value).__name__} cannot be stored")


def _from_json(value: Any) -> Any:
    match value:
        case {"$bytes": str(text)} if len(value) == 1:
            return bytes.fromhex(text)
        case dict():
            return {key: _from_json(item) for key, item in value.items()}
        case list():
            return tuple(_from_json(item) for item in value)
        case _:
            return value


def _record_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _record_to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_record_to_json(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value


@lru_cache(maxsize=64)
def _field_types(record_type: type) -> dict[str, Any]:
    return typing.get_type_hints(record_type)


def _fits(record_type: Any, names: set[str]) -> bool:
    """Whether a stored record has the fields of this release; those with a default may be younger than it."""
    fields = dataclasses.fields(record_type)
    required = {
        item.name
        for item in fields
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    return required <= names <= {item.name for item in fields}


def _typed(expected: Any, value: Any) -> Any:
    expected = getattr(expected, "__supertype__", expected)
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        inner = [item for item in typing.get_args(expected) if item is not type(None)]
        return None if value is None else _typed(inner[0], value)
    if origin is tuple:
        arguments = typing.get_args(expected)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_typed(kind, item) for kind, item in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(expected):
        hints = _field_types(cast(type, expected))
        if not isinstance(value, dict) or not _fits(expected, set(value)):
            raise DocumentError(
                f"a stored {getattr(expected, '__name__', expected)} has other fields than this release: "
                "rebuild the database"
            )
        return cast(Any, expected)(**{name: _typed(hints[name], item) for name, item in value.items()})
    if expected is bytes:
        return bytes.fromhex(value)
    if isinstance(expected, type) and issubclass(expected, Enum):
        return expected(value)
    return value

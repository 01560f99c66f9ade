"""What is thrown at the surfaces: messages of every RPC, bodies of every route, arguments of every command, bytes.

Strategies of hypothesis, made from the descriptors, schemas and commands themselves, so that a new field is tried the
day it is there. Pure but for reading what is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

MAXIMUM_DEPTH: Final = 4
_INTEGERS: Final = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
}
# Lengths that fields have, one off, and others.
_BYTES: Final = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.sampled_from([b"", bytes(32), b"\xff" * 32, bytes(20), b"\x01" * 65]),
    st.binary(max_size=80),
)


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Messages of a type, any fields set, any lengths, enumerations beyond their values."""
    kind = GetMessageClass(descriptor)

    @st.composite
    def message(draw: Any) -> Message:
        made = kind()
        for field in descriptor.fields:
            if not draw(st.booleans()) or (field.message_type is not None and depth >= MAXIMUM_DEPTH):
                continue
            if field.is_repeated:
                values = draw(st.lists(_value(field, depth), max_size=3))
                if field.message_type is not None:
                    for value in values:
                        getattr(made, field.name).add().CopyFrom(value)
                else:
                    getattr(made, field.name).extend(values)
            elif field.message_type is not None:
                getattr(made, field.name).CopyFrom(draw(_value(field, depth)))
            else:
                setattr(made, field.name, draw(_value(field, depth)))
        return made

    return message()


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    match field.type:
        case FieldDescriptor.TYPE_MESSAGE:
            return messages(field.message_type, depth + 1)
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_STRING:
            return st.text(max_size=60)
        case FieldDescriptor.TYPE_BYTES:
            return _BYTES
        case FieldDescriptor.TYPE_ENUM:
            return st.integers(0, 2**31 - 1) | st.integers(0, len(field.enum_type.values))
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return st.floats(width=32)
        case other:
            low, high = _INTEGERS[other]
            return st.integers(low, high) | st.sampled_from([0, 1, high])


def mutated(valid: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes that were good: cut, doubled, with bytes changed, inserted and taken out; and bytes that never were."""

    @st.composite
    def changed(draw: Any) -> bytes:
        data = bytearray(draw(st.sampled_from(valid)))
        for _ in range(draw(st.integers(1, 6))):
            place = draw(st.integers(0, max(0, len(data) - 1)))
            match draw(st.integers(0, 5)):
                case 0 if data:
                    data[place] = draw(st.integers(0, 255))
                case 1:
                    data[place:place] = draw(st.binary(max_size=12))
                case 2:
                    del data[place : place + draw(st.integers(1, 40))]
                case 3:
                    data = data[:place]
                case 4 if data:
                    data[place] ^= 1 << draw(st.integers(0, 7))
                case _:
                    data[place:place] = draw(st.sampled_from(_TOKENS))
        return bytes(data)

    return st.one_of(changed(), changed(), st.binary(max_size=200))


# What decoders of JSON, of numbers and of text stumble over.
_TOKENS: Final = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"Infinity", b"[[[[[[[[", b'{"":{', b'"\\ud800"', b"\xff\xfe", b"0x",
    b"999999999999999999999999999999999999999999", b"[]", b"{}", b'""', b",", b"\x00", b"1.5",
)  # fmt: skip


def arguments(command: Any, path: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """Arguments of a command: its own options and unknown ones, with values that do and do not fit."""
    names = [name for parameter in command.params for name in parameter.opts if name.startswith("-")]
    values = st.one_of(
        st.text(max_size=30),
        st.sampled_from(["", "-", "--", "0", "-1", "1" * 90, "0x" + "ab" * 32, "/nonexistent", "http://127.0.0.1:1",
                         "127.0.0.1:0", "sqlite:////nonexistent/x", "\x00", "é" * 20, "{}", "1.5", "nan"]),
    )  # fmt: skip
    option = st.tuples(st.sampled_from([*names, "--nothing"]), values).map(list)
    flags = st.sampled_from([*names, "--help", "--json"]).map(lambda name: [name])
    parts = st.lists(st.one_of(option, option, flags, values.map(lambda value: [value])), max_size=6)
    return parts.map(lambda found: [*path, *(item for part in found for item in part)])


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group. By what it has: Typer brings a click of its own."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def chat_bodies(model: str) -> st.SearchStrategy[Any]:
    """Requests that are nearly right: the model is there, and one field or two are anything."""
    anything: Any = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
    fields = st.sampled_from([
        "messages", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options", "max_tokens",
        "max_completion_tokens", "logit_bias", "tools", "response_format", "user", "prompt", "echo", "suffix",
        "best_of", "logprobs", "metadata", "modalities", "unheard_of",
    ])  # fmt: skip
    good = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
    return st.dictionaries(fields, anything, min_size=1, max_size=3).map(lambda wrong: {**good, **wrong})


Decoder = tuple[str, Callable[[bytes], object], Sequence[bytes], tuple[type[Exception], ...]]
"""A name, what reads bytes, bytes that it reads, and what it may raise for others."""

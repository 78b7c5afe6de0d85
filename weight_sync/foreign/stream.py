"""A reader of pickle streams that makes inert values only.

A pickle is a program: its opcodes push values, look up objects by name and call them. This reader runs a small part of
that language over values of its own. A name becomes a `Global` if it is on the caller's list, a call becomes a `Node`
that says which global was to be called with what. Nothing is imported, looked up or called, and the first opcode or
name that is not on a list ends the reading.

Memory is bounded by the number of opcodes, of values on the stack and of nested containers. A container that is part
of another one cannot grow any more, so values are trees that share branches, and never cycles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import PayloadRefused

MAX_OPCODES = 4_000_000
"""In one payload, with those nested in it; a tensor takes about sixty. Each takes at most about 100 bytes of memory."""
MAX_STACK = 1 << 14
"""Values; senders append their items a thousand at a time."""
MAX_MARKS = 64
MAX_DEPTH = 16
"""Containers in containers; a tensor takes six."""
MAX_TEXT_BYTES = 4096
"""Of one string: a tensor's name, or where a file is."""
MAX_INTEGER_BYTES = 8


Role = Literal["function", "class", "value"]


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a payload may mention, as a mere word."""

    name: str
    """What this reader calls it, whatever module it came from."""
    role: Role
    """Whether it may be called, be made an instance of, or only be passed on."""


@dataclass(slots=True, eq=False)
class Node:
    """A container, or a call that nobody makes. Equal to itself alone, as what the sender referred to twice is."""

    kind: Literal["tuple", "list", "dict", "call", "instance"]
    items: list[Value]
    """Its items; a mapping's keys and values in turn; a call's arguments; of an instance, its state if it has one."""
    of: Global | None = None
    """What would be called."""
    depth: int = 1
    """How many containers there are, one in the other, with this one."""
    used: bool = False
    """It is part of another one, or was called with, and stays as it is."""


Value = str | bytes | int | bool | None | Global | Node


class Budget:
    """How many opcodes may still be read, over a payload and all those inside it."""

    def __init__(self, opcodes: int = MAX_OPCODES) -> None:
        self.left = opcodes


def read_stream(data: bytes, known: Callable[[str, str], Global | None], budget: Budget) -> Value:
    """The value that `data` describes. `known`: the global of a module and a name, None where there is none.

    Raises `PayloadRefused`, naming the opcode or the global, and its byte.
    """
    return _Reader(data, known, budget).run()


class _Reader:
    def __init__(
        self, data: bytes, known: Callable[[str, str], Global | None], budget: Budget
    ) -> None:
        self._data = data
        self._known = known
        self._budget = budget
        self._at = 0
        self._opcode_at = 0
        self._stack: list[Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, Value] = {}

    def run(self) -> Value:
        data, size = self._data, len(self._data)
        while self._at < size:
            self._opcode_at = self._at
            opcode = data[self._at]
            self._at += 1
            if opcode == _STOP:
                return self._end()
            self._budget.left -= 1
            if self._budget.left < 0:
                raise self._refusal(f"more than {MAX_OPCODES} opcodes")
            step = _STEPS.get(opcode)
            if step is None:
                raise self._refusal(f"the opcode {_opcode_name(opcode)}")
            step(self)
            if len(self._stack) > MAX_STACK:
                raise self._refusal(f"more than {MAX_STACK} values at once")
        raise self._refusal("a payload that is cut short, without its end")

    def _end(self) -> Value:
        if self._at != len(self._data):
            raise self._refusal(f"{len(self._data) - self._at} bytes behind the end")
        if len(self._stack) != 1 or self._marks:
            raise self._refusal(f"{len(self._stack)} values at the end, expected one,")
        return self._stack[0]

    # ---- bytes and values --------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise self._refusal(
                f"{count} bytes where {len(self._data) - self._at} are left: cut short, or a false size"
            )
        part = self._data[self._at : end]
        self._at = end
        return part

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + MAX_TEXT_BYTES)
        if end < 0:
            raise self._refusal("a name without an end")
        return self._text(self._take(end + 1 - self._at)[:-1])

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._refusal("text that is not UTF-8") from None

    def _pop(self) -> Value:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor:
            raise self._refusal("an opcode without the value that it needs")
        return self._stack.pop()

    def _top(self) -> Value:
        value = self._pop()
        self._stack.append(value)
        return value

    def _mark(self) -> None:
        if len(self._marks) >= MAX_MARKS:
            raise self._refusal(f"more than {MAX_MARKS} marks in each other")
        self._marks.append(len(self._stack))

    def _pop_mark(self) -> list[Value]:
        if not self._marks:
            raise self._refusal("an opcode without the mark that it needs")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _put(self, node: Node, values: list[Value]) -> None:
        """Make `values` part of `node`."""
        deepest = node.depth
        for value in values:
            if isinstance(value, Node):
                value.used = True
                deepest = max(deepest, value.depth + 1)
        if node.used:
            raise self._refusal("a container that grows after it was used")
        if deepest > MAX_DEPTH:
            raise self._refusal(f"more than {MAX_DEPTH} containers in each other")
        node.items.extend(values)
        node.depth = deepest

    def _made(self, kind: Literal["tuple", "list", "dict"], values: list[Value]) -> None:
        node = Node(kind, [])
        self._put(node, values)
        self._stack.append(node)

    def _tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._made("tuple", values[::-1])

    def _container(self, kind: Literal["list", "dict"]) -> Node:
        node = self._top()
        if not isinstance(node, Node) or node.kind != kind:
            raise self._refusal(f"items for what is no {kind}")
        return node

    def _add(self, kind: Literal["list", "dict"], values: list[Value]) -> None:
        node = self._container(kind)
        if kind == "dict" and len(values) % 2:
            raise self._refusal("a key without its value")
        self._put(node, values)

    # ---- names, calls and instances ----------------------------------------------------------------------------------

    def _find(self, module: str, name: str) -> None:
        found = self._known(module, name)
        if found is None:
            raise self._refusal(f"the global {_short(module)}.{_short(name)}")
        self._stack.append(found)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._refusal("a global whose name is not text")
        self._find(module, name)

    def _call(self, role: Literal["function", "class"]) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, Global):
            raise self._refusal("a call of what is no global")
        if called.role != role:
            raise self._refusal(f"a call of the global {called.name}")
        if not isinstance(arguments, Node) or arguments.kind != "tuple":
            raise self._refusal(f"a call of {called.name} without a tuple of arguments")
        if role == "class" and arguments.items:
            raise self._refusal(f"an instance of {called.name} with arguments")
        node = Node("call" if role == "function" else "instance", [], called)
        self._put(node, list(arguments.items))
        self._stack.append(node)

    def _build(self) -> None:
        state, node = self._pop(), self._top()
        if not isinstance(node, Node) or node.kind != "instance" or node.items:
            raise self._refusal("a state for what takes none")
        if not isinstance(state, Node) or state.kind != "dict":
            raise self._refusal("a state that is no dict")
        self._put(node, [state])

    # ---- memo and framing --------------------------------------------------------------------------------------------

    def _remember(self, index: int) -> None:
        self._memo[index] = self._top()

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise self._refusal(f"a reference to value {index}, which is not there")
        self._stack.append(self._memo[index])

    def _protocol(self) -> None:
        version = self._number(1)
        if version > 5:
            raise self._refusal(f"protocol {version}")

    def _frame(self) -> None:
        size = self._number(8)
        if size > len(self._data) - self._at:
            raise self._refusal(
                f"a frame of {size} bytes where {len(self._data) - self._at} are left"
            )

    def _integer(self) -> None:
        size = self._number(1)
        if size > MAX_INTEGER_BYTES:
            raise self._refusal(f"an integer of {size} bytes")
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def _string(self, size: int) -> None:
        if size > MAX_TEXT_BYTES:
            raise self._refusal(f"a string of {size} bytes")
        self._stack.append(self._text(self._take(size)))

    def _refusal(self, what: str) -> PayloadRefused:
        return PayloadRefused(
            f"cannot read serialized tensors: got {what} at byte {self._opcode_at}, expected what the pickle of named "
            "tensors in shared memory has; nothing was executed. Send tensors alone, by ForkingPickler, or in the "
            "typed format of HttpServerEngineAdapter and WeightPublisher"
        )


def _push(value: Value) -> Callable[[_Reader], None]:
    return lambda reader: reader._stack.append(value)


_STOP = ord(".")
#: What each opcode that is read does; those of protocols 2 to 5 that the pickle of a tensor may have, and no others.
_STEPS: Mapping[int, Callable[[_Reader], None]] = {
    0x80: _Reader._protocol,
    0x95: _Reader._frame,
    ord("("): lambda r: r._mark(),
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    ord("K"): lambda r: r._stack.append(r._number(1)),
    ord("M"): lambda r: r._stack.append(r._number(2)),
    ord("J"): lambda r: r._stack.append(int.from_bytes(r._take(4), "little", signed=True)),
    0x8A: _Reader._integer,
    0x8C: lambda r: r._string(r._number(1)),
    ord("X"): lambda r: r._string(r._number(4)),
    ord("C"): lambda r: r._stack.append(r._take(r._number(1))),
    ord("B"): lambda r: r._stack.append(r._take(r._number(4))),
    ord("]"): lambda r: r._made("list", []),
    ord("}"): lambda r: r._made("dict", []),
    ord(")"): lambda r: r._made("tuple", []),
    0x85: lambda r: r._tuple_of(1),
    0x86: lambda r: r._tuple_of(2),
    0x87: lambda r: r._tuple_of(3),
    ord("t"): lambda r: r._made("tuple", r._pop_mark()),
    ord("a"): lambda r: r._add("list", [r._pop()]),
    ord("e"): lambda r: r._add("list", r._pop_mark()),
    ord("s"): lambda r: r._add("dict", [r._pop(), r._pop()][::-1]),
    ord("u"): lambda r: r._add("dict", r._pop_mark()),
    ord("c"): lambda r: r._find(r._line(), r._line()),
    0x93: _Reader._stack_global,
    ord("R"): lambda r: r._call("function"),
    0x81: lambda r: r._call("class"),
    ord("b"): _Reader._build,
    ord("q"): lambda r: r._remember(r._number(1)),
    ord("r"): lambda r: r._remember(r._number(4)),
    0x94: lambda r: r._remember(len(r._memo)),
    ord("h"): lambda r: r._recall(r._number(1)),
    ord("j"): lambda r: r._recall(r._number(4)),
}

#: Names of the opcodes that are refused, for the message.
_REFUSED = dict(
    zip(
        b"012FILSTUVPQGgpdlio" + bytes([*range(0x82, 0x85), 0x8B, *range(0x8D, 0x93), *range(0x96, 0x99)]),
        "POP POP_MARK DUP FLOAT INT LONG STRING BINSTRING SHORT_BINSTRING UNICODE PERSID BINPERSID BINFLOAT GET "
        "PUT DICT LIST INST OBJ EXT1 EXT2 EXT4 LONG4 BINUNICODE8 BINBYTES8 EMPTY_SET ADDITEMS FROZENSET NEWOBJ_EX "
        "BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER".split(),
        strict=True,
    )
)  # fmt: skip


def _opcode_name(opcode: int) -> str:
    return _REFUSED.get(opcode, f"0x{opcode:02x}, which does not exist")


def _short(text: str) -> str:
    shown = text if len(text) <= 80 else text[:77] + "..."
    return shown if shown.isprintable() else ascii(shown)

"""Pickles read as data: nothing is imported, called or built but lists, dicts, numbers and text.

Python's own Unpickler is not used: even with a restricted ``find_class`` it allocates what a pickle claims before it
reads it, and hashes whatever a pickle makes a key of. Opcodes: ``pickletools`` of the standard library. Those of
protocols 0 and 1, which torch.save never wrote, are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from pylomin.store.cursor import Cursor
from pylomin.store.strict_json import shorten

_MAX_OPCODES = 4_000_000  # a tensor takes about 30
_MAX_TEXT_BYTES = 1 << 24  # 16 MiB
_MAX_NAME_BYTES = 1000
_KEYS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a Python object. It stays a name."""

    module: str
    name: str

    @classmethod
    def of(cls, module: str, name: str) -> Global:
        """Under the name that Python 3 has for it; protocol 2 writes that of Python 2."""
        return cls("builtins" if module == "__builtin__" else module, name)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """Stands for an object that is no weight and is not built."""

    __slots__ = ()


_MARK: Any = Inert()  # on the stack where a run of items begins

Rebuild = Callable[[Global, tuple[Any, ...]], object]
Persistent = Callable[[object], object]


def read_pickle(cursor: Cursor, rebuild: Rebuild, persistent: Persistent) -> object:
    """The object of the pickle at ``cursor``, which is left behind its end.

    Args:
        cursor: what to read.
        rebuild: returns what stands for the result of calling an object of a name with arguments.
        persistent: returns what stands for an object that the pickle refers to and does not hold.

    Raises:
        StoreFormatError: the pickle is malformed or holds what is refused.
    """
    return _Reader(cursor, rebuild, persistent).read()


class _Reader:
    def __init__(self, cursor: Cursor, rebuild: Rebuild, persistent: Persistent) -> None:
        self._cursor = cursor
        self._rebuild = rebuild
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> object:
        take, actions = self._cursor.take, _ACTIONS
        for _ in range(_MAX_OPCODES):
            opcode = take(1)
            if opcode == b".":
                return self._pop()
            action = actions.get(opcode)
            if action is None:
                self._fail(f"has opcode {opcode!r}, which torch.save does not write")
            action(self)
        self._fail(f"has more than {_MAX_OPCODES} opcodes")

    # -- the stack

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._fail("takes from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for position in range(len(stack) - 1, -1, -1):
            if stack[position] is _MARK:
                items = stack[position + 1 :]
                del stack[position:]
                return items
        self._fail("lacks a mark")

    def _push_tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    # -- text and numbers

    def _sized(self, length_bytes: int) -> bytes:
        length = int.from_bytes(self._cursor.take(length_bytes), "little")
        if length > _MAX_TEXT_BYTES:
            self._fail(f"claims a text of {length} bytes")
        return self._cursor.take(length)

    def _push_text(self, length_bytes: int) -> None:
        try:
            self._stack.append(self._sized(length_bytes).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            self._fail("has a text that is not UTF-8")

    def _push_old_text(self, length_bytes: int) -> None:
        self._stack.append(self._sized(length_bytes).decode("latin-1"))  # str of Python 2

    def _push_bytes(self, length_bytes: int) -> None:
        self._stack.append(self._sized(length_bytes))

    def _push_int(self, nbytes: int, *, signed: bool = False) -> None:
        self._stack.append(int.from_bytes(self._cursor.take(nbytes), "little", signed=signed))

    def _push_long(self) -> None:
        self._push_int(self._cursor.take(1)[0], signed=True)

    def _push_float(self) -> None:
        self._stack.append(struct.unpack(">d", self._cursor.take(8))[0])

    # -- the memo

    def _put(self, length_bytes: int) -> None:
        self._memo[int.from_bytes(self._cursor.take(length_bytes), "little")] = self._top()

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, length_bytes: int) -> None:
        number = int.from_bytes(self._cursor.take(length_bytes), "little")
        if number not in self._memo:
            self._fail(f"refers to object {number}, which it has not made")
        self._stack.append(self._memo[number])

    # -- containers

    def _append(self) -> None:
        item = self._pop()
        self._list().append(item)

    def _extend(self) -> None:
        items = self._pop_to_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        target = self._top()
        if isinstance(target, list):
            return target
        return [] if isinstance(target, Inert) else self._fail("appends to what is no list")

    def _set_item(self) -> None:
        value = self._pop()
        key = self._pop()
        self._set_all([key, value])

    def _set_items(self) -> None:
        self._set_all(self._pop_to_mark())

    def _set_all(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(items) % 2:
            self._fail("sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else is hashed: a tuple in a tuple, and so on, would take forever.
            if not isinstance(key, _KEYS):
                key = Inert()
            elif key in target:
                self._fail(f"has key {shorten(key)} twice")
            target[key] = value

    def _frozen_set(self) -> None:
        self._pop_to_mark()
        self._stack.append(Inert())

    # -- objects

    def _global(self) -> None:
        module, name = (self._cursor.line(_MAX_NAME_BYTES) for _ in range(2))
        self._stack.append(Global.of(module.decode("utf-8", "replace"), name.decode("utf-8", "replace")))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self._fail("names an object by what is no text")
        self._stack.append(Global.of(module[:_MAX_NAME_BYTES], name[:_MAX_NAME_BYTES]))

    def _reduce(self) -> None:
        arguments = self._pop()
        function = self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self._fail("calls what is no function")
        self._stack.append(self._rebuild(function, arguments))

    def _build(self) -> None:
        # The state of a dict (`_metadata` of a state_dict) and of what is not built is of no use.
        self._pop()
        if not isinstance(self._top(), (dict, Inert)):
            self._fail("gives a state to what has none")

    def _persistent_id(self) -> None:
        self._stack.append(self._persistent(self._pop()))

    def _fail(self, problem: str) -> NoReturn:
        raise self._cursor.error(problem)


def _push(make: Callable[[], object]) -> Callable[[_Reader], None]:
    return lambda reader: reader._stack.append(make())


_ACTIONS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda reader: reader._cursor.skip(1),  # PROTO
    b"\x95": lambda reader: reader._cursor.skip(8),  # FRAME
    b"(": _push(lambda: _MARK),
    b")": _push(tuple),
    b"]": _push(list),
    b"}": _push(dict),
    b"\x8f": _push(Inert),  # EMPTY_SET
    b"N": _push(lambda: None),
    b"\x88": _push(lambda: True),
    b"\x89": _push(lambda: False),
    b"t": lambda reader: reader._stack.append(tuple(reader._pop_to_mark())),
    b"\x85": lambda reader: reader._push_tuple(1),
    b"\x86": lambda reader: reader._push_tuple(2),
    b"\x87": lambda reader: reader._push_tuple(3),
    b"a": _Reader._append,
    b"e": _Reader._extend,
    b"\x90": _Reader._extend,  # ADDITEMS
    b"\x91": _Reader._frozen_set,
    b"s": _Reader._set_item,
    b"u": _Reader._set_items,
    b"X": lambda reader: reader._push_text(4),
    b"\x8c": lambda reader: reader._push_text(1),
    b"\x8d": lambda reader: reader._push_text(8),
    b"U": lambda reader: reader._push_old_text(1),
    b"T": lambda reader: reader._push_old_text(4),
    b"C": lambda reader: reader._push_bytes(1),
    b"B": lambda reader: reader._push_bytes(4),
    b"\x8e": lambda reader: reader._push_bytes(8),
    b"K": lambda reader: reader._push_int(1),
    b"M": lambda reader: reader._push_int(2),
    b"J": lambda reader: reader._push_int(4, signed=True),
    b"\x8a": _Reader._push_long,
    b"G": _Reader._push_float,
    b"q": lambda reader: reader._put(1),
    b"r": lambda reader: reader._put(4),
    b"\x94": _Reader._memoize,
    b"h": lambda reader: reader._get(1),
    b"j": lambda reader: reader._get(4),
    b"c": _Reader._global,
    b"\x93": _Reader._stack_global,
    b"R": _Reader._reduce,
    b"\x81": _Reader._reduce,  # NEWOBJ: the same but for what it would call
    b"b": _Reader._build,
    b"Q": _Reader._persistent_id,
}

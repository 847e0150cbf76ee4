"""Pickles of plain data, read without running anything.

A pickle is a program: it may name any function and call it. Even containers alone can do harm: tuples that are nested
two million deep as keys crash the interpreter when they are hashed. So this reader executes the instructions itself. It
knows built-in containers, strings and numbers, and hashes nothing but strings and numbers.
"""

import collections
import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

CONTAINERS: dict[tuple[str, str], Callable[..., Any]] = {
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, str, bytes, int, float, bool)},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
}
"""All that a pickle may name. Plain data mostly name nothing: dicts, lists, strings and numbers are instructions."""

CALLABLE = (dict, list, tuple, set, frozenset, collections.OrderedDict, collections.defaultdict)

LARGEST_KEY = 2**60
"""Larger numbers may all have one hash, so that a dict of them takes hours."""


class RefusedPickle(ValueError):
    """A pickle of something else than plain data."""


def load_plain(path: Path) -> Any:
    """What a pickle of built-in containers, strings and numbers holds.

    Raises RefusedPickle for anything else, ValueError, LookupError or EOFError for what is no pickle, and OSError.
    """
    with path.open("rb") as file:
        return _Machine(os.fstat(file.fileno()).st_size).run(file)


class _Machine:
    """The stack and memo of the pickle protocols 0 to 5."""

    def __init__(self, size: int) -> None:
        self.items_left = size
        """Items that may still be copied. Each has a byte of the file, and is copied once where no harm is meant."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        """Heights of the stack at which marks lie."""
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        """Execute the instructions of a file; returns what the last one leaves."""
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in VALUES:
                self.stack.append(argument)
            elif name in ASCII:
                self.stack.append(argument.encode("latin-1").decode("ascii"))
            elif name in EMPTY:
                self.stack.append(EMPTY[name]())
            elif name in MEMOIZE:
                (number,) = _hashable([len(self.memo) if argument is None else argument])
                self.memo[number] = self.stack[-1]
            elif name in RECALL:
                self.stack.append(self.memo[argument])
            elif name == "STOP":
                return self.stack.pop()
            elif name not in ("PROTO", "FRAME"):
                instruction = getattr(self, f"_{name.lower()}", None)
                if instruction is None:
                    raise RefusedPickle(f"its instruction {name} is for objects, not for plain data")
                instruction(*(() if argument is None else (argument,)))
        raise EOFError("it ends before its last instruction")

    def _pop_to_mark(self) -> list[Any]:
        height = self.marks.pop()
        found = self.stack[height:]
        del self.stack[height:]
        return found

    def _mark(self) -> None:
        self.marks.append(len(self.stack))

    def _pop(self) -> None:
        self.stack.pop()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _pop_mark(self) -> None:
        self._pop_to_mark()

    def _list(self) -> None:
        self.stack.append(self._pop_to_mark())

    def _tuple(self) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _tuple1(self) -> None:
        self._pack(1)

    def _tuple2(self) -> None:
        self._pack(2)

    def _tuple3(self) -> None:
        self._pack(3)

    def _pack(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _frozenset(self) -> None:
        self.stack.append(frozenset(_hashable(self._pop_to_mark())))

    def _dict(self) -> None:
        self.stack.append(_pairs(self._pop_to_mark()))

    def _append(self) -> None:
        value = self.stack.pop()
        _demand(self.stack[-1], list).append(value)

    def _appends(self) -> None:
        values = self._pop_to_mark()
        _demand(self.stack[-1], list).extend(values)

    def _setitem(self) -> None:
        pair = self.stack[-2:]
        del self.stack[-2:]
        _demand(self.stack[-1], dict).update(_pairs(pair))

    def _setitems(self) -> None:
        values = self._pop_to_mark()
        _demand(self.stack[-1], dict).update(_pairs(values))

    def _additems(self) -> None:
        values = self._pop_to_mark()
        _demand(self.stack[-1], set).update(_hashable(values))

    def _global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self.stack.append(_container(module, name))

    def _stack_global(self) -> None:
        module, name = self.stack[-2:]
        self.stack[-2:] = [_container(_demand(module, str), _demand(name, str))]

    def _inst(self, names: str) -> None:
        self._global(names)
        raise RefusedPickle("its instruction INST is for objects, not for plain data")

    def _reduce(self) -> None:
        """Call a container, as protocols before 4 make a set: with nothing, or with one list of its items."""
        arguments = _demand(self.stack.pop(), tuple)
        kind = self.stack.pop()
        if kind not in CALLABLE or len(arguments) > 1:
            raise RefusedPickle("it calls something else than a container")
        if kind is collections.defaultdict and arguments:
            if arguments[0] not in (*CONTAINERS.values(), None):
                raise RefusedPickle("it calls something else than a container")
            self.stack.append(collections.defaultdict(arguments[0]))
            return
        items = _demand(arguments[0], (list, tuple)) if arguments else ()
        self.items_left -= len(items)
        if self.items_left < 0:
            raise RefusedPickle("it copies containers again and again")
        if issubclass(kind, dict):
            pairs = [part for pair in items for part in _demand(pair, (list, tuple))[:2]]
            self.stack.append(kind(_pairs(pairs)))
        else:
            self.stack.append(kind(_hashable(items) if kind in (set, frozenset) else items))


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
ASCII = ("STRING", "BINSTRING", "SHORT_BINSTRING")
MEMOIZE = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
RECALL = ("GET", "BINGET", "LONG_BINGET")


def _container(module: str, name: str) -> Callable[..., Any]:
    found = CONTAINERS.get(("builtins" if module == "__builtin__" else module, name))
    if found is None:
        raise RefusedPickle(f"it names {module}.{name}, which is neither a container, text nor a number")
    return found


def _demand(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise RefusedPickle("its instructions do not fit together")
    return value


def _hashable(values: Any) -> Any:
    """The values, which are to be hashed. Raises RefusedPickle where one is no text and no number of ordinary size."""
    for value in values:
        is_small = isinstance(value, int) and abs(value) < LARGEST_KEY
        if not (is_small or value is None or isinstance(value, str | bytes | float)):
            raise RefusedPickle("a key or a set holds something else than texts and numbers")
    return values


def _pairs(values: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn."""
    return dict(zip(_hashable(values[::2]), values[1::2], strict=True))

"""What a pickle of numbers says, read without doing what it says.

A pickle is a program for a stack machine; loading it runs that program. Here the instructions are followed on
placeholders instead: a name of a class stays a name, "call this" becomes a note that it would be called, and only names
on a list are met without refusal. Arrays are decoded here, those that joblib writes between the instructions too. So
numbers, texts and the attributes of known objects come out, and nothing of the file is ever executed.

Source: the instructions are those that Python's own `pickletools` documents.
"""

import math
import pickletools
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ftw.errors import PackError

ARRAY_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
# Names that every pickle of arrays may hold; NumPy moved its core from `numpy.core` to `numpy._core`.
BASIC = {
    ARRAY_WRAPPER,
    "_codecs.encode",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("object", "set")),
    *(f"numpy.{name}" for name in ("ndarray", "dtype", "float32", "float64", "int32", "int64")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}
KINDS = re.compile(r"(?:[fiu][248]|[iu]1|b1|U\d{1,4}|S\d{1,4})")
MOST_STEPS = 20_000_000


class Name(str):
    """A class or function by its full name; never looked up."""


class _Mark:
    """Where a run of values on the stack begins."""


@dataclass(eq=False)
class Thing:
    """An object of a named class: the arguments it would be made with, and its attributes."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = field(default_factory=dict)


class PickleReader:
    """Follows one pickle on placeholders.

    Args:
        file: the bytes, uncompressed. allowed: full names that may occur, beside those of plain arrays.
        where: of messages.
    """

    def __init__(self, file: BinaryIO, allowed: Collection[str], *, where: str) -> None:
        self._file, self._allowed, self._where = file, BASIC | set(allowed), where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """What the pickle describes.

        Raises:
            PackError: a name that is not allowed, an instruction that such pickles do not need, or damage.
        """
        try:
            for step, (opcode, argument, _) in enumerate(pickletools.genops(self._file)):
                if opcode.name == "STOP":
                    return self._stack.pop()
                if step > MOST_STEPS:
                    raise self._refused(f"has more than {MOST_STEPS} instructions")
                self._follow(opcode.name, argument)
        except PackError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise self._refused(f"is damaged ({type(error).__name__}: {error})") from error
        raise self._refused("ends before its end")

    def _follow(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self._stack.append(argument)
        elif name in MAKERS:
            self._stack.append(MAKERS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(argument)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(self._memo[int(argument)])
        elif name not in ("PROTO", "FRAME"):
            action = ACTIONS.get(name)
            if action is None:
                raise self._refused(f"holds the instruction {name}, which a text lens has no use for")
            action(self, argument)

    # --- instructions ------------------------------------------------------------------------------------------------

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def tuple_of(self, num: int) -> None:
        values = tuple(self._stack[len(self._stack) - num :])
        del self._stack[len(self._stack) - num :]
        self._stack.append(values)

    def tuple_to_mark(self, _: Any) -> None:
        self._stack.append(tuple(self._to_mark()))

    def items(self, num: int | None) -> None:
        values = self._to_mark() if num is None else [self._stack.pop() for _ in range(2)][::-1]
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(zip(self._keys(values[::2]), values[1::2], strict=True))

    def append(self, num: int | None) -> None:
        values = self._to_mark() if num is None else [self._stack.pop()]
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(self._keys(values))

    def global_name(self, argument: str) -> None:
        self._stack.append(self._name(".".join(argument.split(" ", 1))))

    def stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._name(f"{module}.{name}"))

    def reduce(self, _: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Name):
            raise self._refused("calls what is no named class")
        self._stack.append(self._called(called, arguments))

    def build(self, _: Any) -> None:
        state, thing = self._stack.pop(), self._stack[-1]
        if not isinstance(thing, Thing):
            raise self._refused(f"gives attributes to a {type(thing).__name__}")
        thing.state = state
        if thing.kind == ARRAY_WRAPPER:
            self._replace(thing, self._array_between(state))
        elif thing.kind == "numpy.ndarray":
            _, shape, dtype, is_fortran, data = state
            self._replace(thing, self._array(shape, _dtype(dtype), "F" if is_fortran else "C", data))

    # --- parts -------------------------------------------------------------------------------------------------------

    def _called(self, called: Name, arguments: tuple[Any, ...]) -> Any:
        """What a call would give, for the few functions that stand for a value; else an object with its arguments."""
        if called == "_codecs.encode":
            return str(arguments[0]).encode("latin1")
        if called == "builtins.set":
            return set(self._keys(arguments[0])) if arguments else set()
        if called.endswith("multiarray.scalar"):
            return self._array((), _dtype(arguments[0]), "C", arguments[1]).item()
        if called.endswith("multiarray._reconstruct"):
            return Thing("numpy.ndarray")
        if called.endswith("._reconstructor"):
            return Thing(str(arguments[0]))
        return Thing(str(called), tuple(arguments))

    def _array_between(self, state: dict[str, Any]) -> np.ndarray:
        """An array whose bytes stand in the file after the instruction that names it, as joblib writes them."""
        dtype, shape = _dtype(state["dtype"]), tuple(state["shape"])
        if state.get("numpy_array_alignment_bytes") is not None:
            self._file.read(self._file.read(1)[0])  # padding, led by its length
        num_bytes = self._size(shape, dtype)
        return self._array(shape, dtype, state.get("order", "C"), self._file.read(num_bytes))

    def _array(self, shape: Any, dtype: np.dtype[Any], order: str, data: Any) -> np.ndarray:
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes) or len(data) != self._size(shape, dtype):
            raise self._refused(f"has an array of shape {shape} with other bytes than that")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")

    def _size(self, shape: Any, dtype: np.dtype[Any]) -> int:
        if not all(type(size) is int and size >= 0 for size in shape):
            raise self._refused(f"has an array of shape {shape!r:.60}")
        return math.prod(shape) * dtype.itemsize

    def _replace(self, thing: Thing, value: Any) -> None:
        """Put what an object has turned out to be in its place on the stack; it was noted under its number before."""
        self._stack[-1] = value
        for number in [number for number, known in self._memo.items() if known is thing]:
            self._memo[number] = value

    def _name(self, name: str) -> Name:
        if name not in self._allowed:
            raise self._refused(f"names {name!r:.80}, which a text lens has no use for")
        return Name(name)

    def _keys(self, values: Any) -> list[Any]:
        """Values that may be hashed: to hash tuples nested a million deep would end the process."""
        if not all(isinstance(value, str | bytes | int | float | None) for value in values):
            raise self._refused("has a key that is neither text nor number")
        return list(values)

    def _to_mark(self) -> list[Any]:
        place = max(place for place, value in enumerate(self._stack) if value is _Mark)
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _refused(self, words: str) -> PackError:
        return PackError(f"{self._where} {words}; nothing of it was run, and it is not read")


def _dtype(thing: Any) -> np.dtype[Any]:
    """A type of plain numbers or texts.

    Raises:
        ValueError: any other type; objects would be pickles of their own.
    """
    if isinstance(thing, Name):
        return np.dtype(thing.removeprefix("numpy."))
    code, order = str(thing.arguments[0]), str(thing.state[1]) if thing.state else "="
    if thing.kind != "numpy.dtype" or not KINDS.fullmatch(code) or order not in ("<", ">", "|", "="):
        raise ValueError(f"an array of {code!r:.20}")
    return np.dtype(order + code)


VALUES = {"INT", "LONG", "FLOAT", "STRING", "UNICODE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"} | {
    f"{short}{kind}" for short in ("", "SHORT_") for kind in ("BINSTRING", "BINUNICODE", "BINBYTES")
}
MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _Mark,
}
ACTIONS: dict[str, Callable[[PickleReader, Any], None]] = {
    "MEMOIZE": PickleReader.memoize,
    "TUPLE": PickleReader.tuple_to_mark,
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    "SETITEM": lambda reader, _: reader.items(2),
    "SETITEMS": lambda reader, _: reader.items(None),
    "APPEND": lambda reader, _: reader.append(1),
    "APPENDS": lambda reader, _: reader.append(None),
    "ADDITEMS": lambda reader, _: reader.append(None),
    "GLOBAL": PickleReader.global_name,
    "STACK_GLOBAL": PickleReader.stack_global,
    "REDUCE": PickleReader.reduce,
    "NEWOBJ": PickleReader.reduce,
    "BUILD": PickleReader.build,
}

"""Calls between the tests and the code that is tested, which live in two processes.

What crosses is data: numbers, texts, and collections of them, of exactly Python's own types, however an object of the
other side describes itself. Everything else stays where it is, and crosses as a number; it can be called, looked into
and gone through, but it equals nothing, and cannot be computed with.
"""

import builtins
import datetime
import decimal
import fractions
import itertools
import numbers
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from mtp_lightning.evaluation.code.inside.frames import ClosedError, receive, send

MOST_BYTES = 1 << 24  # of one answer
COLLECTIONS: dict[str, Any] = {"l": list, "t": tuple, "s": set, "f": frozenset, "q": deque}
SHORT = 1 << 63
EXACTLY: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: lambda value: number if abs(number := int.__pos__(value)) < SHORT else ["i", hex(number)],
    float: float.__pos__,
}
WRITTEN: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: ["c", value.real, value.imag],
    bytes: lambda value: ["b", bytes(value).decode("latin1")],
    bytearray: lambda value: ["B", bytes(value).decode("latin1")],
    range: lambda value: ["r", value.start, value.stop, value.step],
    decimal.Decimal: lambda value: ["D", str(value)],
    fractions.Fraction: lambda value: ["F", str(value)],
    datetime.datetime: lambda value: ["dt", value.isoformat()],  # before a date, which it is, too
    datetime.date: lambda value: ["d", value.isoformat()],
    datetime.time: lambda value: ["h", value.isoformat()],
    datetime.timedelta: lambda value: ["dd", value.days, value.seconds, value.microseconds],
    numbers.Integral: int,
}
READ: dict[str, Callable[..., Any]] = {
    "i": lambda digits: int(digits, 16),  # of any number of digits
    "c": complex,
    "b": lambda text: text.encode("latin1"),
    "B": lambda text: bytearray(text.encode("latin1")),
    "r": range,
    "D": decimal.Decimal,
    "F": fractions.Fraction,
    "dt": datetime.datetime.fromisoformat,
    "d": datetime.date.fromisoformat,
    "h": datetime.time.fromisoformat,
    "dd": datetime.timedelta,
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "getitem": lambda owner, key: owner[key],
}
CALL = "call"


class Remote:
    """An object of the other side."""

    def __init__(self, peer: "Peer", number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Have the other side call it."""
        return self._peer.ask(CALL, self, *arguments, **named)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._peer.ask("iter", self)
        return iterator if isinstance(iterator, Remote) else iter(iterator)

    def __next__(self) -> Any:
        """Have the other side give the next item."""
        return self._peer.ask("next", self)

    def __len__(self) -> int:
        return int(self._peer.ask("len", self))

    def __bool__(self) -> bool:
        return bool(self._peer.ask("bool", self))

    def __str__(self) -> str:
        return str(self._peer.ask("str", self))

    def __repr__(self) -> str:
        return f"<object {self._number} of the code>"

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("getitem", self, key)


class Peer:
    """One of the two sides."""

    def __init__(self, reader: int, writer: int, *, is_candidate: bool) -> None:
        self._reader, self._writer, self._is_candidate = reader, writer, is_candidate
        self._kept: dict[int, Any] = {}  # objects that the other side knows by number; also keeps their ids in use

    @property
    def root(self) -> Remote:
        """The module of the other side."""
        return Remote(self, 0)

    def ask(self, operation: str, *arguments: Any, **named: Any) -> Any:
        """Have the other side do something, and return what comes of it; meanwhile, answer what it asks.

        Raises:
            Exception: The other side raised it, if it is one of Python's own, else a RuntimeError.
            ClosedError: The other side has gone.
        """
        crossing = {name: self._encode(value) for name, value in named.items()}
        send(self._writer, ["ask", operation, [self._encode(value) for value in arguments], crossing])
        while True:
            kind, *content = self._receive()
            if kind == "answer":
                return self._decode(content[0])
            if kind == "raise":
                raise _error_of(*map(str, content[:2]))
            self._answer(*content)

    def serve(self, root: Any) -> None:
        """Answer until the other side has had enough; `root` is the object number 0."""
        self._kept[0] = root
        self.tell("ready")
        while (message := self._receive())[0] == "ask":
            self._answer(*message[1:])

    def tell(self, word: str, *content: str) -> None:
        """Send a word that is no question."""
        send(self._writer, [word, *content])

    def wait_for(self, word: str) -> None:
        """Wait until the other side sends that word.

        Raises:
            Exception: As of `ask`.
        """
        kind, *content = self._receive()
        if kind == "raise":
            raise _error_of(*map(str, content[:2]))
        if kind != word:
            raise ClosedError(f"no answer {word}")

    def _receive(self) -> Any:
        message = receive(self._reader, MOST_BYTES)
        if not isinstance(message, list) or not message:
            raise ClosedError("no message")
        return message

    def _answer(self, operation: str, arguments: list[Any], named: dict[str, Any]) -> None:
        try:
            owner, *rest = map(self._decode, arguments)
            own = {name: self._decode(value) for name, value in named.items()}
            if operation == CALL:
                found = owner(*rest, **own)
            elif self._is_candidate:
                found = OPERATIONS[operation](owner, *rest)
            else:  # what tests hand over can be called, not looked into
                raise PermissionError(operation)
            message = ["answer", self._encode(found)]
        except Exception as error:
            message = ["raise", *described(error)]
        send(self._writer, message)

    def _encode(self, value: Any) -> Any:
        """Turn a value into JSON; what an object says of itself through its own methods is not asked."""
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            value = value.item()
        if value is None or type(value) is bool:
            return value
        for kind, exactly in EXACTLY.items():
            if isinstance(value, kind):
                return exactly(value)
        for name, collection in COLLECTIONS.items():
            if isinstance(value, collection):
                return [name, *map(self._encode, collection.__iter__(value))]
        if isinstance(value, dict):
            return ["m", *([self._encode(key), self._encode(own)] for key, own in dict.items(value))]
        for other, written in WRITTEN.items():
            if isinstance(value, other):
                return written(value)
        return self._by_number(value)

    def _by_number(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return ["yours", value._number]
        if not self._is_candidate and not callable(value):
            raise TypeError(f"tests cannot hand a {type(value).__name__} to the code in the sandbox")
        number = next((number for number, kept in self._kept.items() if kept is value), len(self._kept))
        self._kept[number] = value
        return ["mine", number]

    def _decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *content = value
        if kind in COLLECTIONS:
            return COLLECTIONS[kind](map(self._decode, content))
        if kind == "m":
            return {self._decode(key): self._decode(own) for key, own in content}
        if kind == "mine":
            return Remote(self, content[0])
        return self._kept[content[0]] if kind == "yours" else READ[kind](*content)


def described(error: BaseException) -> tuple[str, str]:
    """Name an error, and say what it says, as far as it can."""
    try:
        return type(error).__name__, "".join(itertools.islice(str(error), 500))
    except Exception:
        return type(error).__name__, ""


def _error_of(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # those that need more than a text
            pass
    return RuntimeError(f"{name}: {text}")

"""Messages through a descriptor: JSON behind its length. What is read is never more than one message."""

import json
import os
import struct
from typing import Any

LENGTH = struct.Struct("<Q")


class ClosedError(Exception):
    """The other end has closed, or sends what is no message."""


def send(descriptor: int, message: Any) -> None:
    """Write a message.

    Raises:
        ClosedError: Nobody reads it.
    """
    content = json.dumps(message).encode()
    left = memoryview(LENGTH.pack(len(content)) + content)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        raise ClosedError(str(error)) from None


def receive(descriptor: int, most_bytes: int = 1 << 31) -> Any:
    """Read a message.

    Raises:
        ClosedError: The other end has closed, sends no JSON, or a message that is too long.
    """
    size = LENGTH.unpack(_exactly(descriptor, LENGTH.size))[0]
    if size > most_bytes:
        raise ClosedError(f"a message of {size:,} bytes")
    try:
        return json.loads(_exactly(descriptor, size))
    except (ValueError, RecursionError) as error:
        raise ClosedError(str(error)) from None


def _exactly(descriptor: int, size: int) -> bytes:
    pieces, left = [], size
    while left:
        try:
            piece = os.read(descriptor, min(left, 1 << 20))
        except OSError as error:
            raise ClosedError(str(error)) from None
        if not piece:
            raise ClosedError("the end")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)

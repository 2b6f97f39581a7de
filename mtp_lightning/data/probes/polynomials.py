"""Arithmetic on polynomials in F_7[X]/(X^5) [Gloeckle et al. 2024, section 4.2].

A polynomial is its five coefficients, that of X^0 first: 31000 is 3 + X. Operations are negation (-), addition (+),
multiplication (*) and composition (o: (f o g)(X) = f(g(X))). What is beyond X^4 is dropped.

    (-31000*01000)=04600
"""

import random
from collections.abc import Iterator
from typing import Any, Final

PRIME: Final = 7
NUM_COEFFICIENTS: Final = 5
MOST_OPERATIONS: Final = 5  # in training; tested are up to twice as many
PAUSE: Final = "."
"""A token that says nothing, between question and equality sign."""

Polynomial = tuple[int, ...]


def problems(
    count: int, seed: int, *, is_test: bool, num_pauses: int = 0, most_operations: int = MOST_OPERATIONS
) -> Iterator[dict[str, Any]]:
    """Yield problems with `prompt`, `completion` and the number of `operations`.

    In training that number is uniform in 1 to `most_operations`, `count` in all; in the test there are `count` for
    each of 1 to twice that.
    """
    draw = random.Random(f"{seed} {'test' if is_test else 'train'}")
    for number in range(count * 2 * most_operations if is_test else count):
        num_operations = 1 + number // count if is_test else draw.randint(1, most_operations)
        text, value = _expression(draw, num_operations)
        yield {"prompt": f"{text}{PAUSE * num_pauses}=", "completion": _spelled(value), "operations": num_operations}


def _expression(draw: random.Random, num_operations: int) -> tuple[str, Polynomial]:
    """Draw an expression and compute it; operators, coefficients and the sizes of both sides are uniform."""
    if num_operations == 0:
        value = tuple(draw.randrange(PRIME) for _ in range(NUM_COEFFICIENTS))
        return _spelled(value), value
    operator = draw.choice("-+*o")
    if operator == "-":
        text, value = _expression(draw, num_operations - 1)
        return f"-{text}", tuple(-coefficient % PRIME for coefficient in value)
    num_left = draw.randrange(num_operations)
    left, a = _expression(draw, num_left)
    right, b = _expression(draw, num_operations - 1 - num_left)
    operation = {"+": add, "*": multiply, "o": compose}[operator]
    return f"({left}{operator}{right})", operation(a, b)


def add(a: Polynomial, b: Polynomial) -> Polynomial:
    """Add two polynomials.

    >>> add((6, 0, 0, 0, 1), (3, 0, 0, 0, 0))
    (2, 0, 0, 0, 1)
    """
    return tuple((x + y) % PRIME for x, y in zip(a, b, strict=True))


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    """Multiply two polynomials.

    >>> multiply((0, 1, 0, 0, 0), (3, 1, 0, 0, 2))
    (0, 3, 1, 0, 0)
    """
    places = range(NUM_COEFFICIENTS)
    return tuple(sum(a[i] * b[place - i] for i in range(place + 1)) % PRIME for place in places)


def compose(a: Polynomial, b: Polynomial) -> Polynomial:
    """Put the second polynomial into the first, by Horner's rule.

    >>> compose((1, 0, 1, 0, 0), (1, 1, 0, 0, 0))
    (2, 2, 1, 0, 0)
    """
    value: Polynomial = (0,) * NUM_COEFFICIENTS
    for coefficient in reversed(a):
        value = add(multiply(value, b), (coefficient,) + (0,) * (NUM_COEFFICIENTS - 1))
    return value


def _spelled(value: Polynomial) -> str:
    return "".join(map(str, value))

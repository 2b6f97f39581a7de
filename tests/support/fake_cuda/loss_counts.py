"""Count what the losses of a micro-batch launch and move, by size of the vocabulary and number of offsets.

    python -m tests.support.fake_cuda.loss_counts recipes/paper/{0.3b,1.3b,13b}_n4.yaml [KEY=VALUE...]

The roofline is that of `predict`. Trunk and heads are not looked at: no more layers are built than heads need.
"""

import sys
from collections import Counter

from tests.support.fake_cuda.client import FakeCuda, fake_cuda
from tests.support.fake_cuda.predict import micro_batch

VOCABULARIES = (32_000, 128_000)
OFFSETS = (1, 4, 8)
COLUMNS = ("recipe", "V", "n", "launches", "GB moved", "products, ms", "elementwise, ms", "all, ms")


def counted(ask: FakeCuda, path: str, vocab_size: int, num_offsets: int, overrides: list[str]) -> list[str]:
    """Return one row of the table."""
    size = [f"model.vocab_size={vocab_size}", f"heads.num_offsets={num_offsets}"]
    recipe, books = micro_batch(ask, path, [*size, f"model.num_hidden_layers={num_offsets + 1}", *overrides])
    launches, moved = (
        sum(number for line, number in books[name][0].items() if line.startswith("losses/"))
        for name in ("launches", "moved")
    )
    seconds = Counter[str]()
    for name, own in books["seconds"][0].items():
        kind, _, line = name.partition(" ")
        if line.startswith("losses/"):
            seconds["products" if kind == "products" else "elementwise"] += own
    times = [seconds["products"], seconds["elementwise"], seconds.total()]
    figures = [f"{launches:,}", f"{moved / 1e9:,.0f}", *(f"{1e3 * own:,.0f}" for own in times)]
    return [recipe.name, f"{vocab_size:,}", str(num_offsets), *figures]


def main(arguments: list[str]) -> None:
    """Print the table."""
    paths, overrides = ([own for own in arguments if ("=" in own) == is_field] for is_field in (False, True))
    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    with fake_cuda() as ask:
        for path in paths:
            for vocab_size in VOCABULARIES:
                for num_offsets in OFFSETS:
                    row = counted(ask, path, vocab_size, num_offsets, overrides)
                    print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

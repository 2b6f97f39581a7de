"""Recipes and overrides that nobody means: wrong values for every field, and files that were damaged on the way."""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

from mtp_lightning.errors import MtpError, RecipeError
from mtp_lightning.planner.report import build_plan
from mtp_lightning.recipe.loading.dump import recipe_to_yaml
from mtp_lightning.recipe.loading.load import load_recipe
from mtp_lightning.recipe.loading.phases import phases_of
from mtp_lightning.recipe.schema.field_types import ROOT, Place, options_of
from mtp_lightning.recipe.schema.phases import PhaseSection

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in pairwise("abcdefghij")
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{below}'] * 10)}]}}\n" for below, name in pairwise("abcdefghij")
)
WRONG_VALUES = (
    *(
        "x",
        '""',
        "''",
        "' '",
        "true",
        "no",
        "NO",
        "on",
        "null",
        "~",
        "auto",
        "none",
        "cuda",
        "a.yaml",
        "/dev/full",
        "/",
    ),
    *(
        "0",
        "1",
        "-1",
        "2",
        "7",
        "0.5",
        "-0.0",
        "1.5",
        "1e6",
        "1e12",
        "1e18",
        "1e30",
        "1e308",
        "-1e308",
        "1e400",
        "-1e400",
    ),
    *("5e-324", "1e-320", "1e-400", ".nan", ".inf", "-.inf", "nan", "Infinity", "9" * 30, "9" * 400, "9" * 5000),
    *("0o17", "017", "0x1F", "0x" + "f" * 5000, "0b11", "1_000", "1__0", "1:30", "12e03", "2026-01-01", "2024_10_01"),
    *(
        "2026-01-01T00:00:00Z",
        "1.2.3",
        "[]",
        "{}",
        "[[]]",
        "[null]",
        "[x, 1]",
        "[1, 2, 3, 4, 5]",
        "[0]",
        "[-1]",
        "[.nan]",
    ),
    *(
        "{a: 1}",
        "{a: {a: {a: 1}}}",
        "{kind: x}",
        "{kind: null}",
        "{kind: [a]}",
        "{kind: {}}",
        "{kind: decay}",
        "{1: 2}",
    ),
    *(
        "{null: 1}",
        "{'': 1}",
        "{a.b: 1}",
        "{? [a] : 1}",
        "{<<: {a: 1}}",
        "<<",
        "[a",
        "a]",
        "{a",
        "}",
        "'a",
        '"a',
        "a: b: c",
    ),
    *(
        "[" * 3000,
        "[" * 90 + "]" * 90,
        "[" * 500 + "]" * 500,
        "{a: " * 90 + "1" + "}" * 90,
        "{a: " * 500 + "1" + "}" * 500,
    ),
    *(
        "!!python/object:os.system x",
        "!!python/object/apply:os.system [ls]",
        "!!binary aGk=",
        "!!set {a, b}",
        "!!omap []",
    ),
    *(
        "!!float x",
        "!!int 1.5",
        "!!str 5",
        "!!null x",
        "!!timestamp 2026-01-01",
        "!mine x",
        "!<tag:x> y",
        "*a",
        "&a [*a]",
    ),
    *(
        "&a {b: *a}",
        "- a",
        "%x",
        "@x",
        "`x`",
        "|",
        ">",
        "? a",
        ": a",
        "# a",
        "--- a",
        "...",
        "a\n---\nb",
        "\t",
        "\\",
        "a\0b",
    ),
    *(
        '"a\\0b"',
        '"\\uD800"',
        "\ud800",
        "a\udcff",
        "\u2028",
        "\u202ex",
        "\x1b[2J",
        "😀",
        "\ufeff",
        "x" * 100_000,
        "x " * 20_000,
    ),
    *(
        "[" + "x, " * 5_000 + "]",
        "[{0..99999999}]",
        '"{0..99999999}.tar"',
        "[~/x, $HOME/x]",
        "s3://b/x",
        "offsets_below_9",
    ),
    *(
        "[offsets_below_" + "9" * 5000 + "]",
        "[trunk, heads, unembedding]",
        "{trunk: 1e308}",
        "{web: 1e308, code: 1e308}",
    ),
    *("{train: x, validation: y}", "{train: ['{0..99999999}.tar'], validation: ['a\\0b']}", "{from_batch_size: 0}"),
    *(
        "{from_batch_size: 1, over_samples: 1e308}",
        "{kind: constant, values: [1e308, 1e308]}",
        "{rank: 1e30, alpha: 1e308}",
    ),
    *("{zero_optimization: [1]}", "{zero_optimization: {reduce_bucket_size: x}}", "{zero_optimization: {stage: 3}}"),
    *(
        "{extend_to: 1e8}",
        "{a: {extend_to: 1e8}}",
        "{a: null}",
        "{a: {run: 5}}",
        "{a: {run: {steps: 1e400}}}",
        "{a/b: {}}",
    ),
)
"""Texts of YAML of every type, size, depth and encoding; none is right for many fields."""


def paths() -> list[str]:
    """List the dotted path of every section and field, of null and united sections and of phases too."""
    own = [".".join(place.names) for place in _places(ROOT)]
    phase = [
        ".".join(("phases", "a", name, *inner))
        for name, field in PhaseSection.model_fields.items()
        for inner in ((), *_inner(name, options_of(field.annotation)[0].type))
    ]
    return [*own, *phase, "phases.a", "nothing", "run.nothing", "run.steps.below", "data.corpus.0", "phases.a.nothing"]


def _places(place: Place) -> Iterator[Place]:
    for name in dict.fromkeys(place.keys):
        below = place.below(name)
        if below:
            yield below
            yield from _places(below)


def _inner(section: str, kind: object) -> Iterator[tuple[str, ...]]:
    """Yield the paths of fields beneath the changes that a phase makes to a section."""
    place = ROOT.below(section)
    if place and place.options[0].section:
        yield from (below.names[1:] for below in _places(place))


class Tally:
    """What came of recipes: how many were right, how many refused, and what was neither."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.right, self.refused = seconds, 0, 0
        self.broken: dict[str, list[str]] = {}

    def add(self, path: Path, overrides: tuple[str, ...], what: str) -> None:
        """Load, dump and plan a recipe; note what is neither right nor refused in words, or takes too long."""
        try:
            with at_most(self.seconds):
                use(path, overrides)
            self.right += 1
        except MtpError as error:
            self.refused += 1
            if not is_whole(error):
                self.broken.setdefault(f"no three parts: {error!r:.200}", []).append(what)
        except BaseException as error:
            place, frame = error.__traceback__, None
            while place is not None:
                frame, place = place.tb_frame, place.tb_next
            where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}" if frame else ""
            self.broken.setdefault(f"{type(error).__name__} at {where}", []).append(what)


def use(path: Path, overrides: tuple[str, ...]) -> None:
    """Do with a recipe what every command does that needs no torch."""
    recipe = load_recipe(path, overrides).recipe
    recipe_to_yaml(recipe)
    for each in [phase.recipe for phase in phases_of(recipe)] or [recipe]:
        build_plan(each).as_json()


def is_whole(error: MtpError) -> bool:
    """Say whether an error has its three parts, each of bounded length."""
    faults = error.faults if isinstance(error, RecipeError) else ()
    parts = [text for fault in faults for text in (fault.expected, fault.found, fault.hint)]
    parts += [] if faults else [error.expected, error.found, error.hint]
    return all(0 < len(part) < 3000 for part in parts)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where this process computes for longer."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def mutated(text: str, draw: random.Random) -> bytes:
    """Damage a file in one to three ways."""
    content = text.encode()
    for _ in range(draw.randint(1, 3)):
        content = draw.choice(MUTATIONS)(content, draw)
    return content


def _flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(max(len(content), 1))
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    piece = draw.choice(PIECES)
    return content[:place] + piece.encode("utf-8", "surrogatepass") + content[place:]


def _value(content: bytes, draw: random.Random) -> bytes:
    """Put a wrong value in the place of one."""
    lines = content.split(b"\n")
    places = [index for index, line in enumerate(lines) if b": " in line and not line.lstrip().startswith(b"#")]
    if places:
        place = draw.choice(places)
        key = lines[place].partition(b": ")[0]
        lines[place] = key + b": " + draw.choice(WRONG_VALUES).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _lines(change: Callable[[list[bytes], int, random.Random], list[bytes]]) -> Callable[[bytes, random.Random], bytes]:
    def apply(content: bytes, draw: random.Random) -> bytes:
        lines = content.split(b"\n")
        return b"\n".join(change(lines, draw.randrange(len(lines)), draw))

    return apply


PIECES = (
    *(
        "\0",
        "\r",
        "\ufeff",
        "\ud800",
        "\x85",
        "\u2028",
        "\t",
        ":",
        ": ",
        "- ",
        "? ",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "#",
        "&a ",
    ),
    *(
        "*a",
        "<<: *a\n",
        "<<: {run: {steps: 5}}\n",
        "!!python/object:x.y ",
        "!!set ",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "|\n",
    ),
    *(">\n", "[" * 2000, "{a: " * 500, "- " * 500, "? " * 300, "9" * 5000, "extends: recipe.yaml\n", "extends: .\n"),
    *(
        "extends: /dev/zero\n",
        "extends: a\0b\n",
        f"extends: {'x' * 300}\n",
        BOMB,
        MERGE_BOMB,
        "phases: [a]\n",
        "\n" * 2000,
    ),
    *("phases:\n  a: {extend_to: 1e8}\n", "phases: {a: {}, b: {run: {steps: 1e30}}}\n", "model: {vocab_size: 1e30}\n"),
)
MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _insert,
    _value,
    _value,
    _lines(lambda lines, place, draw: [*lines[:place], lines[place], *lines[place:]]),
    _lines(lambda lines, place, draw: lines[:place] + lines[place + 1 :]),
    _lines(lambda lines, place, draw: [*lines[:place], b"  " + lines[place], *lines[place + 1 :]]),
    _lines(lambda lines, place, draw: draw.sample(lines, len(lines))),
    lambda content, draw: content[: draw.randrange(len(content) + 1)],
    lambda content, draw: content.replace(b"\n", b"\r\n"),
    lambda content, draw: content.decode("latin-1").encode(draw.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])),
)

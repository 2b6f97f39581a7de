"""Documents for users, and what is looked at in them: links, code, commands."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from docs.generate import slug

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "recipes/RESULTS.md", "cluster/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
WRITTEN = ROOT / "docs/reference"  # from the program itself
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    \S.*\n(?:    .*\n)*", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
BRACES = re.compile(r"\{([^{}=:]*,[^{}=:]*)\}")


def name_of(page: Path) -> str:
    """Path of a page in the repository."""
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [body for found, body in BLOCK.findall(text) if found == language]


def links(text: str) -> list[str]:
    """Targets of links, outside of code."""
    return LINK.findall(INLINE.sub("", BLOCK.sub("", text)))


def inline_code(text: str) -> list[str]:
    """Code inside sentences, each without line breaks."""
    return INLINE.findall(BLOCK.sub("", text))


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)) for title in titles}


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every `mtp` command in the shell blocks of a page."""
    for block in (*blocks(text, "bash"), *INDENTED.findall(BLOCK.sub("", text))):
        for line in block.replace("\\\n", " ").splitlines():
            yield from commands_of(line)


def commands_of(line: str) -> Iterator[list[str]]:
    """Arguments of every `mtp` command in a line of shell.

    >>> list(commands_of("a && srun -n2 .venv/bin/mtp train x.yaml 'a=[1, 2]'  # words"))
    [['train', 'x.yaml', 'a=[1, 2]']]
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";|&"):
            parts.append([])
        else:
            parts[-1].append(word)
    for part in parts:
        names = [Path(word).name for word in part]
        if "mtp" in names:
            yield list(itertools.chain.from_iterable(map(expanded, part[names.index("mtp") + 1 :])))


def expanded(word: str) -> list[str]:
    """Expand braces as a shell does.

    >>> expanded("r/{a,b}.yaml"), expanded("w={kind: x, y: 1}")
    (['r/a.yaml', 'r/b.yaml'], ['w={kind: x, y: 1}'])
    """
    found = BRACES.search(word)
    if not found or "=" in word:
        return [word]
    return [w for part in found[1].split(",") for w in expanded(word[: found.start()] + part + word[found.end() :])]

"""Synthetic tasks: the same seed gives the same bytes, names are two tokens, results are those of other arithmetic."""

import json
import re

import numpy as np
import pytest
from numpy.polynomial import Polynomial
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.data.probes.polynomials import problems
from mtp_lightning.data.probes.stories import FIRST, POOL_SIZE, SECOND, stories

NAME = re.compile(rf"\b(?:{'|'.join(FIRST)})(?:{'|'.join(SECOND)})\b")


class Other:
    """The same arithmetic by numpy's polynomials, which know no remainders until the end."""

    def __init__(self, polynomial):
        whole = [round(value) % 7 for value in polynomial.coef[:5]]
        self.inner = Polynomial([*whole, *[0] * (5 - len(whole))])

    def __neg__(self):
        return Other(-self.inner)

    def __add__(self, other):
        return Other(self.inner + other.inner)

    def __mul__(self, other):
        return Other(self.inner * other.inner)

    def __matmul__(self, other):
        return Other(self.inner(other.inner))


def test_results_are_those_of_numpy():
    rows = [*problems(150, 3, is_test=False), *problems(15, 3, is_test=True, num_pauses=2)]
    seen = set()
    for row in rows:
        question = row["prompt"].removesuffix("=").rstrip(".")
        source = re.sub(r"\d{5}", lambda found: f"P('{found[0]}')", question).replace("o", "@")
        value = eval(source, {"P": lambda digits: Other(Polynomial([int(d) for d in digits]))})
        assert (
            "".join(f"{int(c)}" for c in np.pad(value.inner.coef, (0, 5 - len(value.inner.coef)))) == row["completion"]
        )
        assert len(re.findall(r"[-+*o]", question)) == row["operations"]
        seen |= set(question)
    assert set("-+*o()0123456") == seen


def test_operations_are_uniform_in_training_and_go_further_in_the_test():
    trained = [row["operations"] for row in problems(3000, 0, is_test=False)]
    counts = np.bincount(trained, minlength=6)
    assert (counts[1:] > 500).all()
    assert counts.sum() == counts[1:6].sum() == 3000
    for most, options in ((5, {}), (2, {"most_operations": 2})):
        tested = [row["operations"] for row in problems(3, 0, is_test=True, **options)]
        assert tested == [number for number in range(1, 2 * most + 1) for _ in range(3)]
    assert {row["operations"] for row in problems(100, 0, is_test=False, most_operations=2)} == {1, 2}


def test_names_of_the_test_are_new_and_of_known_syllables():
    trained = {name for row in stories(3000, 5, is_test=False) for name in NAME.findall(row["text"])}
    assert 0.9 * POOL_SIZE < len(trained) <= POOL_SIZE
    assert {name[:2] for name in trained} == set(FIRST)
    assert {name[2:] for name in trained} == set(SECOND)
    for row in stories(200, 5, is_test=True):
        mentioned = NAME.findall(row["text"])
        assert set(mentioned) == set(row["names"])
        assert trained.isdisjoint(mentioned)
        assert len({name[:2] for name in row["names"]}) == 2
        assert len(mentioned) > 6


@pytest.mark.parametrize("task", ["induction", "polynomial"])
def test_the_same_seed_gives_the_same_bytes(task, tmp_path):
    def written(folder, *options):
        done = CliRunner().invoke(
            app, ["data", "probe", task, str(folder), "--documents", "30", "--test", "4", *options]
        )
        assert done.exit_code == 0, done.output
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first, again, other = (written(tmp_path / str(n), "--seed", str(n // 2)) for n in range(3))
    assert first == again
    assert first["train.jsonl"] != other["train.jsonl"]
    assert first["test.jsonl"] != other["test.jsonl"]
    assert first["train.jsonl"].count(b"\n") == 30
    done = CliRunner().invoke(app, ["data", "probe", task, str(tmp_path / "0")])
    assert "must be new or empty" in done.output
    assert written(tmp_path / "0-again") == first


def test_every_word_is_one_token_and_every_name_two(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from mtp_lightning.data.probes.stories import tokenizer_json

    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json().decode())
    assert tokenizer.get_vocab_size() <= 208  # the recipes' model.vocab_size
    for first in FIRST:
        for second in SECOND:
            assert tokenizer.encode(first + second).tokens == [first, f"##{second}"]
    for row in [*stories(300, 1, is_test=False), *stories(100, 1, is_test=True)]:
        encoded = tokenizer.encode(row["text"])
        pieces = re.findall(r"\w+|[^\w\s]", row["text"])
        assert len(encoded.ids) == len(pieces) + len(NAME.findall(row["text"]))
        assert "[UNK]" not in encoded.tokens
        assert tokenizer.decode(encoded.ids) == row["text"]
    assert json.loads(tokenizer_json())["model"]["type"] == "WordPiece"

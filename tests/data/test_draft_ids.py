"""Which ids are drafted: counted once over the training targets, or read from a file; the end of a document always."""

from collections import Counter

import numpy as np
import pytest

from mtp_lightning.data.loading.draft_ids import choose_draft_ids, most_frequent, read_ids
from mtp_lightning.data.loading.factory import open_rows, prepare_data
from mtp_lightning.data.shards import token_counts as counting
from mtp_lightning.errors import DataError
from tests.support.tiny import tiny_recipe

END = 256


def recipe_in(folder, wanted, **data):
    return tiny_recipe(
        model={"vocab_size": 260},
        heads={"draft_vocabulary": wanted},
        data={"corpus": ["stdlib:json"], "validation_fraction": 0.2} | data,
        run={"cache": str(folder)},
    )


def test_the_most_frequent_ids_are_those_of_the_training_split(tmp_path, capsys):
    recipe = recipe_in(tmp_path, 30)
    ids = choose_draft_ids(recipe)
    prepare_data(recipe)
    rows = open_rows(recipe, "train")
    counts = Counter(rows.read(np.arange(len(rows)))["tokens"][:, : recipe.data.seq_len].flatten().tolist())
    expected = {token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:29]}
    assert len(ids) == 30
    assert END in ids
    assert len({*ids} - expected) <= 2, "rows leave the last tokens of a shard out"
    assert list(ids) == sorted(ids)
    assert "30 of 260 ids" in capsys.readouterr().err


def test_counts_are_kept_and_damage_is_counted_again(tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path, 30)
    ids = choose_draft_ids(recipe)
    (kept,) = tmp_path.glob("token-counts-*.npz")
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2])
    assert choose_draft_ids(recipe) == ids
    assert kept.read_bytes() == content
    monkeypatch.setattr(counting, "_targets", None)
    assert choose_draft_ids(recipe) == ids, "counted again"


def test_more_ids_than_occur_are_filled_up(tmp_path, capsys):
    assert choose_draft_ids(recipe_in(tmp_path, 259)) == (*range(257), 257, 258)
    assert "do not occur there" in capsys.readouterr().err


def test_the_end_of_a_document_takes_the_place_of_the_rarest():
    shares = np.array([0.5, 0.1, 0.3, 0.1])
    assert most_frequent(shares, 2, end=1) == (0, 1)
    assert most_frequent(shares, 4, end=1) == (0, 1, 2, 3)


@pytest.mark.parametrize(("name", "text"), [("ids.json", "[5, 3, 9]"), ("ids.txt", "5\n3, 9\n")])
def test_a_file_of_ids(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert choose_draft_ids(recipe_in(tmp_path, str(tmp_path / name))) == (3, 5, 9, END)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("no.json", None, "no such file"),
        ("a.json", b"{}", "something other than a list"),
        ("a.json", b"[1, true]", "something other than a list"),
        ("a.json", b"[1,", "no JSON"),
        ("a.txt", b"", "no id"),
        ("a.txt", b"1 2 x", "'x' in place of an id"),
        ("a.txt", b"1 -2", "'-2' in place of an id"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"1 2 260", "id 260, and the model's are 0 to 259"),
        ("a.json", b"[1, -1]", "id -1"),
        ("a.txt", b"1 2 1", "id 1 twice"),
        ("", None, "a folder"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, content, found):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="heads.draft_vocabulary must name a file of token ids") as caught:
        read_ids(tmp_path / name, 260)
    assert found in caught.value.found

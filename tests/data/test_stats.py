"""Statistics are those of the documents themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.stats import bins_of, lengths_of, show_statistics
from mtp_lightning.errors import DataError
from tests.data.corpora import build_tiny, is_held_out, write_corpus


@given(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=50))
def test_bins_hold_every_document_where_it_belongs(lengths: list[int]) -> None:
    bins = bins_of(np.array(lengths, dtype="<u4"))
    for one in bins:
        inside = [length for length in lengths if one.low_tokens <= length < 2 * one.low_tokens]
        assert (one.num_documents, one.num_tokens) == (len(inside), sum(inside))
    assert sum(one.num_documents for one in bins) == len(lengths)


def test_lengths_are_those_of_the_documents(corpus: Path, shards: Path) -> None:
    documents = write_corpus(corpus)
    manifest = load_manifest(shards)
    assert sorted(lengths_of(shards, manifest)) == sorted(len(text) + 1 for text in documents.values())
    held_out = [len(text) + 1 for name, text in documents.items() if is_held_out(name, 0.3)]
    assert lengths_of(shards, manifest, "validation").tolist() == held_out


def test_counts_are_shown_by_folder_and_source(
    tmp_path: Path, corpus: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": "x" * 99}) for _ in range(30)]
    (tmp_path / "more.jsonl").write_text("\n".join(lines))
    manifest = build_tiny([str(corpus), "more.jsonl"], Path("both"))
    capsys.readouterr()
    show_statistics([Path("shards"), Path("both")], picture=Path("pictures/lengths.png"))
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    own = lengths_of(Path("shards"), load_manifest(Path("shards")))
    total = own.sum() * 2 + 3000
    assert ["shards", "40", f"{own.sum():,}", f"{own.sum() / total:.1%}"] in [cells[:4] for cells in shown]
    assert ["corpus", "40", f"{own.sum():,}", f"{own.sum() / total:.1%}"] in shown
    assert ["more.jsonl", "30", "3,000", f"{3000 / total:.1%}"] in shown
    both = next(cells for cells in shown if cells[:2] == ["both", "70"])
    every = [*own, *[100] * 30]
    assert both[4:7] == [f"{np.mean(every):,.1f}", f"{np.median(every):,.0f}", "100"]
    assert both[7] == f"{manifest.num_tokens('validation') / np.sum(every):.1%}"
    bar = next(cells for cells in shown[-12:] if cells[:3] == ["64", "-", "127"])
    assert bar[3] == str(sum(length >= 64 for length in every))
    assert set(bar[-1]) == {"█"}
    assert Path("pictures/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must have its manifest"):
        show_statistics([tmp_path], picture=None)

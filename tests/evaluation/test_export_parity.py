"""An export that is not the model is not published: every way of getting a head wrong is seen by `--verify`."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mtp_lightning.checkpoint.export import formats, write
from mtp_lightning.checkpoint.export.contents import Contents, Source
from mtp_lightning.checkpoint.export.names import SPELLINGS, FormatName, format_named
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.cli.app import app
from mtp_lightning.errors import CheckpointError
from mtp_lightning.evaluation.export_parity import check_parity, predicted_accepts
from mtp_lightning.recipe.draft_vocabulary import packed_ids
from tests.checkpoint.runs import save_run
from tests.decode.oracles import trained_model_of
from tests.support.tiny import HEAD_KINDS, tiny_recipe

RECIPE = tiny_recipe(heads=HEAD_KINDS["sequential"], data={"seq_len": 40})


@dataclass
class Tampered:
    """Weights of which some are others."""

    weights: WeightSource
    change: Callable[[str, Tensor], Tensor]

    @property
    def names(self) -> list[str]:
        return [*self.weights.names]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        for start, values in self.weights.blocks(name):
            yield start, self.change(name, values)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_run(tmp_path / "run", RECIPE, 1, model=trained_model_of("sequential").float())
    return tmp_path / "run"


def tampering(monkeypatch: pytest.MonkeyPatch, change: Callable[[Contents], Contents], name: str = "hf_mtp") -> None:
    row = formats.FORMATS[FormatName(name)]
    assert row.write is not None
    honest = row.write

    def wrong(source: Source) -> dict[str, Contents]:
        return {inside: change(one) for inside, one in honest(source).items()}

    monkeypatch.setattr(write, "FORMATS", {**formats.FORMATS, row.name: replace(row, write=wrong)})


def zeroed(name: str, values: Tensor) -> Tensor:
    return torch.zeros_like(values) if "layers.5.eh_proj" in name else values


def drawn_anew(name: str, values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    is_head = "layers.4." in name and values.numel() > 16
    return torch.randn(values.shape, generator=generator) * 0.3 if is_head else values


def nudged(name: str, values: Tensor) -> Tensor:
    return values * 1.01 if "layers.3.hnorm" in name else values


def of_the_trunk(name: str, values: Tensor) -> Tensor:
    return values * 1.01 if "layers.1.self_attn.q_proj" in name else values


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (zeroed, "offset 4, by mtp import"),
        (drawn_anew, "offset 3, by mtp import"),
        (nudged, "offset 2, by mtp import"),
        (of_the_trunk, "by mtp import"),
    ],
)
def test_weights_that_are_not_the_models(change, found, run, tmp_path, monkeypatch):
    tampering(monkeypatch, lambda one: replace(one, weights=Tampered(one.weights, change)))
    with pytest.raises(CheckpointError, match="must give the scores of the model") as refused:
        export_model(run, tmp_path / "out", "hf_mtp", check=check_parity)
    assert found in refused.value.found
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export_model(run, tmp_path / "out", "hf_mtp")  # without --verify nobody looks


@pytest.mark.parametrize(("change", "what"), [(zeroed, "drafts"), (drawn_anew, "drafts"), (of_the_trunk, "scores")])
def test_transformers_alone_sees_it_too(change, what, run, tmp_path, monkeypatch):
    row = formats.FORMATS[FormatName.hf_mtp]
    monkeypatch.setattr(formats, "FORMATS", {row.name: replace(row, reread=None)})
    export_model(run, tmp_path / "right", "hf_mtp", check=check_parity)
    tampering(monkeypatch, lambda one: replace(one, weights=Tampered(one.weights, change)))
    with pytest.raises(CheckpointError, match=f"must give the .*{what}.*by transformers"):
        export_model(run, tmp_path / "out", "hf_mtp", check=check_parity)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right", "run"]


def test_settings_that_make_another_model(run, tmp_path, monkeypatch):
    for wrong in ({"rope_theta": 100.0}, {"rms_norm_eps": 0.1}, {"num_nextn_predict_layers": 2, "num_mtp_layers": 2}):
        with monkeypatch.context() as patch:
            tampering(patch, lambda one, wrong=wrong: replace(one, settings={**one.settings, **wrong}))
            with pytest.raises(CheckpointError):
                export_model(run, tmp_path / "out", "hf_mtp", check=check_parity)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_parameter_without_a_word_fails_any_export(run, tmp_path, monkeypatch):
    def forgetful(one: Contents) -> Contents:
        return replace(one, written={name: to for name, to in one.written.items() if "norms.1" not in name})

    tampering(monkeypatch, forgetful)
    with pytest.raises(CheckpointError, match="must account for every tensor; found no word of unembedding.norms.1"):
        export_model(run, tmp_path / "out", "hf_mtp")
    tampering(monkeypatch, lambda one: replace(one, written={}, left_out=dict.fromkeys(one.written, "why")))
    with pytest.raises(CheckpointError, match=r"no word of lm_head.weight, model.embed_tokens"):
        export_model(run, tmp_path / "out", "hf_mtp")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_a_judge_nothing_is_verified(run, tmp_path, monkeypatch):
    row = formats.FORMATS[FormatName.hf_mtp]
    deaf = replace(row, reread=None, engines=(replace(row.engines[0], judge=lambda folder, probe: "it is not there"),))
    monkeypatch.setattr(write, "FORMATS", {row.name: deaf})
    with pytest.raises(CheckpointError, match="--verify must have a judge; found it is not there"):
        export_model(run, tmp_path / "out", "hf_mtp", check=check_parity)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_verb_verifies(run, tmp_path):
    arguments = ["export", str(run), "--out", str(tmp_path / "out"), "--format", "hf_mtp", "--verify"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Verified by mtp import: scores of 4 offsets within" in result.stdout
    told = json.loads((tmp_path / "out/parity.json").read_text())
    assert len(told["text"]) == 32
    assert sum(told["predicted_accepted"]) > 0


def test_a_draft_vocabulary_is_kept_where_the_format_keeps_it(tmp_path):
    ids = [0, 1, 3, 5, 7, 9, 11]
    for kind, name in (("parallel", "hf_mtp"), ("parallel", "eagle"), ("medusa_replicated", "medusa")):
        heads = HEAD_KINDS[kind] | {"draft_vocabulary": len(ids), "draft_token_ids": packed_ids(ids)}
        save_run(tmp_path / kind, tiny_recipe(heads=heads, data={"seq_len": 40}), 1)
        export_model(tmp_path / kind, tmp_path / name, name, dtype="bf16", check=check_parity)


def test_kept_drafts_are_counted_as_by_hand():
    """Text 1 2 3 4 5 6 7 8 after a prompt of two; the second offset is right but at 4, the third wrong at 6 too."""
    right = torch.eye(10)
    text = [*range(1, 10)]
    second, third = (right[[min(one + k - 1, 9) for one in text]].clone() for k in (2, 3))
    assert predicted_accepts({1: right, 2: second, 3: third}, 2, text, 6) == [0, 0, 0, 0, 0]
    second, third = (right[[min(one + k, 9) for one in text]] for k in (2, 3))
    assert predicted_accepts({1: right, 2: second, 3: third}, 2, text, 6) == [2, 2]
    third = third.roll(1, 0)
    assert predicted_accepts({1: right, 2: second, 3: third}, 2, text, 6) == [1, 1, 1]
    assert predicted_accepts({1: right}, 2, text, 6) == []


def test_other_words_for_a_format_are_told_what_it_is_called_here(tmp_path):
    for name, words in SPELLINGS.items():
        for word in (*words.split(), name.value.upper(), name.value.replace("_", "-") + " "):
            if word != name.value:
                with pytest.raises(ValueError, match=f"It is called {name.value} here: --format {name.value}"):
                    format_named(word)
    for told, meant in (("hf", "trunk"), ("gguf", "gguf-ready"), ("hf-mtp", "hf_mtp"), ("hf_mtpp", "hf_mtp")):
        result = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "out"), "--format", told])
        assert result.exit_code == 2
        assert f"--format {meant}" in " ".join(result.stderr.replace("│", " ").split())
    with pytest.raises(ValueError, match="not 'onnx'$"):
        format_named("onnx")
    assert [format_named(name.value) for name in FormatName] == [*FormatName] == [*formats.FORMATS]
    words = " ".join(SPELLINGS.values()).split()
    assert len({*words}) == len(words)

"""Training on kept states of a frozen trunk: the same numbers to the bit, from files that are whole, of this trunk."""

import os
import zlib

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.errors import TrainingError
from mtp_lightning.model import kept_states
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.kept_states import HEADER_BYTES, KeptStates, trunk_digest
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support.covering import every_pair
from tests.support.runs import ROOT, figures, mtp
from tests.support.tiny import HEAD_KINDS, gradients_of, tiny_model, tiny_recipe, tiny_rows

RECIPE = """
extends: {root}/recipes/debug/parallel.yaml
heads: {{num_offsets: 3, kind: sequential, layers_from_trunk: false}}
freeze: [offsets_below_2]
objective: {{distill: {{}}}}
optimizer: {{warmup_steps: 0, min_lr_ratio: 1.0}}
data: {{corpus: [{texts}], validation_fraction: 0.4, seq_len: 32}}
batch: {{global_batch_size: 8, micro_batch_size: 4}}
run: {{validate_every_steps: 4, validation_samples: 4, threads: 1, cache: {cache}, steps: 8}}
checkpoint: {{every_steps: 4}}
logging: {{every_steps: 1, loggers: [csv]}}
"""
ADAPTATIONS = {
    "trunk": {"freeze": ["trunk"]},
    "main_head": {"freeze": ["offsets_below_2"]},
    "taught": {"freeze": ["offsets_below_2"], "objective": {"distill": {}}},
    "main_head_taught": {"freeze": ["trunk"], "objective": {"distill": {"detach_teacher": False}, "balance": "rms"}},
    "rollout": {"freeze": ["offsets_below_2"], "objective": {"rollout": {"probability": 0.5}}},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / f"texts/{number}.txt").write_text(f"{number} times {number} is {number * number}. " * 10)
    (folder / "recipe.yaml").write_text(RECIPE.format(root=ROOT, cache=folder / "cache", texts=folder / "texts"))
    return folder


@pytest.fixture
def forwards(monkeypatch):
    """Shapes of what the trunk is run on."""
    shapes, run = [], kept_states.MtpModel.trunk_states

    def counted(model, embedded, geometry):
        shapes.append(tuple(embedded.shape))
        return run(model, embedded, geometry)

    monkeypatch.setattr(kept_states.MtpModel, "trunk_states", counted)
    return shapes


def run(here, name, *overrides, cache="states"):
    more = [f"memory.cache_hidden_states={here / cache}"] if cache else []
    recipe = load_recipe(here / "recipe.yaml", [f"run.dir={here / name}", *more, *overrides])
    assert train(recipe) == 0
    return figures(here / name / "metrics.csv"), dict(load_model(here / name)[1].named_parameters())


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])] == []


def test_runs_are_equal_to_the_bit_and_later_ones_leave_the_trunk_alone(here, forwards):
    """Whole runs: first with nothing kept, then with all."""
    expected = run(here, "plain", cache=None)
    without = len(forwards)
    assert_same(run(here, "first"), expected)
    first = len(forwards) - without
    assert_same(run(here, "second"), expected)
    assert first < without
    assert len(forwards) - without - first == 1  # what is kept is compared with once


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_ranks_share_what_is_kept(here, stage):
    ranks = (f"strategy.kind={stage}", "strategy.ranks_per_node=2")

    def run_ranks(name, *overrides):
        recipe = str(here / "recipe.yaml")
        done = mtp("train", recipe, f"run.dir={here / name}", *ranks, *overrides, cwd=here, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return figures(here / name / "metrics.csv"), dict(load_model(here / name)[1].named_parameters())

    expected = run_ranks(f"{stage}-plain")
    cache = f"memory.cache_hidden_states={here / stage}"
    assert_same(run_ranks(f"{stage}-first", cache), expected)
    (folder,) = (here / stage).iterdir()
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert len(written) == 2
    assert_same(run_ranks(f"{stage}-second", cache), expected)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == written


def opened(folder, recipe, model, num_rows=0):
    digest = trunk_digest(model, recipe, lambda parameters: torch.no_grad())
    kept = KeptStates(folder / digest, Ranks(), num_rows)
    model.kept_states = kept.states
    return kept


@every_pair(full=True, kind=HEAD_KINDS, adaptation=ADAPTATIONS, masks=(False, True))
def test_gradients_are_equal_to_the_bit(kind, adaptation, masks, tmp_path, forwards):
    sections = ADAPTATIONS[adaptation]
    if kind == "anticausal" and sections["freeze"] != ["trunk"]:
        sections = sections | {"freeze": ["trunk"]}
    if "rollout" in sections.get("objective", {}) and kind not in ("sequential", "sequential_pre_norm", "recursive"):
        kind = "sequential"
    recipe = tiny_recipe(
        model={"num_hidden_layers": 9}, heads=HEAD_KINDS[kind], data={"document_mask": masks}, **sections
    )
    model = tiny_model(recipe, torch.float32)
    freeze(model, recipe)
    rows = tiny_rows(recipe, 4)
    losses, expected = gradients_of(model, recipe, rows)
    for _ in range(2):
        opened(tmp_path, recipe, model)
        for _ in range(2):
            found, gradients = gradients_of(model, recipe, rows)
            assert all(torch.equal(a.nll_sums, b.nll_sums) for a, b in zip(found, losses, strict=True))
            assert gradients.keys() == expected.keys()
            assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert len(forwards) == 2 + 2 + 1


def states_of(model, rows):
    tokens, documents, _ = rows
    embedded = model.embed(tokens)
    return model.states_of_rows(tokens, documents, embedded, model.geometry(documents, like=embedded))[0]


@pytest.fixture
def tiny():
    recipe = tiny_recipe(freeze=["trunk"], data={"document_mask": True})
    model = tiny_model(recipe, torch.float32)
    return recipe, model, tiny_rows(recipe, 2)


def test_what_was_not_written_whole_is_computed_again(tiny, tmp_path, forwards):
    recipe, model, rows = tiny
    expected = states_of(model, rows)
    opened(tmp_path, recipe, model)
    states_of(model, rows)
    (path,) = tmp_path.glob("*/*")
    content = path.read_bytes()
    record = len(content) // 2
    for damaged in (content[:-1], content[: record + 7], content[:-4] + bytes(4), content[:3], b""):
        path.write_bytes(damaged)
        opened(tmp_path, recipe, model)
        before = len(forwards)
        for _ in range(2):
            assert torch.equal(states_of(model, rows), expected)
        assert len(forwards) == before + 1
        for added in set(tmp_path.glob("*/*")) - {path}:
            added.unlink()


def test_the_same_tokens_in_other_documents_or_by_other_weights_are_other_states(tiny, tmp_path):
    recipe, model, (tokens, documents, mask) = tiny
    opened(tmp_path, recipe, model)
    one = states_of(model, (tokens, documents, mask))
    other = states_of(model, (tokens, torch.zeros_like(documents), mask))
    assert not torch.equal(one, other)
    model.kept_states = None
    assert torch.equal(other, states_of(model, (tokens, torch.zeros_like(documents), mask)))
    with torch.no_grad():
        next(model.trunk.layers.parameters())[0] += 2**-20
    changed = states_of(model, (tokens, documents, mask))
    opened(tmp_path, recipe, model)
    assert torch.equal(states_of(model, (tokens, documents, mask)), changed)
    assert len(list(tmp_path.iterdir())) == 2


def test_states_of_another_program_are_refused(tiny, tmp_path):
    recipe, model, rows = tiny
    opened(tmp_path, recipe, model)
    states_of(model, rows)
    (path,) = tmp_path.glob("*/*")
    content = bytearray(path.read_bytes())
    record = len(content) // 2
    states = torch.frombuffer(content, dtype=torch.float32)[HEADER_BYTES // 4 : record // 4]
    states *= 1.5
    content[16:20] = zlib.crc32(content[HEADER_BYTES:record]).to_bytes(4, "little")
    path.write_bytes(content)
    opened(tmp_path, recipe, model)
    with pytest.raises(TrainingError, match="others, 50.0% apart, in .*remove that folder"):
        states_of(model, rows)


def test_too_little_room_is_told_before_and_while_writing(tiny, small_disk):
    recipe, model, rows = tiny
    opened(small_disk, recipe, model, num_rows=10**9)
    with pytest.raises(TrainingError, match="must be written to .* MiB free where .* MiB may be needed. Make room"):
        states_of(model, rows)
    opened(small_disk, recipe, model)
    states_of(model, rows)
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
    rows = tuple(torch.cat(parts) for parts in zip(*(tiny_rows(recipe, 2, seed) for seed in range(1, 9)), strict=True))
    with pytest.raises(TrainingError, match="must be written to .*No space left on device"):
        states_of(model, rows)

"""`mtp preflight`: every line ok on a machine that is, and what is wrong named before two steps are spent on it."""

import pytest
import torch

from mtp_lightning.decode import steps
from mtp_lightning.decode.verify import AcceptResult
from mtp_lightning.diagnostics.preflight_trial import Failure, check_decoding, run_check
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT, mtp

RECIPE = str(ROOT / "recipes/debug/parallel.yaml")
NAMES = ["versions", "devices", "network", "run", "shards", "room", "training", "decode"]


def preflight(cwd, *fields):
    return mtp("preflight", RECIPE, "run.dir=run", "run.cache=cache", *fields, cwd=cwd)


def lines_of(done):
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[1]: words[0] for words in lines if words and words[0] in ("ok", "FAIL")}


def test_all_is_well_and_nothing_stays_behind(tmp_path):
    done = preflight(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines_of(done) == dict.fromkeys(NAMES, "ok")
    assert "the same weights to the bit" in done.stdout
    assert "12 of 12 tokens with decoder blockwise as without drafts" in done.stdout
    assert list((tmp_path / "run/logs").iterdir()) == []


def test_a_model_that_does_not_fit_is_found_before_it_is_built(tmp_path):
    done = preflight(tmp_path, "model.hidden_size=65536", "model.num_hidden_layers=200")
    assert done.returncode == 6, done.stdout + done.stderr
    found = lines_of(done)
    assert found["devices"] == found["room"] == "FAIL"
    assert "training" not in found
    assert "needed by `mtp plan`" in done.stdout


def test_missing_shards_and_a_folder_that_is_a_file_are_found_together(tmp_path):
    (tmp_path / "run").write_text("")
    done = preflight(tmp_path, "data.shards=nowhere")
    assert done.returncode == 6, done.stdout + done.stderr
    found = lines_of(done)
    assert found["run"] == found["shards"] == "FAIL"
    assert "nowhere" in done.stdout


def test_what_nccl_and_cuda_say_is_a_line_too(capsys):
    def refuse(recipe, device):
        raise RuntimeError("NCCL error: invalid usage\nDuplicate GPU detected")

    line = run_check("network", refuse, None, torch.device("cpu"))
    assert line.hint
    printed = capsys.readouterr()
    assert printed.out.startswith("FAIL network      rank 0 on ")
    assert "RuntimeError: NCCL error: invalid usage. Look at" in printed.out
    assert "Duplicate GPU detected" in printed.err


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_agree(tmp_path):
    done = preflight(tmp_path, "strategy.kind=zero2", "strategy.ranks_per_node=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines_of(done) == dict.fromkeys(NAMES, "ok")
    assert "sums over 2 ranks are right" in done.stdout
    assert "12 of 12 tokens" in done.stdout


def test_drafts_that_change_the_text_are_found(tmp_path, monkeypatch):
    """Keep as many tokens as there are drafts, whatever the main head says."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(RECIPE, ["run.dir=run", "run.cache=cache"]).recipe
    assert train(load_recipe(RECIPE, ["run.dir=there/run", "run.cache=cache", "run.steps=2"])) == 0

    def keep_others(logits, drafts):
        others = (drafts + 1) % logits.shape[-1]
        kept = torch.full((len(drafts),), drafts.shape[1])
        return AcceptResult(kept, torch.cat((others, logits[:, -1:].argmax(-1)), 1))

    monkeypatch.setattr(steps, "accept_greedy", keep_others)
    with pytest.raises(Failure, match="of 12 tokens with decoder blockwise"):
        check_decoding(recipe, tmp_path / "there", torch.device("cpu"))

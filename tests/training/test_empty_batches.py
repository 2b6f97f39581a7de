"""A global batch without a token to learn changes nothing and ends nothing; it is counted."""

import json

import pytest

from mtp_lightning.checkpoint.convert.load_model import load_model
from tests.support.runs import ROOT, figures, mtp

RECIPE = str(ROOT / "recipes/debug/parallel.yaml")
STEPS = 24
FIELDS = (
    "data.shards=sft",
    "data.seq_len=256",
    "batch.global_batch_size=2",
    "batch.micro_batch_size=2",
    f"run.steps={STEPS}",
    "logging.every_steps=1",
    f"run.validate_every_steps={STEPS}",
    "optimizer.warmup_steps=0",
    "run.validation_samples=2",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Long prompts with answers of two bytes: most windows hold nothing to learn."""
    folder = tmp_path_factory.mktemp("shards")
    lines = [{"prompt": f"{number:04d} " * 400, "completion": "ok"} for number in range(300)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = mtp("data", "build", "--out", "sft", "sft.jsonl", "--validation-fraction", "0.1", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(
    "kind", ["single", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("zero1", "zero2", "zero3"))]
)
def test_steps_without_a_target_have_no_effect_and_are_counted(shards, kind):
    done = mtp("train", RECIPE, *FIELDS, f"strategy.kind={kind}", f"run.dir={kind}", cwd=shards)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = figures(shards / kind / "metrics.csv")
    skipped = [int(float(row["skipped_steps"])) for row in rows]
    assert 0 < skipped[-1] < STEPS
    steps = [before < after for before, after in zip([0, *skipped], skipped, strict=False)]
    losses = [row["train/loss_1"] for row in rows]
    assert [loss in ("", "nan") for loss in losses] == steps  # exactly where there is a loss, something is learnt
    assert done.stdout.count("skipped: no token to learn in rows") == skipped[-1].bit_length()
    assert f"{skipped[-1]} of the first {STEPS} global batches have no token to learn" in done.stderr
    if kind != "single":
        alone = dict(load_model(shards / "single")[1].named_parameters()) if (shards / "single").exists() else {}
        for name, parameter in dict(load_model(shards / kind)[1].named_parameters()).items():
            assert not alone or (parameter - alone[name]).abs().max() < 1e-4

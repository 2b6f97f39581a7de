"""Law 18: an exported model gives, in its reader's hands, the greedy text, scores and kept drafts that it gives here.

A row of CASES is a head kind in a format that must hold it; every other pair must be refused by name.
"""

import json
from pathlib import Path

import pytest
import torch

from mtp_lightning.checkpoint.export.formats import FORMATS
from mtp_lightning.checkpoint.export.names import FormatName
from mtp_lightning.checkpoint.export.write import PARITY, REPORT, export_model
from mtp_lightning.errors import CheckpointError
from mtp_lightning.evaluation.export_parity import check_parity
from mtp_lightning.recipe import Recipe
from tests.checkpoint.runs import save_run
from tests.decode.oracles import trained_model_of
from tests.support.covering import chosen, some_of
from tests.support.tiny import HEAD_KINDS, tiny_recipe

pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install mtp_lightning[transformers]"
)

CASES: dict[tuple[str, str], dict[str, object]] = {
    **{("hf_mtp", kind): {} for kind in HEAD_KINDS},
    ("mimo", "sequential_pre_norm"): {},
    ("qwen3_5", "sequential"): {"family": "qwen3", "qk_norm": True, "head_dim": 4},
    ("qwen3_5", "recursive"): {"family": "qwen3", "qk_norm": True, "head_dim": 4},
    ("gguf-ready", "sequential"): {"family": "qwen3", "qk_norm": True, "head_dim": 4},
    ("eagle", "parallel"): {},
    ("eagle", "causal"): {},
    ("eagle", "anticausal"): {},
    ("eagle", "linear"): {},
    ("medusa", "medusa"): {},
    ("medusa", "medusa_replicated"): {},
    ("medusa", "linear"): {"vocab_size": 40, "tie_word_embeddings": True},
}
"""By format and head kind: what the model section must say beside, for the format to hold it."""
SECOND_ALONE = {
    *(("mimo", "sequential_pre_norm"), ("qwen3_5", "sequential"), ("gguf-ready", "sequential")),
    *(("eagle", kind) for kind in ("parallel", "causal", "linear")),
}
"""Where the format holds the second offset and leaves out the further ones."""
WITHOUT_HEADS = ("consolidated", "trunk")


def recipe_of(kind: str, **model: object) -> Recipe:
    return tiny_recipe(heads=HEAD_KINDS[kind], data={"seq_len": 40}, model=model)


READ = [*CASES, *(("trunk", kind) for kind in ("parallel", "causal", "medusa"))]
DAILY = chosen(READ[::-1], 1)  # every format and every kind, rare formats first


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*one, marks=() if one in DAILY else pytest.mark.slow) for one in READ]
)
def test_its_reader_says_what_the_model_says(name: str, kind: str, tmp_path: Path) -> None:
    settings = CASES.get((name, kind), {})
    recipe = recipe_of(kind, **settings)
    model = trained_model_of(kind).float() if not settings else None  # its drafts are often right, and often not
    save_run(tmp_path / "run", recipe, 1, model=model)
    export_model(tmp_path / "run", tmp_path / "out", name, check=check_parity)
    told = json.loads((tmp_path / "out" / PARITY).read_text())
    heard = [one for one in told["judges"] if "judge" in one]
    assert heard
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    lost = [one for one in report["left_out"] if one.startswith("heads.")]
    assert name in WITHOUT_HEADS or bool(lost) == ((name, kind) in SECOND_ALONE)
    if name not in WITHOUT_HEADS:
        assert any("accepted" in one for one in heard)
        assert not model or 0 < sum(told["predicted_accepted"]) < 3 * len(told["predicted_accepted"])
    assert {*report["written"], *report["left_out"]} == dict(model_parameters(recipe)).keys()


def model_parameters(recipe: Recipe) -> list[tuple[str, torch.Tensor]]:
    from mtp_lightning.model.mtp_model import MtpModel

    with torch.device("meta"):
        return [*MtpModel(recipe).named_parameters()]


@pytest.mark.parametrize("kind", some_of(HEAD_KINDS, one_in=2))
def test_every_pair_is_held_or_refused_with_the_formats_that_hold_it(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(kind)
    save_run(tmp_path / "run", recipe, 1)
    holding = {name for name, row in FORMATS.items() if row.refuses(recipe) is None}
    assert {"consolidated", "trunk"} <= holding
    assert {name for name, one in CASES if one == kind and not CASES[name, one]} <= holding
    for name in FormatName:
        if name in holding:
            export_model(tmp_path / "run", tmp_path / name, name)
            assert (tmp_path / name / "model.safetensors").is_file()
        else:
            with pytest.raises(CheckpointError, match=f"{name} cannot hold this model") as refused:
                export_model(tmp_path / "run", tmp_path / name, name)
            assert all(other in refused.value.hint for other in holding)
            assert not (tmp_path / name).exists()

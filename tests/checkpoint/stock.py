"""Exported folders in the hands of stock transformers: loaded with the code in them, and asked for texts."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.decode import generate
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe
from tests.checkpoint.runs import save_run
from tests.support.tiny import tiny_model, tiny_recipe

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [12]]
NEW_TOKENS = 20
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "gpt_neox": {
        "num_key_value_heads": None,
        "partial_rotary_factor": 0.5,
        "norm": "layer",
        "mlp": "gelu",
        "parallel_residual": True,
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True),
    },
}
"""Families of trunks that transformers has a class for, and what is peculiar to each."""


class Said(NamedTuple):
    """Texts of PROMPTS, and the forward passes of the trunk behind each prompt's own."""

    texts: list[list[int]]
    steps: list[int]


def tiny(family: str, heads: dict[str, Any], prompts: Any = None, **model: Any) -> tuple[Recipe, MtpModel]:
    """A random model whose heads are right at times, and wrong at times: of the first seed that gives one."""
    section = {"family": family, "initializer_range": 0.15, **FAMILIES[family], **model}
    return first_right(lambda seed: tiny_recipe(heads=heads, model=section, run={"seed": seed}), tiny_model, prompts)


def first_right(
    recipe_of: Callable[[int], Recipe], build: Callable[[Recipe, torch.dtype], MtpModel], prompts: Any = None
) -> tuple[Recipe, MtpModel]:
    """Build models of one seed after another, until some drafts of one are kept, but not all."""
    for seed in range(50):
        recipe = recipe_of(seed)
        model = build(recipe, torch.float32).requires_grad_(requires_grad=False)
        lean_on_tokens(model, recipe)
        main, *others = model.unembedding.lm_heads.parameters()
        for matrix in others:  # start from the main head's, as in training
            matrix *= 0.1
            matrix += main
        if 0 < kept_share(model, prompts or PROMPTS) < 1:
            return recipe, model
    raise AssertionError("no seed gives drafts that are right at times")


def kept_share(model: MtpModel, prompts: list[list[int]]) -> float:
    """Share of the drafts that are kept."""
    told = [generate(model, [prompt], max_new_tokens=NEW_TOKENS).statistics for prompt in prompts]
    return sum(one.num_accepted_tokens for one in told) / sum(one.num_draft_tokens for one in told)


def lean_on_tokens(model: MtpModel, recipe: Recipe) -> None:
    """Let modules lean on the token in between, as the trunk does: then some of their drafts are right."""
    width = recipe.model.hidden_size
    tokens = slice(width) if recipe.heads.concatenation == "embedding_first" else slice(width, None)
    for name, matrix in model.named_parameters():
        if name.endswith("eh_proj.weight"):
            matrix *= 0.5
            matrix[:, tokens] += torch.eye(width)


def exported(recipe: Recipe, model: MtpModel, folder: Path, **options: Any) -> Path:
    """Save a model as a run, and export it."""
    save_run(folder / "run", recipe, 1, model=model)
    export_model(folder / "run", folder / "out", "hf_mtp", **options)
    return folder / "out"


class Blocked:
    """Finds no part of this package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "mtp_lightning":
            raise ModuleNotFoundError(name)


@contextmanager
def without_this_package() -> Iterator[None]:
    """Let every import of this package fail for a while."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mtp_lightning"}
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    for name in kept:
        del sys.modules[name]
    try:
        yield
    finally:
        del sys.meta_path[0]
        sys.modules.update(kept)


def loaded(folder: Path, **options: Any) -> Any:
    """Load a folder with its code; every tensor must be known and found."""
    transformers = pytest.importorskip("transformers")
    options = {"trust_remote_code": True, "dtype": torch.float32} | options
    with without_this_package():
        model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
    model.generation_config.eos_token_id = None
    return model.eval()


def said_by(model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> Said:
    """Let a model of transformers go on from every prompt, greedily unless told otherwise."""
    forwards: list[int] = []
    hook = model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    texts, steps = [], []
    for prompt in prompts:
        forwards.clear()
        texts.append(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
        steps.append(len(forwards) - 1)
    hook.remove()
    return Said(texts, steps)


def assert_drafts_as_ours(theirs: Any, model: MtpModel, prompts: list[list[int]] = PROMPTS) -> None:
    """Check that texts are those of plain greedy, theirs and ours, in as many steps as ours take."""
    made = [generate(model, [prompt], max_new_tokens=NEW_TOKENS) for prompt in prompts]
    plain, drafted = said_by(theirs, prompts), said_by(theirs, prompts, use_mtp=True)
    assert plain.steps == [NEW_TOKENS - 1] * len(prompts)
    assert drafted.texts == plain.texts == [one.tokens[0] for one in made]
    assert drafted.steps == [one.statistics.num_drafts for one in made]
    assert any(steps < NEW_TOKENS - 1 for steps in drafted.steps)
    assert any((one.statistics.num_accepted_tokens < one.statistics.num_draft_tokens) for one in made)

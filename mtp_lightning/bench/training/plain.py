"""A training step beside the loop that one would write with transformers' own model: `mtp bench plain`.

Both train the same model of one offset on the same tokens, in turn, in one process: here the step of this package,
there a forward pass with labels, a backward pass, clipping and `torch.optim.AdamW` as they come. Matrix products and
attention are the same calls in both, so they bound what can be gained: the more of a step they are, the nearer the
ratio is to one.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from mtp_lightning.bench.machine import describe_machine
from mtp_lightning.bench.training.cells import build_cells, describe_shape
from mtp_lightning.bench.training.rounds import seconds_of
from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.checkpoint.huggingface.families import settings_of
from mtp_lightning.console.tables import console, watched, write_json
from mtp_lightning.errors import CheckpointError, Fault, RecipeError
from mtp_lightning.model.transformers_library import library
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.device import prepare_device


@dataclass(frozen=True)
class PlainFigures:
    """What both took: seconds of a step, a number per pair."""

    plain_s: list[float]
    own_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the plain loop, in each pair."""
        return [plain / own for plain, own in zip(self.plain_s, self.own_s, strict=True)]


class PlainStep:
    """One optimizer step of transformers' own model, on the batch of a step of ours."""

    def __init__(self, own: TrainingStep) -> None:
        self.own, section = own, own.recipe.optimizer
        self.model = plain_model(own.recipe).to(own.device)
        self.parameters = [*self.model.parameters()]
        beta1, beta2 = section.betas
        self.optimizer = torch.optim.AdamW(
            self.parameters, section.lr, (beta1, beta2), eps=section.eps, weight_decay=section.weight_decay
        )

    def run(self) -> None:
        """Accumulate the gradients of the micro-batches, clip them, and step."""
        recipe, tokens = self.own.recipe, self.own.tokens
        for rows in torch.split(tokens, recipe.batch.micro_batch_size):
            with torch.autocast(self.own.device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
                output = self.model(input_ids=rows[:, :-1], labels=rows[:, :-1], shift_labels=rows[:, 1:].contiguous())
            (output.loss * len(rows) / len(tokens)).backward()
        if recipe.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain_model(recipe: Recipe) -> torch.nn.Module:
    """Build transformers' model of the shape that a recipe's trunk and main head have.

    Raises:
        CheckpointError: No family of transformers has it, or transformers is not installed.
    """
    try:
        family, settings = settings_of(recipe.model)
    except CheckpointError as error:
        raise CheckpointError(
            "a model beside a plain loop must be one that a family of transformers can be",
            error.found,
            "Name a recipe whose model `mtp export --format trunk` can write.",
        ) from error
    settings["use_cache"] = False
    kind = settings.pop("model_type", family)
    model: torch.nn.Module = library().AutoModelForCausalLM.from_config(
        library().AutoConfig.for_model(kind, **settings), dtype=torch.float32
    )
    return model.train()


def bench_plain(recipe: Recipe, *, pairs: int, json_path: Path | None) -> None:
    """Measure both in turn, and print how many times as fast ours is.

    Raises:
        RecipeError: The recipe asks for what the plain loop does not do.
    """
    _check(recipe)
    device = prepare_device(recipe)
    machine = describe_machine(device)
    own_recipe = build_cells(recipe, [1], ["sequential"])[0].recipe
    figures = measured(TrainingStep(own_recipe, device), pairs)
    screen = console()
    screen.print(f"A step beside a plain loop over transformers' model: {recipe.name}, n=1", style="bold")
    screen.print(
        describe_shape(own_recipe),
        f"plain loop {median(figures.plain_s):.3f} s, here {median(figures.own_s):.3f} s a step",
        f"{median(figures.ratios):.3f} times as fast, median of {pairs} pairs from {min(figures.ratios):.3f} to "
        f"{max(figures.ratios):.3f}",
        f"Measured on {machine}.",
        sep="\n",
    )
    told = {"benchmark": "plain", "machine": asdict(machine), "recipe": own_recipe.model_dump(mode="json")}
    write_json(json_path, told | asdict(figures) | {"ratio": median(figures.ratios)})


def measured(own: TrainingStep, pairs: int) -> PlainFigures:
    """Time steps of both by turns, the first of a pair once the one and once the other, after one of each untimed."""
    plain = PlainStep(own)
    steps: list[Callable[[], None]] = [plain.run, lambda: own.run("sequential", predicts=False)]
    figures = PlainFigures([], [])
    with watched(2 * pairs) as report:
        report("first steps, not timed", done=0)
        for step in steps:
            step()
        for number in range(pairs):
            report(f"pair {number + 1} of {pairs}", done=2 * number)
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                (figures.plain_s, figures.own_s)[which].append(seconds_of(steps[which], own.device))
    return figures


def _check(recipe: Recipe) -> None:
    asked: dict[str, tuple[object, object]] = {
        "optimizer.kind": (recipe.optimizer.kind, "adamw"),
        "adapt.lora": (recipe.adapt.lora, None),
        "freeze": (recipe.freeze, []),
    }
    faults = [
        Fault(
            path=field,
            expected=f"must be {json.dumps(wanted)} beside a plain loop, which trains every weight with AdamW",
            found=str(value),
            origin="mtp bench plain",
            hint=f"Set {field}={json.dumps(wanted)}",
        )
        for field, (value, wanted) in asked.items()
        if value != wanted
    ]
    if faults:
        raise RecipeError(faults)

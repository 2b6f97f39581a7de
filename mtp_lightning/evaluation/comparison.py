"""Runs side by side: what each recipe reached, over its seeds, and how far the seeds leave that open."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mtp_lightning.console.plots import label_of, save_picture
from mtp_lightning.errors import RunFolderError
from mtp_lightning.evaluation.kept_reports import MARGINAL, OF_PROBES
from mtp_lightning.evaluation.marginal import MarginalReport
from mtp_lightning.evaluation.probes import ProbeReport
from mtp_lightning.evaluation.spread import Spread, spread
from mtp_lightning.files.untrusted import OddFileError, described, open_regular, read_object, reason_of
from mtp_lightning.launch.status import current_phase
from mtp_lightning.training.logging.metrics_files import Row, read_rows

PREFIX = "val/"
MOST_OFFSETS = 1024  # each is a column
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "recipe": lambda value: isinstance(value, str),
    "seed": lambda value: type(value) is int,
    "num_offsets": lambda value: type(value) is int and 1 <= value <= MOST_OFFSETS,
    "tokens": lambda value: type(value) is int and value >= 0,
}
Content = TypeVar("Content")


@dataclass(frozen=True)
class RunFigures:
    """Figures of one run's last validation, by their columns in metrics.csv without `val/`."""

    recipe: str
    seed: int
    tokens: int
    num_offsets: int
    figures: dict[str, float]
    marginal: MarginalReport | None = None  # what `mtp eval marginal` has measured; its top accuracies are in figures
    probes: tuple[ProbeReport, ...] = ()  # what `mtp eval induction` and `polynomial` have; accuracies are in figures


@dataclass(frozen=True)
class Group:
    """All runs of one recipe."""

    recipe: str
    seeds: tuple[int, ...]
    tokens: tuple[int, ...]  # the different numbers among its runs
    num_offsets: int
    figures: dict[str, Spread]
    loss_change: Spread | None  # of the main head, against the first group, seed by seed; None without common seeds
    marginal: MarginalReport | None = None  # of one of its runs
    probes: tuple[ProbeReport, ...] = ()  # of its first run


def read_run(folder: Path) -> RunFigures:
    """Read what a run has reached, of one in phases what the last that has begun.

    Raises:
        RunFolderError: It is no run folder, one of its files is damaged, or nothing has been validated yet.
    """
    last_phase = current_phase(folder)
    summary = _read(last_phase / "summary.json", read_object)
    validated = [row for row in _read(last_phase / "metrics.csv", _rows) if f"{PREFIX}loss_1" in row]
    if not validated:
        raise _refusal(f"no validation in {last_phase / 'metrics.csv'}")
    last = validated[-1]
    told = {**summary, "tokens": last.get("tokens")}
    for name, is_right in FIELDS.items():
        if not is_right(told.get(name)):
            raise _refusal(
                f"{name}: {described(told.get(name))}, in summary.json or the last validation of {last_phase}"
            )
    figures = {name.removeprefix(PREFIX): value for name, value in last.items() if name.startswith(PREFIX)}
    marginal = MARGINAL.read(folder)
    probes = tuple(report for keeper in OF_PROBES.values() if (report := keeper.read(folder)))
    for of in marginal.offsets if marginal else ():
        figures[f"marginal_top_{of.offset}"] = of.marginal_top
        figures |= {} if of.head_top is None else {f"head_top_{of.offset}": of.head_top}
    figures |= {f"{report.probe}_{own.group}": own.value for report in probes for own in report.accuracies}
    return RunFigures(told["recipe"], told["seed"], told["tokens"], told["num_offsets"], figures, marginal, probes)


def _read(path: Path, reader: Callable[[Path], Content]) -> Content:
    try:
        return reader(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _refusal(f"no {path.name} in {path.parent}") from None
    except (OSError, OddFileError) as error:
        raise _refusal(f"{reason_of(error)}, in {path}") from None


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open_regular(path):  # a FIFO would be waited for
        pass
    try:
        return read_rows(path)
    except (csv.Error, ValueError) as error:
        raise OddFileError(f"no table of figures ({error})") from None


def compare(runs: Iterable[RunFigures]) -> list[Group]:
    """Group runs by the name of their recipe, in the order given.

    Raises:
        RunFolderError: Two runs of one recipe have the same seed, or another number of offsets; or `mtp eval marginal`
            has measured them on other texts or in another way.
    """
    by_recipe: dict[str, dict[int, RunFigures]] = {}
    for run in runs:
        of_seed = by_recipe.setdefault(run.recipe, {})
        if run.seed in of_seed or any(other.num_offsets != run.num_offsets for other in of_seed.values()):
            raise RunFolderError(
                "runs that share a recipe's name must differ in their seed, and in nothing else",
                f"{run.recipe} with seed {run.seed} and {run.num_offsets} offsets beside another of that name",
                "Give the changed recipe another name (name=...), or leave one of them out.",
            )
        of_seed[run.seed] = run
    _check_same_question([run for of_seed in by_recipe.values() for run in of_seed.values()])
    _check_same_problems([run for of_seed in by_recipe.values() for run in of_seed.values()])
    first = next(iter(by_recipe.values()), {})
    return [_group(recipe, of_seed, first) for recipe, of_seed in by_recipe.items()]


def _check_same_question(runs: Iterable[RunFigures]) -> None:
    asked = {
        (of.texts_sha256, len(of.offsets), of.top, of.nucleus, of.most_paths): f"{run.recipe}, seed {run.seed}"
        for run in runs
        if (of := run.marginal) is not None
    }
    if len(asked) > 1:
        raise RunFolderError(
            "runs to be compared must be measured on the same held-out texts, in the same way",
            f"other texts or settings for {' than for '.join(asked.values())}",
            "Give mtp eval marginal all runs at once; data.* and heads.num_offsets must be the same for all recipes.",
        )


def _check_same_problems(runs: Iterable[RunFigures]) -> None:
    asked: dict[str, dict[str, str]] = {}
    for run in runs:
        for report in run.probes:
            asked.setdefault(report.probe, {})[report.data_sha256] = f"{run.recipe}, seed {run.seed}"
    for probe, places in asked.items():
        if len(places) > 1:
            raise RunFolderError(
                f"runs to be compared must be measured on the same file of {probe}",
                f"other problems for {' than for '.join(places.values())}",
                f"Give mtp eval {probe} all runs at once.",
            )


def _group(recipe: str, runs: dict[int, RunFigures], first: dict[int, RunFigures]) -> Group:
    names = sorted(set.intersection(*(set(run.figures) for run in runs.values())))
    common = [seed for seed in runs if seed in first]
    changes = [runs[seed].figures["loss_1"] - first[seed].figures["loss_1"] for seed in common]
    return Group(
        recipe,
        tuple(runs),
        tuple(sorted({run.tokens for run in runs.values()})),
        next(iter(runs.values())).num_offsets,
        {name: spread([run.figures[name] for run in runs.values()]) for name in names},
        spread(changes) if changes else None,
        next((run.marginal for run in runs.values() if run.marginal), None),
        next(iter(runs.values())).probes,
    )


def as_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Put groups into what JSON can hold."""
    return [
        {
            "recipe": group.recipe,
            "seeds": group.seeds,
            "tokens": group.tokens,
            "figures": {name: figure._asdict() for name, figure in group.figures.items()},
            "main_head_loss_change": None if group.loss_change is None else group.loss_change._asdict(),
        }
        for group in groups
    ]


def draw(groups: Sequence[Group], path: Path) -> None:
    """Draw cumulative acceptance by offset, left, and the main head's loss, right, with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for place, group in enumerate(groups):
        offsets = range(2, group.num_offsets + 1)
        accepted = {k: group.figures[name] for k in offsets if (name := f"acceptance_rate_{k}") in group.figures}
        means, margins = [own.mean for own in accepted.values()], [own.margin or 0.0 for own in accepted.values()]
        left.errorbar([*accepted], means, yerr=margins, marker="o", capsize=3, label=label_of(group.recipe))
        loss = group.figures["loss_1"]
        right.errorbar([place], [loss.mean], yerr=[loss.margin or 0.0], marker="o", capsize=3)
    left.set(title="Drafts accepted up to an offset", xlabel="offset", ylabel="share of positions")
    right.set(title="Loss of the main head", ylabel="nats per token")
    right.set_xticks(range(len(groups)), [label_of(group.recipe) for group in groups])
    left.legend()
    save_picture(figure, path, "--plot")


def _refusal(found: str) -> RunFolderError:
    return RunFolderError(
        "runs to be compared must have ended, or stopped, after a validation",
        found,
        "Give folders of runs (run.dir), and let each reach a validation.",
    )

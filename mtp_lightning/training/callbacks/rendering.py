"""The live view and the plain lines as text: what is shown, not when."""

import math

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtp_lightning.training.callbacks.columns import ROLES
from mtp_lightning.training.progress import Progress, bits_unit

BLANK = "-"


def live_view(progress: Progress) -> RenderableType:
    """Build the whole view: a row per offset, the state of the run, a bar."""
    return Group(
        offsets_table(progress),
        *(Text(line, no_wrap=True, overflow="ellipsis") for line in status_lines(progress)),
        ProgressBar(total=progress.total_steps, completed=progress.step),
    )


def offsets_table(progress: Progress) -> Table:
    """Build a table with a row per offset, training beside validation."""
    num_offsets = progress.recipe.heads.num_offsets
    unit = bits_unit(progress.recipe).removeprefix("bits")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    heads = ["\noffset", "loss\nnats", f"loss\nbits{unit}", "top-1\nlabel"]
    if num_offsets > 1:
        heads += ["agrees\nwith main", "accepted\ncond.", "accepted\ncumul."]
    heads += ["val loss\nnats"] + (["val acc.\ncumul."] if num_offsets > 1 else [])
    for head in heads:
        table.add_column(head, justify="right", style="bold" if head.startswith("val") else "", no_wrap=True)
    for k in range(1, num_offsets + 1):
        table.add_row(*_offset_row(progress, k))
    return table


def _offset_row(progress: Progress, k: int) -> list[str]:
    train, validation = progress.train, progress.validation
    loss = train.get(f"train/loss_{k}")
    cells = [str(k), number(loss), number(loss and loss / math.log(2)), share(train.get(f"train/label_accuracy_{k}"))]
    if progress.recipe.heads.num_offsets > 1:
        kinds = ("agreement", "conditional_acceptance", "cumulative_acceptance")
        cells += [share(train.get(f"train/{kind}_{k}")) for kind in kinds]
    cells.append(number(validation.get(f"val/loss_{k}")))
    if progress.recipe.heads.num_offsets > 1:
        cells.append(share(validation.get(f"val/cumulative_acceptance_{k}")))
    return cells


def status_lines(progress: Progress) -> list[str]:
    """State the run in three short lines."""
    train = progress.train
    norms = "  ".join(f"{role} {number(train.get(f'grad_norm/{role}'), '.2g')}" for role in ROLES)
    length = number(progress.validation.get("val/accepted_length"), ".2f")
    validated = f"{length} at step {progress.validated_step:,}" if progress.validated_step else BLANK
    best = f" (best {progress.best_length:.2f} at {progress.best_step:,})" if progress.best_step else ""
    saved = f"step {progress.saved_step:,}" if progress.saved_step else BLANK
    return [
        f"gradient norm  {norms}   lr {number(train.get('lr'), '.2e')}",
        f"accepted length  train {number(train.get('train/accepted_length'), '.2f')}  val {validated}{best}"
        f"   checkpoint {saved}",
        f"step {progress.step:,}/{progress.total_steps:,}  {count(progress.tokens)} tokens"
        f"  {count(train.get('tokens_per_s'))} tokens/s  {number(train.get('memory_gib'), '.2f')} GiB"
        f"  ETA {duration(progress.eta_s)}",
    ]


def plain_line(progress: Progress) -> str:
    """Put a logged step on one line."""
    train = progress.train
    return "  ".join(
        [
            f"step {progress.step}/{progress.total_steps}",
            f"{count(progress.tokens)} tokens",
            *_figures(train, "train", progress.recipe.heads.num_offsets),
            f"{count(train.get('tokens_per_s'))} tokens/s",
            f"ETA {duration(progress.eta_s)}",
        ]
    )


def plain_validation(progress: Progress) -> str:
    """Put a validation on one line."""
    figures = _figures(progress.validation, "val", progress.recipe.heads.num_offsets)
    return "  ".join([f"validation at step {progress.validated_step}", *figures])


def _figures(metrics: dict[str, float], split: str, num_offsets: int) -> list[str]:
    offsets = range(1, num_offsets + 1)
    figures = ["loss " + " ".join(number(metrics.get(f"{split}/loss_{k}")) for k in offsets)]
    if num_offsets > 1:
        accepted = " ".join(share(metrics.get(f"{split}/cumulative_acceptance_{k}")) for k in offsets[1:])
        figures.append(f"accepted {accepted}")
        figures.append(f"length {number(metrics.get(f'{split}/accepted_length'), '.2f')}")
    return figures


def number(value: float | None, form: str = ".3f") -> str:
    """Format a figure that may be missing."""
    return BLANK if value is None or math.isnan(value) else format(value, form)


def share(value: float | None) -> str:
    """Format a share of positions as a percentage."""
    return number(value, ".1%")


def count(value: float | None) -> str:
    """Format a count with three digits.

    >>> count(1_640_000)
    '1.64M'
    """
    if value is None or math.isnan(value):
        return BLANK
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format a time span.

    >>> duration(3725)
    '1:02:05'
    """
    if not math.isfinite(seconds):
        return BLANK
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

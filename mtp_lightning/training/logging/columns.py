"""Names and order of the figures of a run."""

from collections.abc import Iterable

from mtp_lightning.model import roles as model_roles
from mtp_lightning.model.draft_vocabulary import OUTSIDE
from mtp_lightning.training.step.times import PARTS

DRIFT_FIGURES = ("nll_change", "nll_change_low", "nll_change_high", "kl", "flips")
ROLES = (*model_roles.ROLES, "all")


def metric_columns(num_offsets: int, sources: Iterable[str] = (), *, has_draft_vocabulary: bool = False) -> list[str]:
    """Columns of metrics.csv for n offsets, for the sources of a mixture, and for a draft vocabulary.

    >>> metric_columns(1)[:5]
    ['step', 'tokens', 'lr', 'train/loss_1', 'train/label_accuracy_1']
    """
    outside = [f"{OUTSIDE}_{k}" for k in range(2, num_offsets + 1)] if has_draft_vocabulary else []
    return [
        "step",
        "tokens",
        "lr",
        *_figures("train", num_offsets),
        *(f"train/divergence_{k}" for k in range(2, num_offsets + 1)),
        *(f"train/off_text_{k}" for k in range(3, num_offsets + 1)),
        *(f"train/{name}" for name in outside),
        "train/router_loss",
        *(f"grad_norm/{role}" for role in ROLES),
        "tokens_per_s",
        "mfu",
        "memory_gib",
        *(f"time/{part}{of}_s" for part in PARTS for of in ("", "_min", "_max")),
        "skipped_steps",
        "rollbacks",
        *_figures("val", num_offsets),
        "val/router_loss",
        *_sampled(num_offsets),
        *(f"val/{name}" for name in outside),
        *(f"{name}@{source}" for source in sources for name in _of_source(num_offsets)),
        *(f"val/{name}@{source}" for source in sources for name in outside),
        *(f"drift/{name}" for name in DRIFT_FIGURES),
    ]


def _sampled(num_offsets: int) -> list[str]:
    names = [f"{kind}_{k}" for kind in ("overlap", "sampled_acceptance_rate") for k in range(2, num_offsets + 1)]
    return [f"val/{name}" for name in (*names, "sampled_acceptance_length")]


def _of_source(num_offsets: int) -> list[str]:
    names = [*_figures("val", num_offsets), *_sampled(num_offsets)]
    return [name for name in names if not name.startswith("val/loss_")]


def _figures(split: str, num_offsets: int) -> list[str]:
    first_offsets = {
        "loss": 1,
        "label_accuracy": 1,
        "agreement": 2,
        "conditional_acceptance_rate": 2,
        "acceptance_rate": 2,
    }
    names = [f"{kind}_{k}" for kind, first in first_offsets.items() for k in range(first, num_offsets + 1)]
    return [f"{split}/{name}" for name in (*names, "mean_acceptance_length")]


def as_number(value: object) -> int | float | None:
    """Read a figure; None for what is no number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None

"""Names and order of the figures of a run."""

GUARD_FIGURES = ("nll_change", "nll_change_low", "nll_change_high", "kl", "flips")
ROLES = ("trunk", "heads", "unembedding", "all")


def metric_columns(num_offsets: int) -> list[str]:
    """Columns of metrics.csv for n offsets.

    >>> metric_columns(1)[:5]
    ['step', 'tokens', 'lr', 'train/loss_1', 'train/label_accuracy_1']
    """
    return [
        "step",
        "tokens",
        "lr",
        *_figures("train", num_offsets),
        *(f"train/divergence_{k}" for k in range(2, num_offsets + 1)),
        *(f"grad_norm/{role}" for role in ROLES),
        "tokens_per_s",
        "memory_gib",
        "skipped_steps",
        "rollbacks",
        *_figures("val", num_offsets),
        *(f"val/{kind}_{k}" for kind in ("overlap", "sampled_acceptance") for k in range(2, num_offsets + 1)),
        "val/sampled_length",
        *(f"guard/{name}" for name in GUARD_FIGURES),
    ]


def _figures(split: str, num_offsets: int) -> list[str]:
    first_offsets = {
        "loss": 1,
        "label_accuracy": 1,
        "agreement": 2,
        "conditional_acceptance": 2,
        "cumulative_acceptance": 2,
    }
    names = [f"{kind}_{k}" for kind, first in first_offsets.items() for k in range(first, num_offsets + 1)]
    return [f"{split}/{name}" for name in (*names, "accepted_length")]


def as_number(value: object) -> int | float | None:
    """Read a figure; None for what is no number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None

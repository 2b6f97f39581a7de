"""Check targets while a run trains: shifted as defined in the first steps, and some for every offset.

Users of other frameworks have lost weeks to targets shifted by one, prompts trained as answers and tokens leaking
across documents. A fault stops the run.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.targets import IGNORE, count_targets, oracle_targets

ORACLE_STEPS = 2  # steps after every start whose targets are compared
ORACLE_ROWS = 4  # rows of each that go through the slow oracle
MOST_MISSES = 100  # global batches without a target after which an offset is taken not to have any


def check_targets(tokens: Tensor, documents: Tensor, loss_mask: Tensor | None, targets: Tensor) -> None:
    """Compare fast targets, (N, B, T), and their counts with the slow oracle on the first rows of a batch.

    Raises:
        TrainingError: Naming the first row, offset and position that differ, or the offset whose count does.
    """
    num_rows = min(ORACLE_ROWS, len(tokens))
    expected = torch.stack([_oracle_row(tokens, documents, loss_mask, row, len(targets)) for row in range(num_rows)], 1)
    found = targets[:, :num_rows].cpu()  # (N, rows, T)
    for offset, row, position in (found != expected).nonzero()[:1].tolist():
        raise TrainingError(
            "the target of offset k at position t must be token t+k of the same document, if the loss mask allows",
            f"{_shown(found[offset, row, position])} instead of {_shown(expected[offset, row, position])} "
            f"at row {row}, offset {offset + 1}, position {position}",
            "Do not train on this data path; look at the row with `mtp data peek` and report the difference.",
        )
    valid = (expected != IGNORE).flatten(1).sum(1)
    counted = count_targets(targets[:, :num_rows]).cpu()
    for offset in (counted != valid).nonzero().flatten()[:1].tolist():
        raise TrainingError(
            "each offset's loss must be divided by the number of its own valid targets",
            f"{int(counted[offset])} counted where {int(valid[offset])} are valid, at offset {offset + 1}",
            "Do not train with this count: every gradient of the offset would be scaled by the ratio of the two.",
        )


def _oracle_row(tokens: Tensor, documents: Tensor, loss_mask: Tensor | None, row: int, num_offsets: int) -> Tensor:
    mask = None if loss_mask is None else loss_mask[row].tolist()
    return torch.tensor(oracle_targets(tokens[row].tolist(), documents[row].tolist(), num_offsets, mask))


def _shown(target: Tensor) -> str:
    return "no target" if int(target) == IGNORE else f"token {int(target)}"


class TargetCountCheck:
    """Counts global batches in which an offset has no target: single ones are no fault, many from the start are."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.misses: Counter[int] = Counter()  # global batches before the first that has a target

    def look(self, counts: Sequence[int], weights: Sequence[float]) -> list[float]:
        """Return the weights of those offsets that have a valid target in this global batch, 0 for the others.

        Raises:
            TrainingError: Naming offsets that have had none in any of many batches.
        """
        pairs = list(zip(counts, weights, strict=True))
        self.seen |= {offset for offset, (count, _) in enumerate(pairs, start=1) if count}
        lacking = [offset for offset, (_, weight) in enumerate(pairs, start=1) if weight and offset not in self.seen]
        self.misses.update(lacking)
        empty = [offset for offset in lacking if self.misses[offset] >= MOST_MISSES]
        if empty:
            raise TrainingError(
                "every trained offset must have a valid target now and then",
                f"none at offset {', '.join(map(str, empty))} in the first {MOST_MISSES} global batches",
                "Raise batch.global_batch_size or data.seq_len, predict fewer offsets (heads.num_offsets), "
                "or look at the loss mask with `mtp data peek`.",
            )
        return [weight if count else 0.0 for count, weight in pairs]

"""Checks that every run makes of itself: are the targets right, do gradients arrive, and all of each.

The field's users have lost weeks to targets shifted by one, prompts trained as answers, tokens leaking across
documents, and heads that never changed. The checks run on the first steps of every start and stop the run.
"""

import math
from collections.abc import Iterable
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor

from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.targets import IGNORE, count_targets, oracle_targets
from mtp_lightning.model.lora import DOWN, UP
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.fragments import Fragment, listed

_MISSING = -1.0
_FAULTS = {_MISSING: "no gradient", math.inf: "gradient not finite", 0.0: "gradient zero"}
ORACLE_STEPS = 2  # steps after every start whose targets are compared
ORACLE_ROWS = 4  # rows of each that go through the slow oracle
WAVE_ENTRIES = 2**18  # of a gradient that are looked at together
ROUNDING, COARSE_ROUNDING = 1e-2, 5e-2  # of a gradient's norm: how far sums may lie apart; coarse below fp32


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


def check_counts(counts: Tensor, weights: list[float]) -> None:
    """Refuse a global batch in which an offset that has a weight has no valid target.

    Raises:
        TrainingError: Naming the offsets.
    """
    pairs = zip(counts.tolist(), weights, strict=True)
    empty = [offset for offset, (count, weight) in enumerate(pairs, start=1) if weight and not count]
    if empty:
        raise TrainingError(
            "every trained offset must have at least one valid target in each global batch",
            f"none at offset {', '.join(map(str, empty))}",
            "Raise batch.rows or data.window_tokens, predict fewer offsets (heads.num_offsets), "
            "or look at the loss mask with `mtp data peek`.",
        )


class GradientArrival:
    """Watches that every trainable parameter receives a finite, non-zero gradient and moves.

    A parameter is settled by the first step at which it is expected to be trained: one that belongs to offsets of
    weight 0 (a curriculum, say) waits until they are switched on. The whole watch ends when all are settled. What
    a rank holds of a parameter is a fragment of it, so ranks compare notes: all of them make the same calls.
    """

    def __init__(self, model: MtpModel, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.pending = [name for name, p in model.named_parameters() if p.requires_grad]
        self.probes: dict[str, tuple[Tensor, Tensor]] = {}  # index of the fragment's largest gradient, value there

    def before_step(self, weights: list[float], fragments: Iterable[Fragment]) -> None:
        """Look at the gradients of a step, before clipping and the optimizer.

        Raises:
            TrainingError: Naming the parameters whose gradient is missing, zero or not finite.
        """
        if not self.pending:
            return
        idle = self._idle(weights)
        self.watched = [name for name in self.pending if name not in idle]
        peaks = dict.fromkeys(self.watched, _MISSING)
        for fragment in fragments:
            if fragment.name in peaks:
                peaks[fragment.name] = max(peaks[fragment.name], self._probe(fragment))
        largest = self.ranks.max(torch.tensor(list(peaks.values()), dtype=torch.float64))
        faults: dict[str, list[str]] = {}
        for name, peak in zip(self.watched, largest.tolist(), strict=True):
            if peak in _FAULTS:
                faults.setdefault(_FAULTS[peak], []).append(name)
        if faults:
            raise TrainingError(
                "every trainable parameter must receive a finite, non-zero gradient in its first optimizer step",
                "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items()),
                "Freeze what is not meant to train, or report the schedule, head kind and strategy that lose it.",
            )

    def after_step(self, fragments: Iterable[Fragment]) -> None:
        """Check that what had a gradient has moved, and stop watching it.

        Raises:
            TrainingError: Naming the parameters that have not moved.
        """
        if not self.pending:
            return
        moved = dict.fromkeys(self.watched, 0.0)
        for fragment in fragments:
            if fragment.name in self.probes:
                index, before = self.probes[fragment.name]
                moved[fragment.name] = float(fragment.weight[index] != before)
        has_moved = self.ranks.max(torch.tensor(list(moved.values()))).tolist()
        still = [name for name, has in zip(self.watched, has_moved, strict=True) if not has]
        if still:
            raise TrainingError(
                "every parameter with a gradient must move in an optimizer step",
                f"no change of {listed(still)}",
                "Check that the optimizer holds these parameters and that their learning rate is not zero "
                "(optimizer.lr, optimizer.lr_scale).",
            )
        self.pending = [name for name in self.pending if name not in moved]
        self.probes.clear()

    @torch.no_grad()
    def _probe(self, fragment: Fragment) -> float:
        """Return the largest gradient of a fragment, and remember where it is."""
        gradient = fragment.gradient
        if gradient is None or not gradient.numel():
            return _MISSING
        if not bool(gradient.isfinite().all()):
            return math.inf
        index = gradient.abs().argmax()
        if gradient[index] != 0:
            self.probes[fragment.name] = (index, fragment.weight[index].clone())
        return float(gradient[index].abs())

    def _idle(self, weights: list[float]) -> set[str]:
        """Parameters that serve only offsets of weight 0, and halves of low-rank updates whose other is zero yet."""
        heads, unembedding = self.model.heads, self.model.unembedding
        users: dict[int, set[int]] = {}  # id of a parameter -> offsets that it serves
        for offset in heads.offsets:
            for parameter in self._own_parameters(offset):
                users.setdefault(id(parameter), set()).update(heads.subtree(offset))
            for parameter in unembedding.parameters_of(offset):
                users.setdefault(id(parameter), set()).add(offset)
        active = {offset for offset, weight in enumerate(weights, start=1) if weight > 0}
        idle = {
            name for name, parameter in self.model.named_parameters() if not users.get(id(parameter), active) & active
        }
        return idle | {name for name in self.pending if name.removesuffix(DOWN) + UP in self.pending and DOWN in name}

    def _own_parameters(self, offset: int) -> Iterable[Tensor]:
        mixture = [self.model.mixtures[str(offset)]] if str(offset) in self.model.mixtures else []
        for module in [*self.model.heads.modules_of(offset), *mixture]:
            yield from module.parameters()


class GradientSums:
    """Watches in the first step that the optimizer receives the sum of what all backward passes have computed.

    Where a strategy does not gather the passes of a step, it may keep one of the gradients of a parameter and lose
    the others: what arrives is then neither missing nor zero. So every gradient is looked at as autograd hands it
    out, before the strategy sees it, and its product with two waves is kept, whose frequency is drawn from the
    parameter's name. Products add up over passes, micro-batches and ranks as gradients do; they must end as those of
    the optimizer's gradient. Holds a few MiB for a moment; nothing is left of it after the first step.
    """

    def __init__(self, model: MtpModel, ranks: Ranks) -> None:
        self.ranks = ranks
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rounding = [COARSE_ROUNDING if p.dtype.itemsize < 4 else ROUNDING for p in trainable.values()]
        self.noted = {name: torch.zeros(3, dtype=torch.float64, device=ranks.device) for name in trainable}
        self.hooks = [p.register_hook(partial(self._note, name)) for name, p in trainable.items()]  # type: ignore[no-untyped-call]

    def compare(self, fragments: Iterable[Fragment]) -> None:
        """Compare the gradients of the first step, before clipping and the optimizer, with what was noted.

        Raises:
            TrainingError: Naming the parameters whose gradient is not the sum of what was computed.
        """
        if not self.hooks:
            return
        delivered = {name: torch.zeros_like(sums) for name, sums in self.noted.items()}
        for fragment in fragments:
            if fragment.gradient is not None:
                products = _products(fragment.name, fragment.gradient, fragment.start)
                delivered[fragment.name] += products.to(delivered[fragment.name].device)
        own = torch.stack((torch.stack(list(self.noted.values())), torch.stack(list(delivered.values()))))
        (computed, found), size = self.ranks.sum(own).cpu().unbind(), self.ranks.size  # (parameters, 3) each
        norms = torch.maximum(computed[:, 2].sqrt() / size, found[:, 2].sqrt())
        apart = (found - computed / size)[:, :2].abs().amax(1)
        is_wrong = apart > norms * torch.tensor(self.rounding, dtype=torch.float64)
        wrong = [name for name, is_so in zip(self.noted, is_wrong.tolist(), strict=True) if is_so]
        if wrong:
            raise TrainingError(
                "the gradient that the optimizer uses must be the sum of those that the backward passes compute",
                f"another one of {listed(wrong)}",
                "Do not train with this strategy and schedule: try `mtp doctor --strategies`, remove raw keys from "
                "strategy.deepspeed, or report it.",
            )
        self._end()

    def forget(self) -> None:
        """Begin anew with the next step: this one overflowed, and is skipped."""
        for sums in self.noted.values():
            sums.zero_()

    @torch.no_grad()
    def _note(self, name: str, gradient: Tensor) -> None:
        self.noted[name] += _products(name, gradient.reshape(-1), 0)

    def _end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.noted.clear()


@torch.no_grad()
def _products(name: str, values: Tensor, start: int) -> Tensor:
    """Products of flat entries of a parameter, from `start` on, with its cosine, its sine and themselves: (3,)."""
    frequency = 0.5 + 2 * int.from_bytes(sha256(name.encode()).digest()[:6], "big") / 2**48
    products = torch.zeros(3, dtype=torch.float64, device=values.device)
    for first in range(0, values.numel(), WAVE_ENTRIES):
        part = values[first : first + WAVE_ENTRIES].double()
        begin = start + first
        angles = frequency * torch.arange(begin, begin + len(part), dtype=torch.float64, device=part.device)
        products += torch.stack((part @ angles.cos(), part @ angles.sin(), part @ part))
    return products

"""Checks that every run makes of itself: are the targets right, do gradients arrive, and all of each.

The field's users have lost weeks to targets shifted by one, prompts trained as answers, tokens leaking across
documents, and heads that never changed. The checks run on the first steps of every start and stop the run.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.targets import IGNORE, count_targets, oracle_targets
from mtp_lightning.model.lora import DOWN, UP
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.roles import role_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.strategies.param_shards import Fragment, listed

_MISSING = -1.0
_STILL, _UNSEEN, _MOVED = 0.0, 1.0, 2.0  # what has become of a weight in a step
_FAULTS = {_MISSING: "no gradient", math.inf: "gradient not finite", 0.0: "gradient zero"}
ORACLE_STEPS = 2  # steps after every start whose targets are compared
ORACLE_ROWS = 4  # rows of each that go through the slow oracle
MOST_MISSES = 100  # global batches without a target after which an offset is taken not to have any
ZERO_LOOKS = 6  # at a gradient of zero, over 2^6 steps, where a matrix of zeros may be the reason
SEEN_GRADIENT = 1e-6  # far above the eps that Adam adds to a gradient's size
SHOWN_ULPS = 4  # a rate of so many units in the last place shows in any step of Adam whose gradients agree
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


class TargetArrival:
    """Watches that every offset has something to learn; single batches without are no fault, a run without is."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.misses: Counter[int] = Counter()  # global batches before the first that has a target

    def look(self, counts: list[float], weights: list[float]) -> list[float]:
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


class GradientArrival:
    """Watches that every trainable parameter receives a finite, non-zero gradient and moves.

    A parameter is settled by the first step at which it is expected to be trained: one that belongs to offsets of
    weight 0 (a curriculum, say) waits until they are switched on. The whole watch ends when all are settled. What
    a rank holds of a parameter is a fragment of it, so ranks compare notes: all of them make the same calls.

    What cannot be decided yet is looked at again, after twice as many steps each time: a gradient of zero where some
    matrix is all zeros, as in blocks that are put into a pretrained model, and behind it nothing arrives before that
    one has moved; and a weight that stays as it is where the rate is too small to show in its last digit.
    """

    def __init__(self, model: MtpModel, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.pending = [name for name, p in model.named_parameters() if p.requires_grad]
        self.watched: list[str] = []
        self.probes: dict[str, _Probe] = {}
        self.num_steps = 0
        self.due: dict[str, int] = {}  # when an undecided parameter is looked at again
        self.zeros: Counter[str] = Counter()  # looks that found a gradient of zero
        self.unseen: Counter[str] = Counter()  # looks at which the rate was too small to show

    def before_step(self, weights: list[float], fragments: Iterable[Fragment], *, scale: float = 1.0) -> None:
        """Look at the gradients of a step, before clipping and the optimizer.

        Args:
            weights: of the offsets.
            fragments: of this rank.
            scale: factor of these gradients that the optimizer will see, by clipping and loss scale.

        Raises:
            TrainingError: Naming the parameters whose gradient is missing, zero or not finite.
        """
        self.num_steps, self.scale = self.num_steps + 1, scale
        idle = self._idle(weights) if self.pending else set()
        self.watched = [name for name in self.pending if name not in idle and self.due.get(name, 0) <= self.num_steps]
        if not self.watched:
            return
        held = list(fragments)
        peaks = dict.fromkeys(self.watched, _MISSING)
        for fragment in held:
            if fragment.name in peaks:
                peaks[fragment.name] = max(peaks[fragment.name], self._probe(fragment))
        found = self.ranks.max(torch.tensor(list(peaks.values()), dtype=torch.float64)).tolist()
        largest = dict(zip(self.watched, found, strict=True))
        waiting = self._waiting([name for name, peak in largest.items() if peak == 0], held)
        faults: dict[str, list[str]] = {}
        for name, peak in largest.items():
            if peak in _FAULTS and name not in waiting:
                faults.setdefault(_FAULTS[peak], []).append(name)
        if faults:
            raise TrainingError(
                "every trainable parameter must receive a finite, non-zero gradient in its first optimizer step",
                "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items()),
                "Freeze what is not meant to train, or report the schedule, head kind and strategy that lose it.",
            )
        self.watched = [name for name in self.watched if name not in waiting]

    def _waiting(self, zeros: list[str], held: Sequence[Fragment]) -> set[str]:
        """Choose from parameters without a gradient those that a matrix of zeros may be the reason for, for a while."""
        matrices = [name for name, p in self.model.named_parameters() if not name.endswith("bias")]
        if not zeros:
            return set()
        peaks = dict.fromkeys(matrices, 0.0)
        for fragment in held:
            if fragment.name in peaks and fragment.weight.numel():
                peaks[fragment.name] = max(peaks[fragment.name], float(fragment.weight.abs().max()))
        largest = self.ranks.max(torch.tensor(list(peaks.values()), dtype=torch.float64))
        if bool(largest.all()):
            return set()
        self.zeros.update(zeros)
        waiting = {name for name in zeros if self.zeros[name] <= ZERO_LOOKS}
        self._look_again(waiting, self.zeros)
        return waiting

    def _look_again(self, names: Iterable[str], looks: Mapping[str, int]) -> None:
        self.due |= {name: self.num_steps + 2 ** (looks[name] - 1) for name in names}

    def after_step(self, fragments: Iterable[Fragment], rates: Mapping[str, float]) -> None:
        """Check that what had a gradient has moved, and stop watching it.

        Args:
            fragments: of this rank, after the step.
            rates: learning rate of each role.

        Raises:
            TrainingError: Naming the parameters that have not moved.
        """
        if not self.watched:
            return
        moved = dict.fromkeys(self.watched, _STILL)
        for fragment in fragments:
            if fragment.name in self.probes and fragment.name in moved:
                moves = self.probes[fragment.name].moves(fragment.weight, rates[role_of(fragment.name)])
                moved[fragment.name] = max(moved[fragment.name], moves)
        found = self.ranks.max(torch.tensor(list(moved.values()))).tolist()
        outcome = dict(zip(self.watched, found, strict=True))
        still = [name for name, moves in outcome.items() if moves == _STILL]
        if still:
            raise TrainingError(
                "every parameter with a gradient must move in an optimizer step",
                f"no change of {listed(still)}",
                "Check that the optimizer holds these parameters and that their learning rate is not zero "
                "(optimizer.lr, optimizer.lr_scale).",
            )
        self._note(outcome)

    def _note(self, outcome: Mapping[str, float]) -> None:
        """Settle what has moved, and look at the rest again later."""
        undecided = [name for name, moves in outcome.items() if moves == _UNSEEN]
        if undecided and not self.unseen and self.ranks.is_first:
            print(
                f"The learning rate is too small to show in {listed(undecided)}: whether they move is looked at again",
                flush=True,
            )
        self.unseen.update(undecided)
        self._look_again(undecided, self.unseen)
        self.pending = [name for name in self.pending if outcome.get(name) != _MOVED]
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
        peak = float(gradient[index].abs())
        if peak:
            self.probes[fragment.name] = _Probe(index, fragment.weight[index].clone(), peak * self.scale)
        return peak

    def _idle(self, weights: list[float]) -> set[str]:
        """Parameters that serve only offsets of weight 0, and halves of low-rank updates whose other is zero yet."""
        heads, unembedding = self.model.heads, self.model.unembedding
        users: dict[int, set[int]] = {}  # id of a parameter -> offsets that it serves
        for offset in heads.offsets:
            for parameter in self._own_parameters(offset):
                users.setdefault(id(parameter), set()).update(heads.descendants(offset))
            for parameter in unembedding.parameters_of(offset):
                users.setdefault(id(parameter), set()).add(offset)
        active = {offset for offset, weight in enumerate(weights, start=1) if weight > 0}
        idle = {
            name for name, parameter in self.model.named_parameters() if not users.get(id(parameter), active) & active
        }
        return idle | {name for name in self.pending if name.removesuffix(DOWN) + UP in self.pending and DOWN in name}

    def _own_parameters(self, offset: int) -> Iterable[Tensor]:
        mixture = [self.model.layer_mix[str(offset)]] if str(offset) in self.model.layer_mix else []
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


class _Probe(NamedTuple):
    """A weight that ought to move."""

    place: Tensor  # where the fragment's gradient is largest, 0-dimensional
    before: Tensor  # the weight there
    gradient: float  # there, as the optimizer sees it

    def moves(self, weights: Tensor, rate: float) -> float:
        """Say whether it has moved, or could not be seen to: Adam first steps by rate x gradient / (gradient + eps)."""
        if bool(weights[self.place] != self.before):
            return _MOVED
        magnitude = abs(float(self.before))
        ulp = torch.finfo(self.before.dtype).eps * 2.0 ** math.floor(math.log2(magnitude)) if magnitude else 0.0
        return _STILL if rate > SHOWN_ULPS * ulp and self.gradient > SEEN_GRADIENT else _UNSEEN


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

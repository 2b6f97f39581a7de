"""Check in the first steps of every start that gradients arrive at all parameters, and all of each.

Users of other frameworks have lost weeks to heads that never changed. A fault stops the run.
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
from mtp_lightning.model.lora import DOWN, UP
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.roles import role_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.trainable import ADDED
from mtp_lightning.training.strategies.param_shards import ParamShard, listed

_MISSING = -1.0
_STILL, _UNSEEN, _MOVED = 0.0, 1.0, 2.0  # what has become of a weight in a step
_FAULTS = {_MISSING: "no gradient", math.inf: "gradient not finite", 0.0: "gradient zero"}
FEW_TARGETS = 32  # all of them may lie where attention has a single key, which queries have no gradient from
STILL_LOOKS = 6  # at a weight that does not move, over 2^5 steps, where moments of earlier steps may be the reason
ZERO_LOOKS = 6  # at a gradient of zero, over 2^6 steps, where a matrix of zeros may be the reason
SEEN_GRADIENT = 1e-6  # far above the eps that Adam adds to a gradient's size
SHOWN_ULPS = 4  # a rate of so many units in the last place shows in any step of Adam whose gradients agree
LEAST_UPDATE = 1e-2  # of Adafactor where a gradient is largest: that of a row and a column that are large all over
PROJECTED_ENTRIES = {"cpu": 2**18}  # of a gradient that are projected at a time: what its cache holds
PROJECTED_ON_DEVICES = 2**22  # elsewhere, where each launch costs: 128 MiB, and 28,000 launches for 13 B entries
ROUNDING, COARSE_ROUNDING = 1e-2, 5e-2  # of a gradient's norm: how far sums may lie apart; coarse below fp32


class NonzeroGradientCheck:
    """Checks that every trainable parameter receives a finite, non-zero gradient and changes.

    A parameter is checked in the first step in which its loss has a weight: one that serves offsets of weight 0 only
    (a curriculum, say) waits until they are switched on. The check ends when every parameter has passed. Ranks hold
    shards, so their results are reduced: all ranks make the same calls.

    Some cases are undecided, and checked again after 1, 2, 4, ... more steps. A gradient of zero while some matrix is
    all zeros (blocks put into a pretrained model, say: no gradient passes before that matrix has changed), or while the
    global batch has few targets, or of what an adaptation adds (a mixture of layers that
    hardly differ yet, half of an update whose other half is next to zero). And a weight that stays
    as it is where the learning rate is too small to show in its last digit, or where gradients of earlier steps, that
    the optimizer remembers, may cancel the new one.

    Args:
        model: the model that is trained.
        ranks: that train it.
        has_moments: whether the optimizer goes on from earlier steps.
        is_relative: whether learning rates are relative to the size of a parameter, as those of Adafactor.
    """

    def __init__(self, model: MtpModel, ranks: Ranks, *, has_moments: bool = False, is_relative: bool = False) -> None:
        self.model, self.ranks, self.has_moments, self.is_relative = model, ranks, has_moments, is_relative
        self.pending = [name for name, p in model.named_parameters() if p.requires_grad]
        self.watched: list[str] = []
        self.probes: dict[str, _Probe] = {}
        self.num_steps = 0
        self.due: dict[str, int] = {}  # when an undecided parameter is looked at again
        self.zeros: Counter[str] = Counter()  # looks that found a gradient of zero
        self.unseen: Counter[str] = Counter()  # looks at which the rate was too small to show
        self.still: Counter[str] = Counter()  # looks at which a weight had not moved

    def before_step(
        self, weights: list[float], shards: Iterable[ParamShard], *, scale: float = 1.0, num_targets: int | None = None
    ) -> None:
        """Check the gradients of a step, before clipping and the optimizer.

        Args:
            weights: of the offsets.
            shards: of this rank.
            scale: factor of these gradients that the optimizer will see, by clipping and loss scale.
            num_targets: valid targets of all offsets in this global batch; None means many.

        Raises:
            TrainingError: Naming the parameters whose gradient is missing, zero or not finite.
        """
        self.num_steps, self.scale = self.num_steps + 1, scale
        idle = self._idle(weights) if self.pending else set()
        self.watched = [name for name in self.pending if name not in idle and self.due.get(name, 0) <= self.num_steps]
        if not self.watched:
            return
        held = list(shards)
        peaks = dict.fromkeys(self.watched, _MISSING)
        for shard in held:
            if shard.name in peaks:
                peaks[shard.name] = max(peaks[shard.name], self._probe(shard))
        found = self.ranks.max(torch.tensor(list(peaks.values()), dtype=torch.float64)).tolist()
        largest = dict(zip(self.watched, found, strict=True))
        zeros = [name for name, peak in largest.items() if peak == 0]
        is_sparse = num_targets is not None and num_targets < FEW_TARGETS
        waiting = self._waiting(zeros, held, is_sparse=is_sparse)
        faults: dict[str, list[str]] = {}
        for name, peak in largest.items():
            if peak in _FAULTS and name not in waiting:
                faults.setdefault(_FAULTS[peak], []).append(name)
        if faults:
            raise TrainingError(
                "every trainable parameter must receive a finite, non-zero gradient in its first optimizer step",
                "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items()),
                "Freeze what is not meant to train, or report the backward order, head kind and strategy that lose it.",
            )
        self.watched = [name for name in self.watched if name not in waiting]

    def _waiting(self, zeros: list[str], held: Sequence[ParamShard], *, is_sparse: bool) -> set[str]:
        """Choose the parameters whose gradient may be zero for some steps."""
        matrices = [name for name, p in self.model.named_parameters() if not name.endswith("bias")]
        if not zeros:
            return set()
        peaks = dict.fromkeys(matrices, 0.0)
        for shard in held:
            if shard.name in peaks and shard.weight.numel():
                peaks[shard.name] = max(peaks[shard.name], float(shard.weight.abs().max()))
        largest = self.ranks.max(torch.tensor(list(peaks.values()), dtype=torch.float64))
        if bool(largest.all()) and not is_sparse:
            zeros = [name for name in zeros if role_of(name) in ADDED]
        self.zeros.update(zeros)
        waiting = {name for name in zeros if self.zeros[name] <= ZERO_LOOKS}
        self._look_again(waiting, self.zeros)
        return waiting

    def _look_again(self, names: Iterable[str], looks: Mapping[str, int]) -> None:
        self.due |= {name: self.num_steps + 2 ** (looks[name] - 1) for name in names}

    def after_step(self, shards: Iterable[ParamShard], rates: Mapping[str, float]) -> None:
        """Check that parameters with a gradient have changed; those that have need no more checks.

        Args:
            shards: of this rank, after the step.
            rates: learning rate of each role.

        Raises:
            TrainingError: Naming the parameters that have not moved.
        """
        if not self.watched:
            return
        moved = dict.fromkeys(self.watched, _STILL)
        for shard in shards:
            if shard.name in self.probes and shard.name in moved:
                rate = rates[role_of(shard.name)]
                if self.is_relative:
                    rate *= LEAST_UPDATE * float(shard.weight.norm()) / math.sqrt(shard.weight.numel())
                moves = self.probes[shard.name].moves(shard.weight, rate)
                moved[shard.name] = max(moved[shard.name], moves)
        found = self.ranks.max(torch.tensor(list(moved.values()))).tolist()
        outcome = dict(zip(self.watched, found, strict=True))
        still = {name for name, moves in outcome.items() if moves == _STILL}
        if self.has_moments:
            self.still.update(still)
            waiting = {name for name in still if self.still[name] < STILL_LOOKS}
            self._look_again(waiting, self.still)
            still -= waiting
        if still:
            raise TrainingError(
                "every parameter with a gradient must move in an optimizer step",
                f"no change of {listed([name for name in outcome if name in still])}",
                "Check that the optimizer holds these parameters and that their learning rate is not zero "
                "(optimizer.lr, optimizer.lr_scale).",
            )
        self._note(outcome)

    def _note(self, outcome: Mapping[str, float]) -> None:
        """Drop the parameters that have changed, and schedule the others again."""
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
        self.has_moments = True

    @torch.no_grad()
    def _probe(self, shard: ParamShard) -> float:
        """Return the largest gradient of a shard, and keep its position and weight."""
        gradient = shard.gradient
        if gradient is None or not gradient.numel():
            return _MISSING
        if not bool(gradient.isfinite().all()):
            return math.inf
        index = gradient.abs().argmax()
        peak = float(gradient[index].abs())
        if peak:
            self.probes[shard.name] = _Probe(index, shard.weight[index].clone(), peak * self.scale)
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


class GradientChecksum:
    """Checks in the first step that the optimizer gets the sum of the gradients of all backward passes.

    A strategy that does not expect several backward passes per step may keep the gradient of one and lose the others:
    it is then neither missing nor zero. So a random projection of every gradient (two fixed vectors per parameter, a
    cosine and a sine whose frequency is a hash of the parameter's name) is summed as autograd emits it, before the
    strategy sees it, and compared with that of the gradient the optimizer gets: projections are linear, so they add up
    over passes, micro-batches and ranks as gradients do. Costs a few MiB and the first step only.
    """

    def __init__(self, model: MtpModel, ranks: Ranks) -> None:
        self.ranks = ranks
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rounding = [COARSE_ROUNDING if p.dtype.itemsize < 4 else ROUNDING for p in trainable.values()]
        self.noted = {name: torch.zeros(3, dtype=torch.float64, device=ranks.device) for name in trainable}
        self.hooks = [p.register_hook(partial(self._note, name)) for name, p in trainable.items()]  # type: ignore[no-untyped-call]

    def compare(self, shards: Iterable[ParamShard]) -> None:
        """Compare the gradients of the first step, before clipping and the optimizer, with what autograd has emitted.

        Raises:
            TrainingError: Naming the parameters whose gradient is not the sum of what was computed.
        """
        if not self.hooks:
            return
        delivered = {name: torch.zeros_like(sums) for name, sums in self.noted.items()}
        for shard in shards:
            if shard.gradient is not None:
                products = _project(shard.name, shard.gradient, shard.start)
                delivered[shard.name] += products.to(delivered[shard.name].device)
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
                "Do not train with this strategy and order: try `mtp doctor --strategies`, remove raw keys from "
                "strategy.deepspeed, or report it.",
            )
        self._end()

    def forget(self) -> None:
        """Start again with the next step: this one is skipped."""
        for sums in self.noted.values():
            sums.zero_()

    @torch.no_grad()
    def _note(self, name: str, gradient: Tensor) -> None:
        self.noted[name] += _project(name, gradient.reshape(-1), 0)

    def _end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.noted.clear()


class _Probe(NamedTuple):
    """A weight that must change in this step."""

    place: Tensor  # where the shard's gradient is largest, 0-dimensional
    before: Tensor  # the weight there
    gradient: float  # there, as the optimizer sees it

    def moves(self, weights: Tensor, rate: float) -> float:
        """Return whether it has changed, or could not visibly: Adam begins with rate x gradient / (gradient + eps)."""
        if bool(weights[self.place] != self.before):
            return _MOVED
        magnitude = abs(float(self.before))
        ulp = torch.finfo(self.before.dtype).eps * 2.0 ** math.floor(math.log2(magnitude)) if magnitude else 0.0
        return _STILL if rate > SHOWN_ULPS * ulp and self.gradient > SEEN_GRADIENT else _UNSEEN


@torch.no_grad()
def _project(name: str, values: Tensor, start: int) -> Tensor:
    """Project flat entries of a parameter, from `start` on, on its cosine, its sine and themselves: (3,)."""
    frequency = 0.5 + 2 * int.from_bytes(sha256(name.encode()).digest()[:6], "big") / 2**48
    products = torch.zeros(3, dtype=torch.float64, device=values.device)
    at_a_time = PROJECTED_ENTRIES.get(values.device.type, PROJECTED_ON_DEVICES)
    for first in range(0, values.numel(), at_a_time):
        part = values[first : first + at_a_time].double()
        begin = start + first
        angles = frequency * torch.arange(begin, begin + len(part), dtype=torch.float64, device=part.device)
        products += torch.stack((part @ angles.cos(), part @ angles.sin(), part @ part))
    return products

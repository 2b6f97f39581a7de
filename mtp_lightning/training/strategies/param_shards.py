"""A rank's shard of every parameter: the one view that checks, norms and checkpoints take of a strategy."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtp_lightning.checkpoint.format.reader_view import Reader
from mtp_lightning.checkpoint.format.write_shards import AVERAGE, WEIGHT, Piece
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.roles import ROLES, role_of
from mtp_lightning.ranks import Ranks

PREFIX = "model."  # of the model's parameters inside the LightningModule


class ParamShard(NamedTuple):
    """An interval of a flattened parameter that this rank holds; the shards of all ranks cover it exactly once.

    Tensors are views: what is written into them, the optimizer sees.
    """

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    weight: Tensor  # (m,) in the precision that the optimizer works in
    gradient: Tensor | None  # (m,); None where none has arrived, or between steps
    moments: dict[str, Tensor]  # (m,) each; empty before the first step, and for frozen parameters
    step: Tensor | None  # optimizer steps of this parameter, 0-dimensional
    is_trainable: bool
    factors: Mapping[str, Tensor] = {}  # of moments, in shapes of their own; only of a parameter that is held whole

    @property
    def stop(self) -> int:
        """Where the interval ends."""
        return self.start + self.weight.numel()

    @torch.no_grad()
    def read_from(self, reader: Reader) -> None:
        """Take weight and moments from a checkpoint, whoever wrote which part of them."""
        for kind, values in {WEIGHT: self.weight, **self.moments}.items():
            if kind in reader.kinds(self.name):
                values.copy_(reader.read(self.name, kind, self.start, self.stop))
        for kind, factor in self.factors.items():
            if kind in reader.kinds(self.name):
                factor.copy_(reader.read(self.name, kind).view(factor.shape))
        if self.step is not None:
            self.step.fill_(max(float(self.step), reader.step(self.name) or 0.0))

    def piece(self, step: float | None, *, copied: bool) -> Piece:
        """What a checkpoint keeps of this, and of its step count in numbers (`steps_of`).

        With `copied` it is out of the way of the next optimizer step.
        """
        weight, moments, factors = self.weight, self.moments, self.factors
        if copied:
            weight, moments, factors = weight.to("cpu", copy=True), _copied(moments), _copied(factors)
        return Piece(self.name, tuple(self.shape), self.start, weight, moments, step, factors)


def steps_of(shards: Sequence[ParamShard]) -> list[float | None]:
    """Read the step count of each shard, in one transfer from each device that has some."""
    steps = {number: shard.step for number, shard in enumerate(shards) if shard.step is not None}
    found: list[float | None] = [None] * len(shards)
    for device in {step.device for step in steps.values()}:
        there = {number: step for number, step in steps.items() if step.device == device}
        values = torch.stack([step.detach().double() for step in there.values()]).tolist()
        for number, value in zip(there, values, strict=True):
            found[number] = value
    return found


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {kind: tensor.to("cpu", copy=True) for kind, tensor in tensors.items()}


class MatrixRun(NamedTuple):
    """The entries of a matrix that lie in a flat tensor of this rank; there may be none."""

    shape: tuple[int, ...]  # of the whole matrix
    start: int  # the first entry's place in the flattened matrix
    place: slice  # in the flat tensor


RunsOf = Callable[[Tensor], list[MatrixRun]]
"""Lists the matrices that a flat tensor is a shard of, the same ones in the same order on all ranks."""


def names_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield parameters under the names that checkpoints know them by: without the LightningModule's own part."""
    for name, parameter in module.named_parameters():
        yield name.removeprefix(PREFIX), parameter


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also while ZeRO-3 has taken it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_shards(
    named_parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
) -> Iterator[ParamShard]:
    """Yield parameters that this rank holds whole."""
    for name, p in named_parameters:
        weight, state = p.detach().view(-1), optimizer.state.get(p, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
        moments = {key: value.view(-1) for key, value in tensors.items() if value.shape == p.shape}
        factors = {key: value for key, value in tensors.items() if key not in moments}
        gradient = None if p.grad is None else p.grad.view(-1)
        yield ParamShard(name, p.shape, 0, weight, gradient, moments, state.get("step"), p.requires_grad, factors)


def gradient_norms(
    shards: Iterable[ParamShard], ranks: Ranks, *, loss_scale: float = 1.0, loss: Tensor | None = None
) -> dict[str, float]:
    """L2 norm of the gradient of each role and of all together, by role name and `all`; the same on every rank.

    One sum over the ranks, on their device wherever the gradients are, and one wait for it. Where this rank's loss is
    given, `all` is finite only if the losses of all ranks are.
    """
    gradients: dict[str, list[Tensor]] = {}
    for shard in shards:
        role = gradients.setdefault(role_of(shard.name), [])
        if shard.gradient is not None:
            role.append(shard.gradient)
    # Of each role, and whether it has gradients at all; one more column has a zero, or NaN if the loss is not finite.
    squares = torch.zeros(2, len(ROLES) + 1, device=ranks.device, dtype=torch.float32)
    if loss is not None:
        squares[0, -1] = 0 * loss
    for index, parts in enumerate(gradients.get(role, []) for role in ROLES):
        if parts:
            squares[0, index] = torch.nn.utils.get_total_norm(parts).float() ** 2
            squares[1, index].fill_(1)
    squares, is_there = ranks.sum(squares).unbind()
    norms = squares.sqrt() / loss_scale
    total = norms[:-1].norm() + norms[-1]
    *found, of_all = torch.cat((norms[:-1], is_there[:-1], total[None])).tolist()  # the one wait
    present = zip(ROLES, found[: len(ROLES)], found[len(ROLES) :], strict=True)
    return {role: norm for role, norm, is_in in present if is_in} | {"all": of_all}


def moments_of(state: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Select from a parameter's optimizer state what has an entry for each of the parameter's."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() and v.numel() == like.numel()}


def provide_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, reader: Reader, name: str) -> None:
    """Give an optimizer that has not stepped yet the moments that a checkpoint has of a parameter, as zeros."""
    state = optimizer.state[parameter]
    for kind in reader.kinds(name):
        if kind not in (WEIGHT, AVERAGE) and kind not in state:
            stored = reader.shape_of(name, kind)
            is_factor = stored != reader.shape(name)
            state[kind] = parameter.detach().new_zeros(stored if is_factor else parameter.shape)
    if reader.step(name) is not None and "step" not in state:
        is_on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if is_on_device else "cpu")


def check_names(reader: Reader, named_parameters: Iterable[tuple[str, Any]]) -> None:
    """Refuse a checkpoint that holds other parameters, or other shapes, than the model has.

    Raises:
        CheckpointError: Naming what differs.
    """
    own = {name: whole_shape(p) for name, p in named_parameters}
    stored = {name: reader.shape(name) for name in reader.names}
    parts = {
        "only in the model": own.keys() - stored.keys(),
        "only in the checkpoint": stored.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & stored.keys() if own[name] != stored[name]},
    }
    found = "; ".join(f"{what}: {listed(sorted(names))}" for what, names in parts.items() if names)
    if found:
        raise CheckpointError(
            "a run must go on with the parameters that its checkpoint holds",
            found,
            "Give the recipe the model and heads of the checkpoint, or start a new run",
        )


def listed(names: list[str], most: int = 8) -> str:
    """Write names in a row, the first few of many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest

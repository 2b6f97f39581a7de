"""A first step for heads in closed form: the linear map that each begins with, by least squares on a little text."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtp_lightning.model.heads import TRUNK, HeadContext
from mtp_lightning.model.mtp_model import MtpModel

RIDGE = 1e-3
"""Share of the mean square of what a map reads that is added in every direction: what is never seen maps to zero."""


class _Text(NamedTuple):
    """A few rows of text, and what the trunk makes of them."""

    context: HeadContext
    documents: Tensor  # (B, T)
    aims: dict[int, Tensor]  # (B, T, D) what the last so many layers read; the trunk's last state for 0


@torch.no_grad()
def fit_heads(model: MtpModel, tokens: Tensor, documents: Tensor, *, rows_at_once: int = 8) -> dict[str, Tensor]:
    """Solve for the map that each extra head begins with, one offset after the other, in place.

    Where `Heads.first_map` names a map, it is to give at position t, of what it reads there, the state of the trunk at
    position t + k - 1: the input of the model's last layers, where copies of these follow in the head, else the last
    state. Least squares in float64, every position relative to the size of its state. A head that reads another one
    reads what that one gives once it is fitted; a module that several offsets share is fitted for the first of them.

    Args:
        model: heads with copied layers, if they have any, on a pretrained trunk.
        tokens: (B, T+n) text.
        documents: (B, T+n) number of the document that each token belongs to; states of another one are no aim.
        rows_at_once: rows that go through the model together.

    Returns:
        The fitted matrices by their names; none for kinds without such maps. NaN where there is no solution: of states
        that are not finite, or all zero.
    """
    maps = {offset: found for offset in model.heads.offsets if (found := model.heads.first_map(offset)) is not None}
    if not maps:
        return {}
    depths = {depth for _, depth in maps.values()}
    parts = zip(torch.split(tokens, rows_at_once), torch.split(documents, rows_at_once), strict=True)
    texts = [_read(model, *rows, depths) for rows in parts]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states = {TRUNK: [text.aims[0] for text in texts]}
    fitted: dict[str, Tensor] = {}
    for offset in model.heads.order:
        reads = [model.read(offset, state) for state in states[model.heads.parent_of(offset)]]
        if offset in maps and (name := names[id(maps[offset][0].weight)]) not in fitted:
            linear, depth = maps[offset]
            solution = _solve(model, offset, texts, reads=reads, depth=depth, linear=linear)
            fitted[name] = linear.weight.copy_(solution)
        states[offset] = [model.heads(offset, read, text.context) for read, text in zip(reads, texts, strict=True)]
    return fitted


def _read(model: MtpModel, tokens: Tensor, documents: Tensor, depths: Collection[int]) -> _Text:
    """Run the trunk on some rows, and keep what its last layers read."""
    embedded = model.embed(tokens)
    geometry = model.geometry(documents, like=embedded)
    num_positions = tokens.shape[1] - model.num_offsets
    aims: dict[int, Tensor] = {}

    def keep(depth: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            aims[depth] = args[0] if args else kwargs["hidden_states"]

        return hook

    layers = [*model.trunk.layers]
    hooks = [layers[-depth].register_forward_pre_hook(keep(depth), with_kwargs=True) for depth in {*depths} - {0}]
    try:
        aims[0] = model.trunk_states(embedded[:, :num_positions], geometry)[TRUNK]
    finally:
        for hook in hooks:
            hook.remove()
    return _Text(model.context(embedded, geometry), documents[:, :num_positions], aims)


def _solve(
    model: MtpModel, offset: int, texts: list[_Text], *, reads: list[Tensor], depth: int, linear: nn.Linear
) -> Tensor:
    """Find the matrix (D, I) that maps what a linear map reads, (P, I), nearest to what it is to give, (P, D)."""
    width = linear.in_features
    squares = torch.zeros(width, width, dtype=torch.float64, device=linear.weight.device)
    products = torch.zeros(width, linear.out_features, dtype=torch.float64, device=linear.weight.device)
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ahead = offset - 1
    try:
        for read, text in zip(reads, texts, strict=True):
            model.heads(offset, read, text.context)
            inputs, aims = seen.pop()[:, :-ahead].double(), text.aims[depth][:, ahead:].double()
            inside = text.documents[:, :-ahead] == text.documents[:, ahead:]
            inputs, aims = inputs[inside], aims[inside]  # (P, I), (P, D)
            weights = 1 / aims.square().mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            squares += inputs.T @ (weights * inputs)
            products += inputs.T @ (weights * aims)
    finally:
        hook.remove()
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    solution, fault = torch.linalg.solve_ex(squares, products)
    return torch.where(fault == 0, solution, torch.nan).T

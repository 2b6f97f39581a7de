"""Freezing: what a run that trains only some heads leaves as it is."""

from collections.abc import Iterable

from torch import Tensor

from mtp_lightning.model.mtp_model import MtpModel


def freeze_before(model: MtpModel, first_offset: int) -> None:
    """Let only the heads of an offset and those after it be trained, with final norms and matrices of their own.

    Whatever also serves an earlier offset is frozen: the trunk, and an unembedding matrix that is shared.
    """
    offsets = model.heads.offsets
    trained = {id(p) for offset in offsets if offset >= first_offset for p in parameters_of(model, offset)}
    frozen = {id(p) for offset in offsets if offset < first_offset for p in parameters_of(model, offset)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained - frozen)


def parameters_of(model: MtpModel, offset: int) -> Iterable[Tensor]:
    """Yield the parameters of an offset's head, of its final norm, and its matrix."""
    for module in model.heads.modules_of(offset):
        yield from module.parameters()
    yield from model.unembedding.parameters_of(offset)

"""The processes that train together: who this one is, and how they agree."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_lightning.errors import MtpError, file_system_error

CPU = torch.device("cpu")


@final
class Ranks:
    """The ranks of a torch process group, or this process alone.

    Every method but the properties is collective: all ranks call it, in the same order.

    Attributes:
        device: where tensors meet, of the same kind on all ranks. A group may have one backend for the CPU and another
            for GPUs: ranks that brought tensors on different devices would wait for each other in both, for ever.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, device: torch.device = CPU) -> None:
        """Take a process group; None means the default one if there is one, else this process alone."""
        self.device = device
        self._group = group
        self._is_alone = not (dist.is_available() and dist.is_initialized())

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return 0 if self._is_alone else dist.get_rank(self._group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self._is_alone else dist.get_world_size(self._group)

    @property
    def is_first(self) -> bool:
        """Tell whether this is the rank that writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Collect a value of every rank, in order of ranks, on every rank."""
        if self._is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value."""
        if self._is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks; the result is a new tensor on `device`, wherever this rank's was."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Take the largest of each entry over the ranks; the result is a new tensor on `device`."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        result = tensor.detach().to(self.device, copy=True)
        if not self._is_alone:
            dist.all_reduce(result, operation, group=self._group)
        return result

    def any(self, is_so: object) -> bool:
        """Tell whether something is so on any rank."""
        return bool(is_so) if self._is_alone else bool(self.max(torch.tensor(int(bool(is_so)))))

    def wait(self) -> None:
        """Return when every rank has come here.

        Unlike `gather` it leaves no tensor in the hands of gloo's threads: one that lets go of a Python object while
        the interpreter shuts down ends the process with SIGABRT (torch 2.13).
        """
        if not self._is_alone:
            dist.barrier(self._group)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Run the body on every rank; where it fails on one, all fail: with their own error, or the first other's.

        Without this, a rank that fails alone leaves the others waiting for it in their next collective call.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        errors = self.gather(None if error is None else _portable(error))
        if error is not None:
            raise error
        for other in filter(None, errors):
            raise other


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process."""
    if isinstance(error, OSError) and error.errno is not None:
        return file_system_error(error)
    return error if isinstance(error, MtpError) else RuntimeError(f"{type(error).__name__} on another rank: {error}")

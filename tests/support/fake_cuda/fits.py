"""A run of a recipe on devices that are not there, as one rank of any number."""

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.launch.rank_env import local_rank_info
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.draft_vocabulary import with_first_ids
from mtp_lightning.training import fit
from mtp_lightning.training.health.drift import DriftMonitor
from mtp_lightning.training.health.stragglers import Stragglers
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.saving.init_from import Frozen, InitFrom
from mtp_lightning.training.saving.save_checkpoints import Checkpoints
from mtp_lightning.training.saving.snapshot import Snapshot
from mtp_lightning.training.strategies.process_group import process_group
from tests.support.fake_cuda.breakages import BREAKAGES
from tests.support.fake_cuda.guard import NUM_GPUS
from tests.support.fake_cuda.ledger import Collective, Ledger
from tests.support.fake_cuda.patches import fake_group, operators, silent, torch_cuda

WRITE, INIT, ANY = Snapshot.write, dist.init_process_group, Ranks.any
KEPT = (Checkpoints, Frozen, DriftMonitor, InitFrom, Stragglers)
"""Callbacks that touch tensors; the others make files, screens and stops of values, which there are none of."""


@dataclass
class Books:
    """What the ledger has of a fit."""

    device: str = ""
    peaks_bytes: list[int] = field(default_factory=list)  # of each step
    state_bytes: int = 0  # alive before the last step
    left_bytes: int = 0  # alive after the fit
    collectives: list[Collective] = field(default_factory=list)  # of the whole fit
    products: dict[str, int] = field(default_factory=dict)  # matrix products of all steps, by type
    loss_scale: float = 1.0
    held: dict[str, int] = field(default_factory=dict)
    launches: list[dict[str, int]] = field(default_factory=list)  # of each step, by line
    moved: list[dict[str, int]] = field(default_factory=list)  # bytes
    waits: list[dict[str, int]] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)  # at an H100's rates


def run_fit(
    guard: ctypes.CDLL,
    recipe: Recipe,
    *,
    rank: int = 0,
    checkpoint: str | None = None,
    saves: bool = False,
    checks_first_step: bool = True,
    watch_bytes: float | None = None,
    visible_gpus: int = NUM_GPUS,
    without: str | None = None,
    breaks_off: bool = False,
) -> Books:
    """Train a recipe to its last step as one rank, and validate where it says so.

    Args:
        guard: of this process.
        recipe: the run.
        rank: which of its ranks.
        checkpoint: folder of one to go on from.
        saves: save where the recipe says so; a whole checkpoint must come of it if the recipe has one rank.
        checks_first_step: let the module check its first gradients, which takes a while at true size.
        watch_bytes: note what is held where, as soon as so much is.
        visible_gpus: how many GPUs of its node this rank sees.
        without: name of a mend to take out.
        breaks_off: end after the first step, without a validation.
    """
    recipe, ledger, books = with_first_ids(recipe), Ledger(watch_bytes), Books()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        machine = (*torch_cuda(guard, visible_gpus), *operators(), *_of_lightning())
        for patch in (*machine, *of_package(ledger, recipe, rank), *(BREAKAGES[without]() if without else ())):
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        with process_group(recipe):
            with contextlib.suppress(_Enough):  # what has a name here would keep the fit alive
                books.device = str(
                    _fit(recipe, Path(folder), _Watch(ledger, books, checks_first_step, breaks_off), checkpoint, saves)
                )
            fit._let_go()
        books.left_bytes = ledger.live
        if saves and recipe.strategy.num_ranks == 1:
            assert [found.step for found in complete_checkpoints(Path(folder) / "checkpoints")][-1] == recipe.run.steps
    books.held = dict(ledger.held or {})
    return books


def _fit(recipe: Recipe, folder: Path, watch: "_Watch", checkpoint: str | None, saves: bool) -> torch.device:
    trainer = fit.build_trainer(recipe, folder)
    kept = [own for own in trainer.callbacks if isinstance(own, KEPT) and (saves or not isinstance(own, Checkpoints))]
    trainer.callbacks = [watch, *kept]
    trainer.fit(MtpLightningModule(recipe), datamodule=_Rows(recipe), ckpt_path=checkpoint)
    return trainer.strategy.device


class _Enough(Exception):
    """Nothing more is asked of a fit."""


class _Watch(L.Callback):
    """Opens and closes the books of every step."""

    def __init__(self, ledger: Ledger, books: Books, checks_first_step: bool, breaks_off: bool) -> None:
        self.ledger, self.books = ledger, books
        self.checks_first_step, self.breaks_off = checks_first_step, breaks_off

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._close()
        self.books.state_bytes = self.ledger.live
        module.num_checked_steps = 2  # targets have no values
        if not self.checks_first_step:
            module.gradient_check.pending = []
            module.gradient_checksum._end()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.books.peaks_bytes.append(self.ledger.peak)
        for name in ("launches", "moved", "waits", "seconds"):
            getattr(self.books, name).append(dict(getattr(self.ledger, name)))
        self.books.loss_scale = trainer.strategy.gradient_scale
        if self.breaks_off:
            raise _Enough

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._close()

    def _close(self) -> None:
        self.books.collectives += self.ledger.collectives
        for name, count in self.ledger.products.items():
            self.books.products[name] = self.books.products.get(name, 0) + count
        self.ledger.reset()


def _write(self: Snapshot, folder: Path) -> dict[str, Any]:
    """Write zeros for what a checkpoint is made of, which must have come to the host by now."""
    with _disable_current_modes():
        folder.mkdir(parents=True, exist_ok=True)  # the first rank's business
        self._pieces, self._state = tree_map_only(torch.Tensor, _as_zeros, (self._pieces, self._state))
        return WRITE(self, folder)


def _as_zeros(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.device.type == "cpu", f"{tensor.device} in a checkpoint"
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


class _AtOnce:
    """A thread that has ended as soon as it has begun."""

    def __init__(self, *, target: Any, args: Sequence[Any], **_: Any) -> None:
        self.target, self.args = target, args

    def start(self) -> None:
        self.target(*self.args)

    def join(self) -> None: ...


class _Rows(L.LightningDataModule):
    """Rows of zeros on the host, as loaders give them."""

    rows_consumed = 0
    on_before_batch_transfer = MtpDataModule.on_before_batch_transfer

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.validation_samples = _Validation(recipe)

    def train_dataloader(self) -> Any:
        return _Batches(self.recipe, self.recipe.batch.global_batch_size // self.recipe.strategy.num_ranks, 10**9)

    def val_dataloader(self) -> Any:
        return _Batches(self.recipe, self.recipe.batch.micro_batch_size, 1)

    def advance(self, rows: int) -> None:
        self.rows_consumed += rows

    def state_dict(self) -> dict[str, Any]:
        return {"rows_consumed": self.rows_consumed}


class _Validation:
    """What the module and the guard ask of held-out rows."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.source_names = recipe, list(recipe.data.mixture)

    def __len__(self) -> int:
        return self.recipe.run.validation_samples


class _Batches:
    def __init__(self, recipe: Recipe, rows: int, count: int) -> None:
        self.shape, self.count = (rows, recipe.data.seq_len + recipe.heads.num_offsets), count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.count):
            rows = torch.zeros(self.shape, dtype=torch.long)
            yield {"tokens": rows, "documents": rows.clone(), "loss_mask": rows.bool()}


def on_device(recipe: Recipe, device: torch.device | None = None, dtype: torch.dtype | None = None) -> MtpModel:
    """Build without drawing; where the strategy names no device, on the one that Lightning would move it to."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or usual)
    try:
        with torch.device(device or "cuda"):
            return MtpModel(recipe)
    finally:
        torch.set_default_dtype(usual)


def _same_group(*args: Any, **kwargs: Any) -> Any:
    return dist.group.WORLD


def of_package(ledger: Ledger, recipe: Recipe, rank: int) -> Iterator[Any]:
    """Yield patches of the package: weights without values, and ranks that all say what this one says."""
    place = local_rank_info(rank, recipe.strategy.num_ranks, 29_500).environment
    local = rank % recipe.strategy.ranks_per_node
    place |= {"LOCAL_RANK": str(local), "GROUP_RANK": str(rank // recipe.strategy.ranks_per_node)}
    yield mock.patch.dict(os.environ, place if recipe.strategy.kind != "single" else {})
    yield mock.patch("mtp_lightning.training.strategies.single.build_model", on_device)
    yield mock.patch("mtp_lightning.training.strategies.zero.build_model", on_device)
    yield mock.patch("mtp_lightning.model.mtp_model._generator_of", silent())

    def noted(name: str, answer: Any) -> Any:
        def call(self: Ranks, *args: Any) -> Any:
            if not self._is_alone:
                ledger.note(name)
            return answer(self, *args)

        return mock.patch.object(Ranks, name, call)

    yield noted("gather", lambda self, value: [value] * self.size)
    yield noted("broadcast", lambda self, value: value)
    yield noted("wait", lambda self: None)
    yield noted("any", lambda self, is_so: bool((ANY(self, is_so), is_so)[1]))
    yield mock.patch.object(Snapshot, "write", _write)
    yield mock.patch("mtp_lightning.checkpoint.format.commit._check_shared", silent())  # all have written the same

    def gathered(result: torch.Tensor, group: Any = None) -> Sequence[torch.Tensor]:
        ledger.note("gather of metrics", result)
        return [result] * recipe.strategy.num_ranks

    def synchronize(*args: Any) -> None:
        ledger.wait("synchronize")

    yield mock.patch.object(torch.cuda, "synchronize", synchronize)

    def join(*args: Any, **kwargs: Any) -> None:
        ledger.note(f"join with GPU {torch.cuda.current_device()}")  # the one that NCCL takes
        with mock.patch("torch.distributed.init_process_group", INIT):
            fake_group(recipe.strategy.num_ranks, rank)

    yield mock.patch("mtp_lightning.training.strategies.process_group.met", silent())  # there is nobody to wait for
    yield mock.patch("torch.distributed.init_process_group", join)
    yield mock.patch("mtp_lightning.training.strategies.process_group.check_own_device", silent())  # all say the same
    yield mock.patch("torchmetrics.metric.gather_all_tensors", gathered)


def _of_lightning() -> Iterator[Any]:
    """Yield patches of what Lightning and DeepSpeed say to other ranks in objects, or ask values for."""
    lightning, deepspeed = "lightning.pytorch", "deepspeed.runtime.zero"
    yield mock.patch("torch.distributed.broadcast_object_list", silent())
    at_once = SimpleNamespace(Thread=_AtOnce)  # fake tensors are not for two threads
    yield mock.patch("mtp_lightning.training.saving.snapshot.threading", at_once)
    yield mock.patch("torch.distributed.new_group", _same_group)
    yield mock.patch(f"{lightning}.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor", silent())
    yield mock.patch(
        f"{lightning}.strategies.parallel.ParallelStrategy.reduce_boolean_decision",
        lambda self, decision, all=True: bool(decision),
    )
    for module in ("partitioned_param_coordinator", "stage3"):
        yield mock.patch(f"{deepspeed}.{module}.assert_ints_same_as_other_ranks", silent())

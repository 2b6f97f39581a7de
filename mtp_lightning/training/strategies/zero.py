"""DeepSpeed ZeRO-1, 2 and 3 over any number of ranks, on GPUs or CPUs.

Head-by-head backward passes are not what DeepSpeed expects of an optimizer step, and it raises nothing when it loses
their gradients. So each stage gathers the passes of one step in the way that is right for it:

zero1  passes leave their gradients on the parameters; one reduction at the end of the step
zero2  every pass reduces and shards what it has computed; the last adds nothing and closes the step
zero3  as zero2, with sums that start at zero and are added to by every pass: by itself DeepSpeed overwrites a
       parameter's gradient when it arrives a second time between two forwards of the engine

What reaches the optimizer is compared with the joint backward order on one process in tests/laws/test_zero.py.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, final

import lightning as L
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from mtp_lightning.checkpoint.format.reader_view import Reader
from mtp_lightning.checkpoint.format.write_shards import WEIGHT
from mtp_lightning.errors import TrainingError
from mtp_lightning.model.mtp_model import MtpModel, build_model, initialise
from mtp_lightning.model.sequence_parallel import slice_of_this_rank
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.param_shards import (
    MatrixRun,
    ParamShard,
    check_names,
    moments_of,
    provide_moments,
    whole_shape,
)
from mtp_lightning.training.strategies.single import SingleStrategy
from mtp_lightning.training.strategies.zero_config import STAGES, zero_config
from mtp_lightning.training.strategies.zero_modules import forget_modules, module_stack

COMPUTE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@final
class ZeroStrategy(RunStrategy, DeepSpeedStrategy):
    """DeepSpeed ZeRO under manual optimization."""

    clips_here = False

    def __init__(self, recipe: Recipe, device: torch.device, **options: Any) -> None:
        super().__init__(
            config=zero_config(recipe), parallel_devices=[device], precision_plugin=_AsBuilt("32-true"), **options
        )
        self._device = torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed wants a number
        self.stage = STAGES[recipe.strategy.kind]
        self._compute_type = COMPUTE_TYPES[recipe.run.precision]
        self._num_slices = recipe.strategy.sequence_parallel
        if recipe.model.is_foreign:
            architecture_of(recipe.model)  # looked at before modules are sharded as soon as they are made

    def setup_environment(self) -> None:
        """Set the process group up on any device: Lightning 2.6 lets DeepSpeed run on CUDA only."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the other ranks; as above without the check of CUDA device numbers."""
        if self.root_device.type == "cpu":
            import deepspeed

            # DeepSpeed 0.19 would compile a collective for CPUs at every first start, which takes a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        self.sequence = slice_of_this_rank(self._num_slices)

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        return self._device

    def setup(self, trainer: L.Trainer) -> None:
        """Set the engine up.

        Raises:
            TrainingError: DeepSpeed computes in another type than the recipe asks for.
        """
        self._bare = {name: vars(parameter).keys() | set() for name, parameter in self.named_parameters()}
        super().setup(trainer)
        self._check_compute_type()

    def _cut_links(self) -> None:
        """Take from parameters what DeepSpeed has hung on them.

        That leads to its flat tensors, and back to the parameter, by ways that Python's collector does not see.
        """
        for name, parameter in self.named_parameters():
            for link in vars(parameter).keys() - self._bare[name]:
                delattr(parameter, link)

    def _check_compute_type(self) -> None:
        """Compare types of weights, of DeepSpeed's own, and of its loss scale with the recipe's precision."""
        of_weights = {(p.ds_tensor if self.stage == 3 else p).dtype for _, p in self.named_parameters()}
        found = of_weights | {getattr(self._zero, "dtype", self._compute_type)}
        if found != {self._compute_type}:
            raise TrainingError(
                f"DeepSpeed must compute in the type of run.precision, {_named(self._compute_type)}",
                ", ".join(sorted(_named(own) for own in found)),
                "Remove keys of strategy.deepspeed that choose a type, or report it.",
            )
        if self._compute_type == torch.float16 and self.gradient_scale == 1:
            raise TrainingError(
                "fp16 needs a loss scale: small gradients would vanish",
                "none",
                "Remove fp16.loss_scale from strategy.deepspeed, or set run.precision=bf16.",
            )

    def teardown(self) -> None:
        """Take the engine apart: without that, what the fits of a process have held piles up."""
        engine: Any = self.model
        if hasattr(engine, "destroy"):  # else an error came before there was one
            engine.destroy()
            if self.stage == 3:
                forget_modules(_offload())
            else:
                self._cut_links()
            self.model, self.optimizers = None, []
        if self.sequence is not None:
            self.sequence.close()
            self.sequence = None
        module, self._lightning_module = self._lightning_module, None
        super().teardown()  # which would copy all of it to the host, on every rank
        self._lightning_module = module

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self.deepspeed_engine.optimizer

    @property
    def gradient_scale(self) -> float:
        """Loss scale of fp16 at this step; 1 otherwise."""
        engine = self.deepspeed_engine
        return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0

    def build_model(self, recipe: Recipe) -> MtpModel:
        """Build the whole model, or under ZeRO-3 one module after the other, each sharded as soon as it is made."""
        if self.stage < 3:
            return build_model(recipe, self.root_device, self._compute_type)
        import deepspeed

        model = MtpModel(recipe)
        gathered = partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
        initialise(model, recipe, whole=gathered, draws=Ranks().is_first)
        return model

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Gather parameters that are sharded."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
        return gathered

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Gather the backward passes of a step as the stage needs; see the top of this file.

        Written for DeepSpeed 0.19.8. The sums of zero3 can go when its engine adds a parameter's gradients up that
        arrive several times between two forwards (`micro_step_id` in stage3.py counts forwards).
        """
        engine, zero = self.deepspeed_engine, self._zero
        if self.stage == 3:
            module_stack(_offload())[
                1:
            ] = []  # layers whose recomputation ended early, as torch lets it, were never taken off
            zero.grad_partitions_flat_buffer.zero_()
            zero.micro_step_id = 1  # 0 means: overwrite
            yield
        elif hasattr(zero, "_coalesce_grad_reduction") and self.stage == 1:
            with engine.coalesce_grad_reduction():
                yield
        else:
            for waiting in getattr(zero, "accumulated_grads_in_cpu", {}).values():
                waiting.zero_()  # offloaded sums of the step before, which would be added to
            engine.set_gradient_accumulation_boundary(False)
            yield
            engine.set_gradient_accumulation_boundary(True)
            if getattr(zero, "cpu_offload", False):
                zero.finalize_gradient_accumulation_boundary()
                zero._wait_for_offload_copies()  # the host reads gradients next, which are still on their way to it
            else:
                self._provide_buckets()
                engine.allreduce_gradients()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run one backward pass through the engine."""
        self._provide_buckets()
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def _provide_buckets(self) -> None:
        """Let zero2 end a pass in which no parameter has a gradient, a frozen part's: DeepSpeed 0.19 fails there."""
        if self.stage == 2:
            self._zero.setup_buckets()

    def param_shards(self) -> Iterator[ParamShard]:
        """Yield this rank's partition."""
        for part in self._parts():
            yield part.shard(self._zero)

    def discard_gradients(self) -> None:
        """Make every gradient NaN: DeepSpeed 0.19 then skips the step and clears what it keeps between steps."""
        for shard in self.param_shards():
            if shard.gradient is not None:
                shard.gradient.fill_(torch.nan)
        self._zero.check_grad_overflow = True  # else zero1 and zero2 do not look in bf16
        self._zero.local_overflow = True  # how gradients on the host are looked at

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step; under zero3 also gather what stays gathered between steps if the step was skipped.

        DeepSpeed 0.19.8 does so after other steps only, and then fails with a "tracing error" in the next. Can go when
        `_overflow_clean_up` in stage3.py gathers persistent parameters.
        """
        output = super().optimizer_step(*args, **kwargs)
        persistent = getattr(self._zero, "persistent_parameters", [])
        if self.stage == 3 and self._zero.overflow and persistent:
            persistent[0].all_gather(persistent)
        return output

    def _parts(self) -> "Iterator[_FlatSlice]":
        return self._parts_of_zero3() if self.stage == 3 else self._parts_of_zero12()

    def _parts_of_zero12(self) -> "Iterator[_FlatSlice]":
        zero = self._zero
        is_plain = hasattr(zero, "single_partition_of_fp32_groups")  # not DeepSpeed's BF16_Optimizer
        flats = zero.single_partition_of_fp32_groups if is_plain else zero.fp32_groups_flat_partition
        for name, p in self.named_parameters():
            mapping = getattr(p, "_hp_mapping", None)
            if not p.requires_grad and self.ranks.is_first:
                yield _FlatSlice(name, p.shape, 0, p.detach().view(-1), slice(0, p.numel()), None, is_trainable=False)
            elif mapping is not None:
                own, at = mapping.lp_fragment_address, mapping.hp_fragment_address
                run = slice(at.start, at.start + own.numel)
                flat = flats[mapping.param_group_index]
                is_offloaded = getattr(zero, "cpu_offload", False)
                gradient = _run_of(flat.grad, run) if is_offloaded else _partition_gradient(p, mapping, own)
                yield _FlatSlice(name, p.shape, own.start, flat, run, gradient)

    def _parts_of_zero3(self) -> "Iterator[_FlatSlice]":
        zero, rank = self._zero, self.ranks.rank
        index = {id(p): (group, place) for group, ps in enumerate(zero.fp16_groups) for place, p in enumerate(ps)}
        for name, p in self.named_parameters():
            start = rank * p.partition_numel()
            numel = max(0, min(p.partition_numel(), p.ds_numel - start))
            if not p.requires_grad:
                own = p.ds_tensor.detach().view(-1)
                yield _FlatSlice(name, p.ds_shape, start, own, slice(0, numel), None, is_trainable=False)
            elif numel:
                group, place = index[id(p)]
                flat, at = zero.fp32_partitioned_groups_flat[group], zero.grad_position[zero.get_param_id(p)][1]
                run, sums = slice(at, at + numel), zero.averaged_gradients.get(group)
                sharded = None if sums is None else _run_of(sums[place], slice(0, numel))
                gradient = _run_of(flat.grad, run) if zero.offload_optimizer else sharded
                yield _FlatSlice(name, p.ds_shape, start, flat, run, gradient)

    def runs_of(self, flat: Tensor) -> list[MatrixRun]:
        """List the matrices of one of DeepSpeed's flat tensors with this rank's run of each, in the same order."""
        zero, held = self._zero, {part.name: part for part in self._parts() if part.flat is flat}
        if self.stage == 3:
            flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
        elif hasattr(zero, "single_partition_of_fp32_groups"):
            flats, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
        else:
            flats, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
        members = {id(p) for own, group in zip(flats, groups, strict=True) if own is flat for p in group}
        runs = []
        for name, p in self.named_parameters():
            if id(p) in members:
                own = held.get(name)
                runs.append(MatrixRun(whole_shape(p), own.start if own else 0, own.run if own else slice(0, 0)))
        return runs

    @torch.no_grad()
    def fill(self, reader: Reader) -> None:
        """Read this rank's partition, then let the weights that the model computes with follow."""
        check_names(reader, self.named_parameters())
        zero = self._zero
        if self.stage == 3:
            zero.checkpoint_event_prologue()  # gathered copies would be stale
        for part in self._parts():
            if part.is_trainable:
                provide_moments(zero.optimizer, part.flat, reader, part.name)
        for shard in self.param_shards():
            shard.read_from(reader)
        if self.stage < 3:
            for name, p in self.named_parameters():
                if WEIGHT in reader.kinds(name):
                    p.copy_(reader.read(name).view(p.shape))
            return
        own = {part.name: part for part in self._parts()}
        for name, p in self.named_parameters():
            if name in own and own[name].is_trainable:
                run = own[name].flat[own[name].run]
                p.ds_tensor.view(-1)[: run.numel()].copy_(run)
        zero.checkpoint_event_epilogue()


class _FlatSlice(NamedTuple):
    """Where a rank's run of a parameter lies in DeepSpeed's flat tensors."""

    name: str
    shape: torch.Size
    start: int
    flat: Tensor
    run: slice
    gradient: Tensor | None
    is_trainable: bool = True

    def shard(self, zero: Any) -> ParamShard:
        """Cut the run out of weight and moments."""
        state = zero.optimizer.state.get(self.flat, {}) if self.is_trainable else {}
        moments = {key: moment.view(-1)[self.run] for key, moment in moments_of(state, self.flat).items()}
        weight, step = self.flat.detach()[self.run], state.get("step")
        return ParamShard(self.name, self.shape, self.start, weight, self.gradient, moments, step, self.is_trainable)


def _run_of(tensor: Tensor | None, run: slice) -> Tensor | None:
    return None if tensor is None else tensor.view(-1)[run]


def _partition_gradient(parameter: Any, mapping: Any, own: Any) -> Tensor | None:
    """This rank's run of a reduced gradient under ZeRO-1 and 2; None between steps."""
    if getattr(parameter, "_hp_grad", None) is not None:  # BF16_Optimizer keeps the sum of the whole parameter
        whole: Tensor = parameter._hp_grad
        return whole.view(-1)[own.start : own.start + own.numel]
    try:
        gradient: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
    except ValueError:
        return None
    return gradient


@final
class _Joined(TorchElasticEnvironment):
    """Read this rank's place from the variables that `process_group` has set.

    Lightning 2.6 takes the GPU that bears the rank's number on its node, which a rank does not see where the scheduler
    binds GPUs to tasks. So it is told of this rank's device alone, and its count of the others would not be right.
    """

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Do nothing: `process_group` has compared the number of ranks with the recipe's."""


@final
class _AsBuilt(DeepSpeedPrecision):
    """Leave types to DeepSpeed, which knows them from the recipe.

    Lightning 2.6 would cast the module to fp32 first. Under ZeRO-3, whose weights have been taken apart by then, that
    changes only what DeepSpeed asks for the type: no loss scale in fp16, products in fp32 with offloaded parameters.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return the module as it is."""
        return module


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build_strategy(recipe: Recipe, device: torch.device) -> "SingleStrategy | ZeroStrategy":
    """Build the recipe's strategy on this rank's device."""
    if recipe.strategy.kind == "single":
        return SingleStrategy(device=device)
    return ZeroStrategy(
        recipe,
        device,
        cluster_environment=_Joined(),
        process_group_backend="gloo" if device.type == "cpu" else None,
    )


def _offload() -> ModuleType:
    from deepspeed.runtime.zero import parameter_offload

    module: ModuleType = parameter_offload
    return module

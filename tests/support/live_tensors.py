"""Count the tensors that a computation holds, without holding them: shapes of the real size at no cost."""

import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective
from mtp_lightning.training.step.rollout import RolloutDraw


class LiveTensors(TorchDispatchMode):
    """Sees every operation, forward and backward: the largest tensor made, and the most bytes alive at a time.

    Storages are counted once, from the operation that makes them until they are freed. What lives inside one
    operation is not seen. Run it inside `FakeTensorMode` to count without computing.
    """

    def __init__(self, known=()):
        """Count nothing of the tensors that are `known` already, nor of views of them."""
        super().__init__()
        self.largest_numel = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest_numel = max(self.largest_numel, leaf.numel())
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key, num_bytes):
        self._known.discard(key)
        self.live_bytes -= num_bytes


def count_schedule(recipe):
    """Run the recipe's backward order once on tensors without data; return what was seen, and the state beside it.

    The state is what AdamW and the weights take, which are there before the backward order begins; gradients are seen.
    """
    num_offsets, shape = recipe.heads.num_offsets, (recipe.batch.global_batch_size, recipe.data.seq_len)
    with FakeTensorMode():
        model = MtpModel(recipe)
        tokens = torch.zeros(shape[0], shape[1] + num_offsets, dtype=torch.long)
        documents = torch.zeros_like(tokens)
        targets = shifted_targets(tokens, documents, num_offsets)
        counts = (targets != IGNORE).sum((1, 2))
        teachers = teacher_positions(targets).sum((1, 2))
        weights = [1.0] * num_offsets
        objective = Objective(recipe.objective, weights, counts, counts[0], predicts=True, teacher_counts=teachers)
        objective = replace(objective, rollout=RolloutDraw.at(recipe, 0))
        is_low = recipe.run.precision == "bf16"
        with LiveTensors(known=model.parameters()) as live, torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            accumulate_gradients(model, MicroBatch(tokens, documents, targets), objective, lambda loss: loss.backward())
        assert all(parameter.grad is not None for parameter in model.parameters())
        return live, 12 * sum(parameter.numel() for parameter in model.parameters())

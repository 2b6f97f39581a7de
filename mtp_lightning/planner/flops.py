"""Floating-point operations of a training step, counted as published model FLOPs utilisation (MFU) counts them.

Forward and backward together, a position of a model that is trained as a whole costs

- 6 operations per matrix entry that it is multiplied by (2 forward, 4 backward), heads included and one V x D
  product per offset;
- 12 x layers x attention width x T for the products of queries with keys and of weights with values (4 forward, 8
  backward). All T positions count, although a causal kernel may skip half: that is the convention of the tables that
  MFU is compared with;
- nothing for the look-up of the embedding, for norms, activations, softmax and loss, and for the optimizer.

What is computed again is not counted either: layers under activation checkpointing, the main head's scores, which
distillation makes anew for every offset that it compares with them, and scores of drafts ahead of the losses. That is
work, but not progress; the prediction of a step's time (`throughput.py`) does count it. The second stream of far
offsets under `objective.rollout` is counted here: the gradients need it.

Where parts are frozen, only what the gradients of the trained parts need is counted (`passes.py`): a frozen matrix
costs 4 where gradients pass through it and 2 where none does, attention there 4 instead of 12, and an offset that
teaches nothing and that nobody reads costs nothing. MFU is defined by the same count: operations that are needed, over
what the device could have done in the time. So it stays a share of the peak that runs can be compared by; it does not
say that a frozen run's tokens are as dear as another's. Counting 6 throughout would let it exceed 100%.
"""

from mtp_lightning.planner.layout import with_offsets
from mtp_lightning.planner.passes import backward_flow_of
from mtp_lightning.recipe.schema.root import Recipe


def flops_per_position(recipe: Recipe) -> int:
    """Count the operations for one position of one row, forward and backward.

    >>> f"{flops_per_position(Recipe()):,}"
    '46,405,632'
    """
    return backward_flow_of(recipe).flops(_attended(recipe))


def attention_flops_per_position(recipe: Recipe) -> int:
    """Count the operations between positions, forward and backward.

    >>> attention_flops_per_position(Recipe()) == 12 * 8 * 256 * 256
    True
    """
    return backward_flow_of(recipe).attention_flops(_attended(recipe))


def _attended(recipe: Recipe) -> int:
    model = recipe.model
    return model.num_attention_heads * model.resolved_head_dim * recipe.data.seq_len


def tokens_after(recipe: Recipe, steps: int) -> int:
    """Count the positions of the first so many steps, over all ranks; a ramp begins with smaller ones.

    >>> tokens_after(Recipe(), 10)
    40960
    """
    return recipe.batch.samples_after(steps) * recipe.data.seq_len


def tokens_per_step(recipe: Recipe) -> int:
    """Count the positions of an optimizer step, over all ranks; under a ramp, of one after it.

    >>> tokens_per_step(Recipe())
    4096
    """
    return recipe.batch.global_batch_size * recipe.data.seq_len


def flops_per_step(recipe: Recipe) -> int:
    """Count the operations of an optimizer step, over all ranks.

    >>> f"{flops_per_step(Recipe()):.2e}"
    '1.90e+11'
    """
    return tokens_per_step(recipe) * flops_per_position(recipe)


def flop_ratio(recipe: Recipe, num_offsets: int) -> float:
    """Divide the operations with n offsets by those with one: the least that n offsets can cost.

    With `heads.layers_from_trunk` and transformer heads, the difference is n - 1 products with the V x D matrix.

    >>> model = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000}
    >>> recipe = Recipe.model_validate({"model": model, "data": {"seq_len": 4096}})
    >>> round(flop_ratio(recipe, 4), 3)
    1.051
    """
    return flops_per_position(with_offsets(recipe, num_offsets)) / flops_per_position(with_offsets(recipe, 1))

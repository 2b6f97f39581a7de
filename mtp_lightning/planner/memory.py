"""Bytes per GPU, by component.

Weights, gradients and optimizer state follow from ZeRO's definition; activations are counted tensor by tensor from
what the backward pass of `model/layers.py` reads. Buffers are as large as DeepSpeed's defaults or the recipe say.

A recomputed trunk keeps its layers' inputs; the layer at work takes the memory that heads and logits have let go by
then, and more only if it needs more. Where parts are frozen (`passes.py`), layers without a gradient path keep nothing;
the layer at work of a frozen trunk has that memory before heads and logits take it. Frozen layers that gradients pass
through keep no inputs of matrices. A V x D matrix that is frozen has no gradient to sum up. Of windows that are cut
over GPUs each keeps what there is of its own positions, and a mask over documents whole. A feed-forward in tiles keeps
its inputs, and the states of the tile at work with their gradients.
"""

from dataclasses import dataclass, fields

from mtp_lightning.planner.layout import BF16, FP32, Layout
from mtp_lightning.planner.passes import ALL_PROJECTIONS
from mtp_lightning.planner.shape import Layer, Shape

GIB = 2**30
CONTEXT_BYTES = 1.25 * GIB  # CUDA context, cuBLAS workspaces, NCCL
FRAGMENTATION = 0.03  # of what the allocator manages
BOUNDARY_STATES = 8  # (P, D) tensors around a head: the leaf it reads, hidden, normed and cast, and their gradients


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU, and what is offloaded from it."""

    weights: float
    gradients: float
    optimizer: float
    trunk_activations: float
    head_activations: float
    logits: float
    unembedding_gradient: float
    gathered_weights: float
    reduction_buckets: float
    overhead: float
    offloaded: float = 0.0

    @property
    def state(self) -> float:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Everything on the GPU."""
        return float(sum(getattr(self, field.name) for field in fields(self))) - self.offloaded


def memory(shape: Shape, layout: Layout) -> Memory:
    """Count the peak of a training step."""
    state, offloaded = _state(shape, layout)
    offloaded += offloaded_activations(shape, layout)
    working = _activations(shape, layout) | _buffers(shape, layout)
    managed = sum(state.values()) + sum(working.values())
    return Memory(**state, **working, overhead=CONTEXT_BYTES + FRAGMENTATION * managed, offloaded=offloaded)


def most_micro_rows(shape: Shape, layout: Layout, limit_bytes: float) -> int:
    """Find the largest micro-batch that fits, in rows; 0 if not even one row does."""

    def fits(rows: int) -> bool:
        return memory(shape, layout.with_rows(rows, rows)).total <= limit_bytes

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _state(shape: Shape, layout: Layout) -> tuple[dict[str, float], float]:
    """Return weights, gradients and optimizer state on the GPU, and the bytes that live elsewhere."""
    total = shape.parameters.total
    trainable = shape.num_trainable
    weights = layout.weight_bytes * total / layout.shards(3)
    gradients = layout.gradient_bytes * trainable / layout.shards(2)
    master, kept = trainable if layout.stage else 0, 2 * trainable if shape.num_kept is None else shape.num_kept
    optimizer = FP32 * (master + kept) / layout.shards(1)
    offloaded = 0.0
    if layout.offload_optimizer != "none":
        offloaded, optimizer = optimizer, 0.0
    if layout.offload_parameters != "none":
        offloaded, weights = offloaded + weights, 0.0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}, offloaded


def layer_bytes(layer: Layer, layout: Layout, keeps: frozenset[str] = ALL_PROJECTIONS) -> int:
    """Count what one layer keeps for its backward pass, in bytes per position.

    Inputs of norms, inputs of the projections that `keeps` names (under autocast a cast copy for each), queries, keys,
    values and mixed values, and the states of the feed-forward.
    """
    copies = layer.input_copies(keeps, are_cast=layout.is_autocast)
    attention = 2 * layer.query_width + 2 * layer.exchanged_key_width(layout.num_slices)
    if layout.num_slices > 1:
        attention += layer.query_width  # the mixed values, once for all positions and once for all heads
    in_compute = copies * layer.width + attention + (0 if layout.mlp_tile else layer.mlp_states(keeps))
    return layer.num_residuals * layout.weight_bytes * layer.width + layout.compute_bytes * in_compute


def positions_of(shape: Shape, layout: Layout) -> int:
    """Count the positions of a micro-batch that a GPU computes: of windows that are cut, its slices."""
    return layout.micro_batch_size * shape.seq_len // layout.num_slices


def offloaded_activations(shape: Shape, layout: Layout) -> float:
    """Count the inputs of recomputed layers that the host holds."""
    if not layout.offloads_activations:
        return 0.0
    trunk = shape.passes.trunk.work.layers_back if layout.recomputes_trunk else 0
    heads = _heads_alive(shape, layout) if layout.recomputes_heads else 0
    return float(positions_of(shape, layout) * layout.weight_bytes * shape.layer.width * (trunk + heads))


def _tile_bytes(shape: Shape, layout: Layout) -> float:
    """Count the states of the tile that a feed-forward is at, and their gradients."""
    rows = layout.micro_batch_size * (layout.mlp_tile or 0)
    return 2.0 * rows * layout.compute_bytes * shape.layer.mlp_states()


def _activations(shape: Shape, layout: Layout) -> dict[str, float]:
    positions = positions_of(shape, layout)
    passes, residual, tile = shape.passes, layout.weight_bytes * shape.layer.width, _tile_bytes(shape, layout)
    kept = 0 if layout.offloads_activations else residual  # of a recomputed layer
    trunk_layer, head_layer = (layer_bytes(shape.layer, layout, part.keeps) for part in (passes.trunk, passes.heads))
    heads = _stack(_heads_alive(shape, layout), head_layer, kept, recomputes=layout.recomputes_heads)
    held = positions * (heads + BOUNDARY_STATES * residual) + tile
    logits = _logits(shape, layout)
    at_work = 0.0  # of the trunk, at a time when heads and logits hold nothing
    if not passes.trunk.work.layers_back:
        trunk, at_work = 0.0, layer_bytes(shape.layer, layout) + tile / positions
    elif layout.recomputes_trunk:
        trunk = passes.trunk.work.layers_back * kept
        at_work = trunk_layer + BOUNDARY_STATES * residual + tile / positions
    else:
        trunk = passes.trunk.work.layers_back * trunk_layer
    trunk += max(0.0, at_work - (held + logits) / positions)
    mask = 4 * layout.micro_batch_size * shape.seq_len**2 if shape.masks_documents else 0
    if passes.reads_drafts:  # a mask over two streams
        mask += 4 * (layout.micro_batch_size if shape.masks_documents else 1) * (2 * shape.seq_len) ** 2
    trunk += passes.num_mixed_states * residual
    return {"trunk_activations": positions * trunk + mask, "head_activations": held, "logits": logits}


def _heads_alive(shape: Shape, layout: Layout) -> int:
    """Count the layers in heads that keep something at the same time; those that no gradient passes keep nothing."""
    back, heads = shape.passes.heads.work.layers_back, shape.heads
    return back if _all_heads_alive(shape, layout) else min(back, -(-heads.num_layers // heads.num_offsets))


def _all_heads_alive(shape: Shape, layout: Layout) -> bool:
    return shape.heads.is_chain or layout.backward_order != "sequential"


def _stack(num_layers: int, layer: float, residual: float, *, recomputes: bool) -> float:
    """Count a stack's kept bytes per position: everything, or the layers' inputs and one layer being recomputed."""
    if recomputes and num_layers:
        return num_layers * residual + layer
    return num_layers * layer


def _logits(shape: Shape, layout: Layout) -> float:
    """Count the logits: one chunk of fp32 with its low-precision copies; in the joint order those of all offsets.

    Joint keeps the fp32 log-probabilities of every offset, and has three more such tensors of one offset in hand, of
    all V entries: it selects those of a draft vocabulary afterwards.
    """
    low = 0 if layout.compute_bytes == FP32 else layout.compute_bytes
    positions, passes = positions_of(shape, layout), shape.passes
    if layout.backward_order == "joint":
        return float(positions * ((passes.num_scored + 3 * shape.vocab_size) * FP32 + low * shape.vocab_size))
    if layout.uses_liger:  # one chunk in the type of the products, of at least as many entries as the states have
        least = positions * shape.layer.width * layout.compute_bytes
        return float(min(max(layout.chunk_bytes, least), positions * passes.most_scored * layout.compute_bytes))
    return min(layout.chunk_bytes, float(positions * passes.most_scored * (FP32 + 2 * low)))


def _buffers(shape: Shape, layout: Layout) -> dict[str, float]:
    total, summed = shape.parameters.total, shape.passes.num_matrix_gradients
    together = summed if _all_heads_alive(shape, layout) else min(summed, 1)
    beside_sum = 0 if layout.compute_bytes == FP32 else 2 * BF16  # a chunk's product, and the matrix or gradient cast
    beside_sum += FP32 if layout.uses_liger else 0  # the gradient of one term, which is then added
    cast = BF16 if layout.is_autocast else 0
    is_sharded = layout.stage == 3 and (layout.num_gpus > 1 or layout.offload_parameters != "none")
    live = min(total, max(layout.live_entries, 2 * shape.layer.matrices + shape.matrix))
    buckets = 2 * min(total, layout.bucket_entries) if layout.stage else 0
    gradient = shape.matrix * (together * (FP32 + beside_sum) if together else cast)
    drafts = shape.draft_matrix * (layout.weight_bytes + (FP32 + beside_sum if together else cast))  # and rows copied
    both = gradient + drafts if _all_heads_alive(shape, layout) or not together else max(gradient, drafts)
    return {
        "unembedding_gradient": both,
        "gathered_weights": layout.weight_bytes * live if is_sharded else cast * shape.num_walked,
        "reduction_buckets": layout.reduce_bytes * buckets,
    }

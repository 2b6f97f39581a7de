"""Seconds per optimizer step on known hardware.

A micro-batch costs

- matrix products at a fitted share of the device's peak;
- products between positions (attention, half of them skipped by a causal kernel), at another fitted share;
- everything else, which waits for memory: kept activations are taken to cross the memory bus a fixed number of times,
  and so are logits. That is what makes narrow models less efficient;
- communication, of which a fitted share cannot hide behind computing.

Where all this is shorter than the host needs to launch the kernels one by one, the host sets the pace.
An optimizer step adds the update, which waits for memory as well. Checkpointing adds a forward pass. Distillation adds
the main head's scores, made again for every offset that is compared with them; only the joint order has kept them.
What the backward pass does not go through, because it is frozen and nothing before it is trained, costs its forward
pass only.
"""

import math
from dataclasses import dataclass, replace

from mtp_lightning.planner.hardware import Hardware
from mtp_lightning.planner.layout import BF16, FP32, Layout
from mtp_lightning.planner.memory import layer_bytes, offloaded_activations, positions_of
from mtp_lightning.planner.shape import Shape

MEMORY_EFFICIENCY = 0.85  # of the data sheet's bandwidth, in a long copy
FORWARD_PASSES = 3  # written, read, read again by an unfused neighbour
BACKWARD_PASSES = 3  # read, its gradient written and read
RECOMPUTE_PASSES = 2
LOGIT_BYTES = 30  # per entry, beside products: largest (4), minus it (8), exponential (8), sum (4), rounded (6)
COMPILED_LOGIT_BYTES = 14  # read for the largest, the sum and the gradient, which is written rounded
LIGER_LOGIT_PASSES = 3  # over scores as products make them: read twice, its gradient written in its place
TEACHER_BYTES = 14  # per entry of the main head's scores: out of the product, to fp32, once more through top-k
COMPARED_BYTES = 80  # per entry that is compared: ten tensors written and read (`losses/chunked.py`)
UPDATE_BYTES = 30  # per parameter: master, two moments and gradient read, three written back, weight written
FORWARD_ATTENTION = 4  # operations per position, layer, query channel and attended position
BACKWARD_ATTENTION = 10  # five products instead of two: scores are computed again [FlashAttention-2]
FORWARD_LAUNCHES = 40  # kernels of a layer, when nothing is fused
BACKWARD_LAUNCHES = 80
LAUNCH_S = 6e-6  # per kernel, eager


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Where the time of an optimizer step goes, in seconds."""

    products_s: float
    attention_s: float
    memory_bound_s: float
    launch_s: float  # waiting for the host, beyond the three above
    communication_s: float  # that is not hidden
    update_s: float

    @property
    def compute_s(self) -> float:
        """Forward and backward passes without communication."""
        return self.products_s + self.attention_s + self.memory_bound_s + self.launch_s

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.communication_s + self.update_s


def step_time(shape: Shape, layout: Layout, hardware: Hardware) -> StepTime:
    """Predict the time of an optimizer step."""
    times = layout.num_micro_batches
    parts = [times * part(shape, layout, hardware) for part in (_products_s, _attention_s, _memory_bound_s)]
    work = shape.passes.all
    kernels = FORWARD_LAUNCHES * (work.layers + 1) + BACKWARD_LAUNCHES * (work.layers_back + 1)  # 1: the rest
    launches = times * LAUNCH_S * kernels
    compute = max(launches, sum(parts))
    network = communication_s(shape, layout, hardware)
    exposed = max(0.0, network - compute) + hardware.exposed_communication * min(network, compute)
    exposed += _exchange_s(shape, layout, hardware)
    exposed += times * 2 * offloaded_activations(shape, layout) / hardware.host_link_bytes_per_s  # there and back
    return StepTime(
        products_s=parts[0],
        attention_s=parts[1],
        memory_bound_s=parts[2],
        launch_s=compute - sum(parts),
        communication_s=exposed,
        update_s=_update_s(shape, layout, hardware),
    )


def _recomputed(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Return the layers, and the matrix entries in them, that a position passes a second time.

    Recomputing stops at the last state that is needed, the input of a layer's last matrix. Layers that the backward
    pass does not go through are not recomputed. Feed-forwards in tiles are, once more.
    """
    trunk = shape.passes.trunk.work.layers_back if layout.recomputes_trunk else 0
    heads = shape.passes.heads.work.layers_back if layout.recomputes_heads else 0
    last = shape.layer.intermediate_size * shape.layer.width
    entries = (trunk + heads) * (shape.layer.matrices - last)
    if layout.mlp_tile:
        work = shape.passes.trunk.work + shape.passes.heads.work
        entries += work.layers_back * (2 if shape.layer.is_gated else 1) * last
    return trunk + heads, entries


def _products_s(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    _, again = _recomputed(shape, layout)
    teacher = 0 if layout.backward_order == "joint" else shape.passes.teacher.entries
    drafts = 0 if layout.backward_order == "sequential" else shape.passes.drafts.entries
    operations = positions_of(shape, layout) * 2 * (shape.passes.all.entries + again + teacher + drafts)
    return operations / (hardware.peak(layout.precision) * hardware.product_efficiency)


def _attention_s(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    again, _ = _recomputed(shape, layout)
    work = shape.passes.all
    attended = shape.seq_len * (1 if shape.masks_documents else 0.5)
    per_channel = FORWARD_ATTENTION * (work.layers + again) + BACKWARD_ATTENTION * work.layers_back
    operations = positions_of(shape, layout) * per_channel * shape.layer.query_width * attended
    return operations / (hardware.peak(layout.precision) * hardware.attention_efficiency)


def _memory_bound_s(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    again, _ = _recomputed(shape, layout)
    work = shape.passes.all
    passes = FORWARD_PASSES * work.layers + BACKWARD_PASSES * work.layers_back + RECOMPUTE_PASSES * again
    entry = COMPILED_LOGIT_BYTES if layout.compiles_loss else LOGIT_BYTES
    logits = (LIGER_LOGIT_PASSES * layout.compute_bytes if layout.uses_liger else entry) * shape.passes.num_scored
    compared = COMPARED_BYTES * shape.passes.num_compared_entries
    if layout.backward_order != "joint":
        compared += TEACHER_BYTES * shape.passes.num_teacher_scores
    whole = layer_bytes(shape.layer, replace(layout, mlp_tile=None))
    moved = positions_of(shape, layout) * (passes * whole + logits + compared)
    return moved / (hardware.memory_bytes_per_s * MEMORY_EFFICIENCY)


def _exchanged_bytes(shape: Shape, layout: Layout) -> float:
    """Count what each GPU sends per step to those that share its windows: queries, keys, values and mixed values."""
    again, _ = _recomputed(shape, layout)
    passes = shape.passes.all.layers + shape.passes.all.layers_back + again
    width = 2 * shape.layer.query_width + 2 * shape.layer.exchanged_key_width(layout.num_slices)
    sent = positions_of(shape, layout) * width * layout.compute_bytes * (layout.num_slices - 1) / layout.num_slices
    return layout.num_micro_batches * passes * sent


def _exchange_s(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    """Time of these transfers, for which attention waits; between nodes if a node does not hold all that share."""
    is_inside = layout.gpus_per_node % layout.num_slices == 0
    bandwidth = hardware.link_bytes_per_s if is_inside else hardware.node_bytes_per_s / layout.gpus_per_node
    return _exchanged_bytes(shape, layout) / bandwidth


def communication_bytes(shape: Shape, layout: Layout) -> dict[str, float]:
    """Count what each GPU sends per optimizer step, by collective.

    ZeRO-1 reduces gradients once per step, ZeRO-2 with every micro-batch, and both hand out new weights once: those
    of what is trained. ZeRO-3 gathers weights for every forward and for every backward pass that goes through them.
    """
    share = (layout.num_gpus - 1) / layout.num_gpus
    micro_batches, total, trainable = layout.num_micro_batches, shape.parameters.total, shape.num_trainable
    gathered = {0: 0, 1: trainable, 2: trainable, 3: micro_batches * (total + shape.num_walked)}[layout.stage]
    reductions = {0: 0, 1: 1, 2: micro_batches, 3: micro_batches}[layout.stage]
    return {
        "gather_weights": gathered * layout.weight_bytes * share,
        "reduce_gradients": reductions * trainable * layout.reduce_bytes * share,
        **({"exchange_heads": _exchanged_bytes(shape, layout)} if layout.num_slices > 1 else {}),
    }


def communication_s(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    """Time that transfers take when nothing hides them: bandwidth of a ring, latency of its hops, offloaded weights."""
    fetched = 0.0
    if layout.offload_parameters != "none":
        own = layout.weight_bytes * (shape.parameters.total + shape.num_walked) / layout.num_gpus
        fetched = layout.num_micro_batches * own / hardware.host_link_bytes_per_s
    if layout.num_gpus == 1 or layout.stage == 0:
        return fetched
    sent = sum(communication_bytes(shape, replace(layout, num_slices=1)).values())
    between_nodes = layout.num_nodes > 1
    bandwidth = hardware.link_bytes_per_s
    if between_nodes:  # all links of a node carry the ring together
        bandwidth = min(bandwidth, hardware.node_bytes_per_s)
    node_hops = layout.num_nodes if between_nodes else 0
    latency = node_hops * hardware.node_hop_s + (layout.num_gpus - layout.num_nodes) * hardware.link_hop_s
    return fetched + sent / bandwidth + _num_collectives(shape, layout) * latency


def _num_collectives(shape: Shape, layout: Layout) -> float:
    num_layers = shape.num_trunk_layers + shape.heads.num_layers + 1
    if layout.stage == 3:
        return 3.0 * num_layers * layout.num_micro_batches
    buckets = math.ceil(shape.num_trainable / max(1.0, layout.bucket_entries))
    return float(buckets * (1 + (layout.num_micro_batches if layout.stage == 2 else 1)))


def _update_s(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    own = shape.num_trainable / layout.shards(1)
    if layout.offload_optimizer == "none":
        return UPDATE_BYTES * own / (hardware.memory_bytes_per_s * MEMORY_EFFICIENCY)
    to_host = 2 * BF16 * own / hardware.host_link_bytes_per_s
    share = min(layout.num_gpus, layout.gpus_per_node)  # GPUs of a node share its memory and its disks
    at_host = UPDATE_BYTES * own * share / hardware.host_memory_bytes_per_s
    on_disk = 6 * FP32 * own * share / hardware.disk_bytes_per_s if layout.offload_optimizer == "nvme" else 0.0
    return to_host + at_host + on_disk

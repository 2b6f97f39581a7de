"""Sections of the objective: weights of the offsets, losses, distillation."""

from typing import Annotated, Literal

from pydantic import Field

from mtp_lightning.recipe.schema.base import (
    SMALLEST,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
)
from mtp_lightning.recipe.schema.paths import LocalPath

DISTILLED_LOGITS = 10_000
"""Largest logits of the teacher that distillation compares by default [MTP-D]."""

AUTO_CHUNK_MIB = {"cpu": 64.0, "cuda": 1024.0}


class ConstantWeights(Section):
    """The same weight all the time."""

    kind: Literal["constant"] = "constant"
    values: list[NonNegativeFloat] | None = None
    """One weight per offset, the main head first; null means 1 for each [Gloeckle 2024]."""


class DecayWeights(Section):
    """Geometric decay over the extra offsets; the main head has weight 1 [Medusa, FastMTP]."""

    kind: Literal["decay"]
    beta: PositiveFraction = 0.8
    """Ratio of one extra offset's weight to the one before."""
    total: PositiveFloat | None = None
    """Sum of the extra weights; null means that the first extra offset has weight beta."""


class LambdaWeights(Section):
    """One factor shared by the extra offsets, changing over the run: lambda / (n - 1) each [DeepSeek-V3]."""

    kind: Literal["lambda"]
    start: NonNegativeFloat = 0.3
    """Factor at the first step."""
    end: NonNegativeFloat = 0.1
    """Factor at the end of the change."""
    change: Literal["step", "linear", "cosine"] = "step"
    """Jump at the end of the interval, or move along it."""
    begins_at: Fraction = 0.0
    """Share of the run at which a linear or cosine change begins."""
    ends_at: Fraction = 0.68
    """Share of the run at which the end value is reached."""


class CurriculumWeights(Section):
    """Offsets switched on (forward) or off (reverse) one by one [Aynetdinov & Akbik 2025]."""

    kind: Literal["curriculum"]
    direction: Literal["forward", "reverse"] = "forward"
    """Start with one offset and add the rest, or start with all and drop the furthest."""


OffsetWeights = Annotated[
    ConstantWeights | DecayWeights | LambdaWeights | CurriculumWeights, Field(discriminator="kind")
]


class TokenOrderSection(Section):
    """Token-order prediction as an auxiliary loss [arXiv 2508.19228]."""

    weight: PositiveFloat = 1.0
    """Weight of the loss."""
    window_size: PositiveInt = 256
    """How many tokens ahead the order is scored; the official runs use 4096."""


class DistillSection(Section):
    """Self-distillation: extra offsets also learn from the main head's distribution [MTP-D, arXiv 2603.23911].

    The loss of offset k becomes its weight x (alpha x cross-entropy + beta x divergence). Its teacher at position t is
    the main head at position t+k-1, which predicts the same token; where there is none, only the cross-entropy counts.

    Soft targets are alpha 0, beta 1, `top_k: all`: the gradient of offset k is q - p, of the cross-entropy of its
    distribution q with the teacher's p in place of the one token that came; where there is no teacher there is none.
    """

    alpha: list[NonNegativeFloat] = Field(default=[1.0], min_length=1)
    """Weight of the cross-entropy: one for all extra offsets, or one for each."""
    beta: list[NonNegativeFloat] = Field(default=[0.5], min_length=1)
    """Weight of the divergence from the teacher: one for all extra offsets, or one for each."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda"] = "forward_kl"
    """KL(teacher|student), KL(student|teacher), Jensen-Shannon, total variation, minus the logarithm of the overlap, or
    a mixture of KL and total variation that shifts to the latter as the overlap grows [LK losses, arXiv 2602.23881]."""
    lk_rate: PositiveFloat = 3.0
    """For `lk_lambda`: the share of KL is exp(-lk_rate x overlap)."""
    top_k: PositiveInt | Literal["all"] | None = None
    """How many of the teacher's largest logits are compared; null means 10,000, or all where there are fewer."""
    temperature: PositiveFloat = 1.0
    """What both sides' logits are divided by before the softmax; the loss is not scaled back."""
    where: Literal["all", "confident"] = "all"
    """Every position that has a teacher, or those where its largest probability reaches `confidence`."""
    confidence: PositiveFraction = 0.5
    """For `where: confident`: the least probability."""
    detach_teacher: bool = True
    """Stop the gradient at the teacher; false lets the divergence change the main head too, an ablation."""

    def resolved_top_k(self, vocab_size: int) -> int:
        """Number K of logits that are compared."""
        return vocab_size if self.top_k == "all" else min(self.top_k or DISTILLED_LOGITS, vocab_size)

    def exceeds(self, vocab_size: int) -> bool:
        """Whether more logits are asked for than there are."""
        return isinstance(self.top_k, int) and self.top_k > vocab_size

    def alpha_of(self, offset: int) -> float:
        """Weight of the cross-entropy of an extra offset."""
        return self.alpha[(offset - 2) % len(self.alpha)]

    def beta_of(self, offset: int) -> float:
        """Weight of the divergence of an extra offset."""
        return self.beta[(offset - 2) % len(self.beta)]


class RolloutSection(Section):
    """On-policy training of sequential and recursive heads: far offsets read the heads' own drafts, as in drafting.

    At a position that is drawn, offset k > 2 reads the drafts that offsets 2 ... k-1 make there in place of the given
    tokens; targets and teachers stay those of the given tokens. Positions before it are seen with their given tokens.
    """

    probability: Fraction = 1.0
    """Share of positions that are drawn, each on its own."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which that share changes linearly from `start` to `probability`."""
    start: Fraction = 0.0
    """Share at the first step."""
    where: Literal["all", "reached"] = "all"
    """Far offsets learn at every position; or, of those drawn, only where all drafts before are the given tokens:
    nothing is kept behind a wrong draft. Then nothing is replaced, and no work is added."""

    def probability_at(self, step: int) -> float:
        """Share of positions that are drawn at a 0-based step.

        >>> section = RolloutSection(probability=0.8, warmup_steps=4)
        >>> [section.probability_at(step) for step in (0, 1, 2, 4, 100)]
        [0.0, 0.2, 0.4, 0.8, 0.8]
        """
        if step >= self.warmup_steps:
            return self.probability
        return self.start + (self.probability - self.start) * step / self.warmup_steps


class ObjectiveSection(Section):
    """Losses and the order in which they are computed."""

    backward_order: Literal["sequential", "bridged", "joint"] = "sequential"
    """Order of head forward and backward: one head at a time, one autograd node, or plain logits of all heads."""
    weights: OffsetWeights = ConstantWeights()
    """Weight of each offset's loss."""
    balance: Literal["none", "rms"] = "none"
    """Scale each extra loss to the main head's RMS, per micro-batch [Mehra 2025]."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target probability spread evenly over the vocabulary."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the squared log-partition."""
    token_order: TokenOrderSection | None = None
    """Token-order prediction, or null."""
    distill: DistillSection | None = None
    """Distillation of the main head into the others, or null."""
    rollout: RolloutSection | None = None
    """Far offsets that read the heads' own drafts, or null: every offset reads the given tokens."""
    chunk_mib: Literal["auto"] | Annotated[float, Field(gt=0.0, ge=SMALLEST, le=1e9)] = "auto"
    """Memory that one chunk of logits may take, in MiB; sets how many positions are scored at once. auto: 64 on a CPU,
    1,024 on a GPU, where few rows leave the products and the V x D matrix waiting for memory."""

    def chunk_bytes(self, device: str) -> int:
        """Memory that one chunk of logits may take on a type of device (`cpu`, `cuda`)."""
        mib = AUTO_CHUNK_MIB["cpu" if device == "cpu" else "cuda"] if self.chunk_mib == "auto" else self.chunk_mib
        return int(mib * 2**20)


class MemorySection(Section):
    """Memory and speed of the same computation: nothing here changes a gradient."""

    recompute_trunk: bool = False
    """Recompute the trunk's layers in the backward pass instead of keeping their activations."""
    recompute_heads: bool | None = None
    """Recompute the heads in the backward pass instead of keeping their activations; null means for kind `recursive`
    only, whose module's layers run n-1 times on top of the trunk's."""
    mlp_tile: PositiveInt | None = None
    """Positions of a window that a feed-forward runs on at a time, and once more in the backward pass: of its inner
    states, the widest of a layer, only those of so many positions exist at once [ALST, arXiv 2506.13996]. null: all."""
    offload_activations: bool = False
    """Keep the inputs of recomputed layers in the host's memory until the backward pass [ALST]."""
    compile: bool = False
    """Compile trunk layers, head blocks and the cross-entropy of their scores with torch.compile."""
    loss_kernel: Literal["own", "liger"] = "own"
    """What computes the cross-entropy of each offset's scores: this package, or Liger Kernel's fused Triton kernel, an
    extra (`pip install mtp_lightning[liger]`) for GPUs, with which numbers change by rounding."""
    cache_hidden_states: LocalPath | None = None
    """Folder for the last hidden states of a frozen trunk, written when a row is first read and read instead of running
    the trunk in later epochs and runs; may be shared by runs and ranks. null: the trunk runs on every row."""

"""Sections of a recipe: frozen, typed, torch-free. One docstring per field, shown by `mtp recipe show --docs`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
MIXTURE_BLOCK_ROWS = 4096
"""Rows over which a mixture keeps its weights exactly."""
DISTILLED_LOGITS = 10_000
"""Largest logits of the teacher that distillation compares by default [MTP-D]."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """Shape of the trunk: a Llama-type decoder."""

    width: PositiveInt = 256
    """Width D of the hidden states."""
    num_layers: PositiveInt = 8
    """Transformer layers in all; with `heads.match_parameters` the heads' layers are taken from these."""
    num_attention_heads: PositiveInt = 8
    """Query heads per layer."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads per layer (grouped-query attention); null means as many as query heads."""
    head_width: PositiveInt | None = None
    """Width of one attention head; null means width / num_attention_heads."""
    mlp_width: PositiveInt | None = None
    """Inner width of the SwiGLU; null means 8/3 of the width, rounded up to a multiple of 64."""
    vocabulary: PositiveInt = 257
    """Vocabulary V; must exceed every token id in the data (257 = bytes + end of document)."""
    max_positions: PositiveInt = 4096
    """Longest window the rotary positions are meant for; exported with the model."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    qkv_bias: bool = False
    """Add a bias to the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """Normalise queries and keys per head (Qwen3)."""
    tie_embeddings: bool = False
    """Use the token embedding as the unembedding matrix."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections are scaled down by sqrt(2 x layers)."""

    @property
    def resolved_head_width(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.num_attention_heads

    @property
    def resolved_key_value_heads(self) -> int:
        """Key and value heads per layer."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def resolved_mlp_width(self) -> int:
        """Inner width of the SwiGLU."""
        return self.mlp_width or -(-8 * self.width // (3 * 64)) * 64


class HeadsSection(Section):
    """Which offsets are predicted, and by what kind of head."""

    num_offsets: PositiveInt = 4
    """Number n of predicted tokens, the next one included; 1 is a plain next-token model."""
    kind: Literal["parallel", "linear", "chained", "sequential", "recursive", "medusa"] = "parallel"
    """Head kind: parallel layers, linear maps, chained layers, DeepSeek modules, one unrolled module, Medusa blocks."""
    order: Literal["causal", "anticausal"] = "causal"
    """Direction of the chain, for kind `chained`: next token first, or far token first."""
    layers_per_head: PositiveInt = 1
    """Transformer layers (or Medusa blocks) in each head."""
    match_parameters: bool = True
    """Take the extra heads' layers from the trunk, so that the layer count does not depend on n."""
    unembedding: Literal["shared", "replicated"] = "shared"
    """One V x D matrix for all offsets, or one per offset (byte vocabularies, original Medusa)."""
    hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """Hidden state that sequential and recursive modules read: after or before the final norm."""
    concatenation: Literal["embedding_first", "hidden_first"] = "embedding_first"
    """Order of the 2D-wide input of sequential and recursive modules (DeepSeek: embedding first; MiMo: hidden)."""
    isolate_trunk: bool = False
    """Keep the gradients of offsets beyond the first out of the trunk."""
    trainable_from: Annotated[int, Field(ge=2)] | None = None
    """First offset whose head is trained; trunk, unembedding and the heads before it are frozen. Null trains all."""


class ConstantWeights(Section):
    """The same weight all the time."""

    kind: Literal["constant"] = "constant"
    values: list[NonNegativeFloat] | None = None
    """One weight per offset, the main head first; null means 1 for each [Gloeckle 2024]."""


class DecayWeights(Section):
    """Geometric decay over the extra offsets; the main head has weight 1 [Medusa, FastMTP]."""

    kind: Literal["decay"]
    beta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
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
    window_tokens: PositiveInt = 256
    """How many tokens ahead the order is scored; the official runs use 4096."""


class DistillSection(Section):
    """Self-distillation: extra offsets also learn from the main head's distribution [MTP-D, arXiv 2603.23911].

    The loss of offset k becomes its weight x (alpha x cross-entropy + beta x divergence). Its teacher at position t is
    the main head at position t+k-1, which predicts the same token; where there is none, only the cross-entropy counts.
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
    top_k: PositiveInt | None = None
    """How many of the teacher's largest logits are compared; null means 10,000, or all where there are fewer."""
    temperature: PositiveFloat = 1.0
    """What both sides' logits are divided by before the softmax; the loss is not scaled back."""
    where: Literal["all", "confident"] = "all"
    """Every position that has a teacher, or those where its largest probability reaches `confidence`."""
    confidence: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """For `where: confident`: the least probability."""
    detach_teacher: bool = True
    """Stop the gradient at the teacher; false lets the divergence change the main head too, an ablation."""

    def resolved_top_k(self, vocabulary: int) -> int:
        """Number K of logits that are compared."""
        return min(self.top_k or DISTILLED_LOGITS, vocabulary)

    def alpha_of(self, offset: int) -> float:
        """Weight of the cross-entropy of an extra offset."""
        return self.alpha[(offset - 2) % len(self.alpha)]

    def beta_of(self, offset: int) -> float:
        """Weight of the divergence of an extra offset."""
        return self.beta[(offset - 2) % len(self.beta)]


class ObjectiveSection(Section):
    """Losses and the order in which they are computed."""

    schedule: Literal["sequential", "bridged", "joint"] = "sequential"
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
    chunk_mib: PositiveFloat = 64.0
    """Memory that one chunk of logits may take, in MiB; sets how many positions are scored at once."""
    checkpoint_trunk: bool = False
    """Recompute the trunk's layers in the backward pass instead of keeping their activations."""
    checkpoint_heads: bool | None = None
    """Recompute the heads in the backward pass instead of keeping their activations; null means for kind `recursive`
    only, whose module's layers run n-1 times on top of the trunk's."""
    compile: bool = False
    """Compile trunk layers and head blocks with torch.compile."""


class DataSection(Section):
    """Where the tokens come from, and how windows are cut."""

    corpus: list[str] = Field(default=["stdlib"], min_length=1)
    """Text to build shards from: folders, files, globs, `stdlib` (Python's own library), `stdlib:json` (a package)."""
    shards: str | None = None
    """Folder of shards made by `mtp data build`; null means: build from the corpus into run.cache when missing."""
    mixture: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Several folders of shards and their weights, e.g. {shards/code: 1, shards/web: 3}, instead of `shards`."""
    mixture_epochs: dict[str, PositiveFloat] = Field(default_factory=dict)
    """How often a run may at most read through a source of the mixture, e.g. {shards/code: 4}; without, any number."""
    tokenizer: str = "byte"
    """Tokenizer: `byte` (256 bytes + end of document), or a file, `tokenizer.json` or a SentencePiece `*.model`."""
    end_of_document: Annotated[int, Field(ge=0)] | None = None
    """Id of the token that ends a document; null means the tokenizer's own."""
    deduplicate: bool = False
    """Leave out of a corpus every document that is equal to an earlier one."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.03
    """Share of documents held out for validation, chosen by a hash of their path."""
    window_tokens: Annotated[int, Field(ge=2)] = 256
    """Positions T per window; each row holds T + n tokens."""
    packing: Literal["cut", "best_fit"] = "cut"
    """Windows cut from the documents one after another, or filled with whole documents by best fit."""
    attention: Literal["document", "window"] = "window"
    """Attend within the document only (positions restart there), or over the whole window."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; 0 reads in the training process."""


class BatchSection(Section):
    """Rows per optimizer step, and how they are cut up."""

    rows: PositiveInt = 16
    """Rows (windows) per optimizer step, over all ranks."""
    micro_rows: PositiveInt = 16
    """Rows per forward and backward on one rank; must divide rows."""


class OptimizerSection(Section):
    """AdamW with warm-up and cosine decay."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    lr_scale: dict[Literal["trunk", "heads", "unembedding"], PositiveFloat] = Field(default_factory=dict)
    """Factors on the learning rate by role, e.g. {heads: 4}."""
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """Epsilon of AdamW."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up; a shorter run ends within it."""
    decay_ratio: Fraction = 0.1
    """Learning rate at the last step, as a share of the peak."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; null means no clipping."""


class GuardSection(Section):
    """Watches how far the main head drifts from the model that the run starts from, on fixed held-out rows."""

    every_steps: PositiveInt = 100
    """Steps between two looks."""
    rows: Annotated[int, Field(ge=2)] = 64
    """Held-out rows to look at."""
    warn_loss: PositiveFloat | None = 0.01
    """Warn when the main head's loss has surely risen by this much, in nats: the low end of its 95 % interval."""
    stop_loss: PositiveFloat | None = 0.05
    """Stop the run when it has surely risen by this much."""
    warn_kl: PositiveFloat | None = None
    """Warn at this mean KL, in nats, of the starting model from the present one."""
    stop_kl: PositiveFloat | None = None
    """Stop at this mean KL."""
    warn_flips: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Warn when the likeliest token has changed at this share of positions."""
    stop_flips: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Stop at this share."""


class RunSection(Section):
    """Where a run lives, how long it lasts, what it writes and when."""

    dir: str = "runs/default"
    """Run folder; a folder that already has a checkpoint of the same recipe is continued."""
    cache: str = "runs/cache"
    """Folder for shards built from a corpus, shared between runs."""
    fresh: bool = False
    """Start over: move an earlier run in this folder aside instead of continuing it."""
    start_from: str | None = None
    """Run, checkpoint or exported folder whose weights a new run starts with; optimizer and data begin anew."""
    guard: GuardSection | None = None
    """Guard of the main head, or null; for runs that start from a model."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights and of the order of the data."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32; bf16: autocast over fp32 weights on one device, bf16 weights beside an fp32 master under ZeRO; fp16: under
    ZeRO on GPUs only, with loss scaling."""
    threads: PositiveInt | None = None
    """CPU threads for tensor work; null leaves torch's choice."""
    log_every_steps: PositiveInt = 10
    """Steps between rows of metrics."""
    validate_every_steps: PositiveInt = 200
    """Steps between validations; there is one more after the last step."""
    validation_rows: PositiveInt = 64
    """Held-out rows per validation."""
    checkpoint_every_steps: PositiveInt = 200
    """Steps between checkpoints; there is one more after the last step."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints to keep, besides the best by accepted length."""
    checkpoint_in_background: bool | None = None
    """Copy the state to the host and write it while training goes on; null means: where it lies on a GPU."""
    hang_after_s: PositiveFloat | None = 900.0
    """Seconds without any progress after which a rank writes its stacks and ends with exit code 89; first steps and
    saves get six times as long; null means never."""
    hang_factor: PositiveFloat = 10.0
    """The same as a multiple of the median step; the longer of the two holds."""


class StrategySection(Section):
    """How a model is spread over ranks."""

    kind: Literal["single", "zero1", "zero2", "zero3"] = "single"
    """One rank, or DeepSpeed ZeRO: shard the optimizer's state (1), gradients too (2), parameters too (3)."""
    num_nodes: PositiveInt = 1
    """Machines."""
    ranks_per_node: PositiveInt = 1
    """Ranks (GPUs) per node."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state lives when it is not on the GPU."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where sharded parameters live between uses when they are not on the GPU; zero3 only."""
    nvme_path: str | None = None
    """Folder on a local disk for what is offloaded to nvme."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys merged over the generated configuration."""

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes."""
        return self.num_nodes * self.ranks_per_node


class DebugSection(Section):
    """Help in trying a recipe out."""

    shrink: bool = False
    """Make model, step and run small enough for a laptop, and read Python's own library; heads, schedule, precision and
    strategy stay, and so does whatever the command line sets."""


class Recipe(Section):
    """A whole run as a value."""

    name: str = "default"
    """Name of the recipe, shown in tables and titles."""
    model: ModelSection = ModelSection()
    """Shape of the trunk."""
    heads: HeadsSection = HeadsSection()
    """Offsets and head kind."""
    objective: ObjectiveSection = ObjectiveSection()
    """Losses and schedule."""
    data: DataSection = DataSection()
    """Tokens and windows."""
    batch: BatchSection = BatchSection()
    """Rows per step."""
    optimizer: OptimizerSection = OptimizerSection()
    """AdamW and its schedule."""
    run: RunSection = RunSection()
    """Folder, length, logging."""
    strategy: StrategySection = StrategySection()
    """Ranks, and what is sharded over them."""
    debug: DebugSection = DebugSection()
    """Trying out."""

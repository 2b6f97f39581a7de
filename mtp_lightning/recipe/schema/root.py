"""Sections of a recipe: frozen, typed, torch-free. One docstring per field, shown by `mtp recipe show --docs`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mtp_lightning.recipe.schema.base import (
    AtLeastTwo,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
)
from mtp_lightning.recipe.schema.data import BatchSection, DataSection
from mtp_lightning.recipe.schema.model import BELOW, AdaptSection, FrozenPart, HeadsSection, ModelSection
from mtp_lightning.recipe.schema.objective import MemorySection, ObjectiveSection
from mtp_lightning.recipe.schema.paths import LocalPath, PathOrUrl
from mtp_lightning.recipe.schema.phases import PhaseSection


class MuonSection(Section):
    """Muon (torch.optim.Muon): momentum whose matrices are made nearly orthogonal before each step."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Look one step ahead along the momentum."""
    ns_steps: Annotated[int, Field(ge=1, le=99)] = 5
    """Newton-Schulz iterations that make a matrix orthogonal."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the learning rate of a matrix by its shape: 0.2 sqrt(max(rows, columns)), whose steps are as long as
    those of AdamW, so that its learning rate and weight decay can stay; or sqrt(max(1, rows / columns))."""


class AdafactorSection(Section):
    """Adafactor (torch.optim.Adafactor) [Shazeer 2018, arXiv 1804.04235]: the second moment of a matrix as the outer
    product of a row and a column, and no first moment."""

    beta2_decay: Annotated[float, Field(le=0.0)] = -0.8
    """Power of the step that the share of a new squared gradient in the second moment falls by."""
    clip_threshold: Annotated[float, Field(ge=1.0)] = 1.0
    """Largest root mean square of the update of a parameter, before the learning rate."""
    eps_gradient: NonNegativeFloat | None = None
    """Least root of a second moment; null: the distance of 1 from the next number of the type, 1.2e-7 in fp32."""
    eps_weight: NonNegativeFloat = 1e-3
    """Least root mean square of a parameter that the learning rate is multiplied by."""


class EmaSection(Section):
    """An exponential moving average of the weights, kept beside them in fp32; `--weights ema` takes it."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Share of the average that stays at an update."""
    every_steps: PositiveInt = 1
    """Steps between updates."""
    from_step: NonNegativeInt = 0
    """Steps of the run before the first update, which takes the weights as they are."""


class OptimizerSection(Section):
    """What changes the weights, and by how much in each step."""

    kind: Literal["adamw", "muon", "adafactor"] = "adamw"
    """adamw: AdamW for all parameters. muon: Muon for the matrices of layers in trunk and heads, AdamW for embeddings,
    unembedding, norms, biases, low-rank updates and experts that are stacked in one tensor. adafactor: Adafactor for
    all parameters, where strategy.kind is single; learning rates are relative to the size of a parameter."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    lr_scale: dict[Literal["trunk", "heads", "unembedding", "lora", "layer_mix"], PositiveFloat] = Field(
        default_factory=dict
    )
    """Factors on the learning rate by role, e.g. {heads: 4}."""
    mup_base_width: PositiveInt | None = None
    """Width (hidden_size) that `lr` and `model.initializer_range` were chosen at: matrices of a wider model learn more
    slowly and start smaller (muP). null: all widths alike."""
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """Epsilon of AdamW."""
    muon: MuonSection = MuonSection()
    """Settings of Muon."""
    adafactor: AdafactorSection = AdafactorSection()
    """Settings of Adafactor."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    decay_scale: dict[Literal["trunk", "heads", "unembedding", "lora", "layer_mix"], NonNegativeFloat] = Field(
        default_factory=dict
    )
    """Factors on the weight decay by role, e.g. {unembedding: 0}."""
    ema: EmaSection | None = None
    """Average of the weights over the steps, or null: none."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """How the learning rate goes on after warm-up: down to its least by a cosine or a straight line, not down at all,
    down in the last steps only (wsd: warm-up, stable, decay), or as one over the root of the step."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up; a run that the command line has made shorter ends within it."""
    warmup_from: Fraction = 0.0
    """Share of the peak that warm-up starts from, e.g. where the run before has ended."""
    rewarm_at: PositiveInt | None = None
    """Step at which the learning rate warms up once more, for a run that is continued after its decay; null: never."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate at the last step, as a share of the peak; for inverse_sqrt the least there is."""
    decay_fraction: PositiveFraction = 0.2
    """Share of the run's steps in which wsd decays, at its end."""
    decay_shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"
    """How wsd decays: as one minus the root of the share that is done, by a straight line or by a cosine."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; null means no clipping."""


class DriftSection(Section):
    """Measures how far the main head drifts from the model that the run starts from, on fixed held-out samples."""

    every_steps: PositiveInt = 100
    """Steps between two looks."""
    samples: AtLeastTwo = 64
    """Held-out samples to look at."""
    warn_loss: PositiveFloat | None = 0.01
    """Warn when the main head's loss has surely risen by this much, in nats: the low end of its 95 % interval."""
    stop_loss: PositiveFloat | None = 0.05
    """Stop the run when it has surely risen by this much."""
    warn_kl: PositiveFloat | None = None
    """Warn at this mean KL, in nats, of the starting model from the present one."""
    stop_kl: PositiveFloat | None = None
    """Stop at this mean KL."""
    warn_flips: PositiveFraction | None = None
    """Warn when the likeliest token has changed at this share of positions."""
    stop_flips: PositiveFraction | None = None
    """Stop at this share."""


class NonFiniteSection(Section):
    """What a run does about a loss or gradient that is not finite."""

    skip_steps: NonNegativeInt = 1
    """Steps in a row that leave the weights as they are and the run goes on from; at one more it rolls back."""
    rollbacks: Annotated[int, Field(ge=0, le=16)] = 3
    """How often a run may go back to its last good checkpoint and leave the rows of those steps out; after that it ends
    with exit code 88."""


class EarlyStopSection(Section):
    """Ends a run, or a phase, whose acceptance length no longer rises."""

    validations: PositiveInt = 5
    """Validations in a row without a gain after which the run ends."""
    least_gain: NonNegativeFloat = 0.01
    """Tokens per forward that count as a gain in acceptance length; a main head that is better by 5 % always does."""


class RunSection(Section):
    """Where a run lives, how long it lasts and on what it computes."""

    dir: LocalPath = "runs/default"
    """Run folder; a folder that already has a checkpoint of the same recipe is continued."""
    cache: LocalPath = "runs/cache"
    """Folder for shards built from a corpus or fetched from a URL, shared between runs."""
    restart: bool = False
    """Start over: move an earlier run in this folder aside instead of continuing it."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of initial weights and of the order of the data."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32; bf16: autocast over fp32 weights on one device, bf16 weights beside an fp32 master under ZeRO; fp16: under
    ZeRO on GPUs only, with loss scaling."""
    deterministic: bool = False
    """Take kernels that give the same bits for the same input, at some cost in time, and stop at an operation that has
    none. On a CPU kernels are so anyway."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads for tensor work; null leaves torch's choice."""
    validate_every_steps: PositiveInt = 200
    """Steps between validations; there is one more after the last step."""
    validation_samples: PositiveInt = 64
    """Held-out samples (sequences of `data.seq_len`) per validation."""
    early_stop: EarlyStopSection | None = None
    """End when the mean acceptance length no longer rises, or null: after `steps`."""
    sample: str | None = None
    """Prompt that is continued when the run has ended, drawn at temperature 0.7, drafts coloured and their gain
    measured; null: none."""


class InitSection(Section):
    """The model that a new run starts from; without one, weights are drawn at random."""

    path: LocalPath | None = None
    """Run, checkpoint or exported folder whose weights a new run starts with; optimizer and data begin anew."""
    optimizer: bool = False
    """Also take the optimizer's state of `init.path`; the same parameters must be trained."""
    data_position: bool = False
    """Go on in the data where `init.path` stood, instead of at the beginning."""


class CheckpointSection(Section):
    """When the state of a run is saved, and how many checkpoints are kept."""

    every_steps: PositiveInt | None = 200
    """Steps between checkpoints; there is one more after the last step. null: not by steps."""
    every_minutes: PositiveFloat | None = None
    """Minutes after the last checkpoint, by the first rank's clock, after which the next step is saved; null: not by
    time."""
    keep: AtLeastTwo = 2
    """Newest checkpoints to keep, besides the best by mean acceptance length."""
    keep_every_steps: PositiveInt | None = None
    """Steps divisible by this are saved too, and their checkpoints never deleted; null: none is kept for ever."""
    in_background: bool | None = None
    """Copy the state to the host and write it while training goes on; null means: where it lies on a GPU."""

    def is_due(self, step: int) -> bool:
        """Tell whether a step is saved whatever the clock says."""
        return any(every is not None and step % every == 0 for every in (self.every_steps, self.keep_every_steps))

    def is_permanent(self, step: int) -> bool:
        """Tell whether the checkpoint of a step is kept for ever."""
        return self.keep_every_steps is not None and step % self.keep_every_steps == 0


class LoggingSection(Section):
    """Where metrics go besides the screen. No logger uses the network unless one that does is asked for."""

    every_steps: PositiveInt = 10
    """Steps between rows of metrics."""
    curves: bool = True
    """Draw curves.png when the run ends; its figures are in metrics.csv whether it is drawn or not."""
    loggers: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] = Field(default=["csv", "tensorboard"])
    """Any of csv (metrics.csv, written whether listed or not: summary and reports read it), tensorboard, wandb (Weights
    & Biases) and mlflow; the last two need an extra of their name."""
    project: str = "mtp_lightning"
    """Project at W&B, experiment in MLflow."""
    group: str | None = None
    """Group of runs at W&B, a tag in MLflow."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""
    entity: str | None = None
    """User or team at W&B; null: the one of the login."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of W&B: offline writes to the folder wandb of the run folder, for `wandb sync`; null: the environment
    variable WANDB_MODE, else online."""
    tracking_uri: PathOrUrl | None = None
    """Server or store of MLflow; null: the environment variable MLFLOW_TRACKING_URI, else mlflow.db in the run
    folder."""


class HealthSection(Section):
    """What a run watches itself for."""

    drift: DriftSection | Literal["auto"] | None = "auto"
    """Drift of the main head, for runs that start from a model; auto: where the main head or what it reads is trained
    on, warn as below and stop when its loss has surely risen by 0.5 nats; null: do not measure."""
    nonfinite: NonFiniteSection = NonFiniteSection()
    """What to do about a loss or gradient that is not finite."""
    hang_after_s: Annotated[float, Field(gt=0.0, ge=1e-3, le=1e9)] | None = 900.0
    """Seconds without any progress after which a rank writes its stacks and ends with exit code 89; first steps and
    saves get six times as long; null means never."""
    hang_factor: PositiveFloat = 10.0
    """The same as a multiple of the median step; the longer of the two holds."""


class StrategySection(Section):
    """How a model is spread over ranks."""

    kind: Literal["single", "zero1", "zero2", "zero3"] = "single"
    """One rank, or DeepSpeed ZeRO: shard the optimizer's state (1), gradients too (2), parameters too (3)."""
    num_nodes: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Machines."""
    ranks_per_node: Annotated[int, Field(ge=1, le=1024)] = 1
    """Ranks (GPUs) per node."""
    sequence_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Consecutive ranks that share a window (DeepSpeed Ulysses): each computes an equal slice of its positions, and in
    attention an equal share of the heads. Activations are that much smaller, and so are the rows that run at once."""
    elastic: bool = False
    """Take as many nodes and ranks as have been started in place of the two fields above, as under `torchrun
    --nnodes=1:4`, which starts ranks again when nodes go or come; the global batch stays."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """What ranks add gradients up in; bf16, for precision bf16 only, sends half as much and rounds at every hop."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state lives when it is not on the GPU."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where sharded parameters live between uses when they are not on the GPU; zero3 only."""
    nvme_path: LocalPath | None = None
    """Folder on a local disk for what is offloaded to nvme."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys merged over the generated configuration."""

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def num_shares(self) -> int:
        """Groups of ranks that read rows of their own."""
        return max(1, self.num_ranks // self.sequence_parallel)


class DebugSection(Section):
    """Help in trying a recipe out."""

    shrink: bool = False
    """Make model, step and run small enough for a laptop, and read Python's own library; heads, backward order,
    precision and strategy stay, and so does whatever the command line sets."""
    profile_steps: list[PositiveInt] | None = Field(default=None, min_length=2, max_length=2)
    """First and last of the steps that torch's profiler records, into the folder `profile` of the run; null: none. As
    `mtp train --profile`."""


class Recipe(Section):
    """A whole run as a value."""

    name: str = "default"
    """Name of the recipe, shown in tables and titles."""
    model: ModelSection = ModelSection()
    """Shape of the trunk."""
    heads: HeadsSection = HeadsSection()
    """Offsets and head kind."""
    freeze: list[FrozenPart] = Field(default_factory=list)
    """Parts that are not trained: trunk, heads, unembedding (final norms and V x D matrices), lora, layer_mix; or
    offsets_below_K: all that the offsets 1 to K-1 compute with, so that only the heads from K on are trained."""
    adapt: AdaptSection = AdaptSection()
    """What is added to a pretrained model."""
    objective: ObjectiveSection = ObjectiveSection()
    """Losses and the order of backward."""
    memory: MemorySection = MemorySection()
    """Recomputation and compilation."""
    data: DataSection = DataSection()
    """Tokens and sequences."""
    batch: BatchSection = BatchSection()
    """Sequences per step."""
    optimizer: OptimizerSection = OptimizerSection()
    """Optimizer, learning rate and average of the weights."""
    run: RunSection = RunSection()
    """Folder, length, device."""
    init: InitSection = InitSection()
    """The model that the run starts from."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving."""
    logging: LoggingSection = LoggingSection()
    """Metrics."""
    health: HealthSection = HealthSection()
    """Watching."""
    strategy: StrategySection = StrategySection()
    """Ranks, and what is sharded over them."""
    phases: dict[str, PhaseSection] = Field(default_factory=dict)
    """Stretches of the run by name, one after the other, each the recipe with changes; empty for a run of one piece."""
    debug: DebugSection = DebugSection()
    """Trying out."""

    @property
    def recomputes_heads(self) -> bool:
        """Whether the heads' activations are computed again in the backward pass."""
        given = self.memory.recompute_heads
        return self.heads.kind == "recursive" if given is None else given

    @property
    def first_trained_offset(self) -> int | None:
        """K of `offsets_below_K` in `freeze`: the first offset whose head is trained; None where there is none."""
        return max((int(part.removeprefix(BELOW)) for part in self.freeze if part.startswith(BELOW)), default=None)

    @property
    def frozen_parts(self) -> list[str]:
        """Parts of `freeze` that are frozen for all offsets."""
        return [part for part in self.freeze if not part.startswith(BELOW)]

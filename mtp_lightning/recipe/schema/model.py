"""Sections of the model: the trunk, the heads, and what an adaptation adds or freezes."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mtp_lightning.recipe.head_kinds import BUILT_IN, head_kinds
from mtp_lightning.recipe.schema.base import (
    LARGEST,
    AtLeastTwo,
    Choices,
    Layers,
    Offsets,
    PositiveFloat,
    PositiveInt,
    Section,
)
from mtp_lightning.recipe.schema.paths import LocalPath

BELOW = "offsets_below_"
FrozenPart = Annotated[str, Field(pattern=rf"^(trunk|heads|unembedding|lora|layer_mix|{BELOW}\d+)$")]

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


class LoraSection(Section):
    """Low-rank updates of the trunk's matrices, W + alpha / rank x B A; of the trunk nothing else is trained."""

    rank: PositiveInt = 8
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 16.0
    """Scale of the update, times rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the channels that A reads which are set to zero in training."""
    targets: list[Target] = Field(default=["q", "k", "v"], min_length=1)
    """Projections that are updated, in every layer."""
    in_heads: bool = False
    """Also update the projections of the layers inside heads; these stay trained themselves unless they are frozen."""


class LayerMixSection(Section):
    """What a head reads of the trunk: not its last layer, but softmax(w / T) over all layers, w its own [Mehra 2025].

    The embedding is not among the layers; heads that read another offset are left as they are.
    """

    temperature: PositiveFloat = 0.1
    """T: the smaller, the faster a head settles on few layers."""
    init: Annotated[float, Field(ge=-LARGEST, le=LARGEST)] = 0.1
    """What every weight starts as; the mixture starts as the mean of all layers."""
    main_head: bool = True
    """Also for the main head, which then no longer starts as the model's own; false leaves it the last layer."""


class AdaptSection(Section):
    """Adaptation of a pretrained model; as it is by default, all of a model is trained and nothing is added."""

    lora: LoraSection | None = None
    """Low-rank updates of the trunk, or null."""
    layer_mix: LayerMixSection | None = None
    """Mixtures of the trunk's layers for the heads to read, or null."""


Family = Literal["llama", "mistral", "qwen2", "qwen3", "mimo", "gpt_neox", "transformers"]


class RopeScalingSection(Section):
    """Slower rotary frequencies, for windows longer than those that the model was first trained on."""

    kind: Literal["linear", "ntk", "dynamic", "llama3", "yarn"] = "llama3"
    """All frequencies alike; the slower the more, by a larger base (ntk: times factor^(R / (R - 2)), R channels turn);
    only those whose wave is long against `original_positions` [Llama 3.1; YaRN]; or, dynamic, none within
    `max_position_embeddings`, where training and decoding here end: what readers do beyond is theirs."""
    factor: PositiveFloat = 8.0
    """What frequencies are divided by; for ntk the slowest, and for dynamic kept for other readers."""
    low_freq_factor: PositiveFloat = 1.0
    """For `llama3`: waves longer than original_positions / low_freq_factor are slowed down whole."""
    high_freq_factor: PositiveFloat = 4.0
    """For `llama3`: waves shorter than original_positions / high_freq_factor are left as they are."""
    original_positions: PositiveInt = 8192
    """For `llama3` and `yarn`: window that the model was first trained on."""
    beta_fast: PositiveFloat = 32.0
    """For `yarn`: frequencies with more turns than this in `original_positions` are left as they are."""
    beta_slow: PositiveFloat = 1.0
    """For `yarn`: those with fewer are slowed down whole."""
    attention_factor: PositiveFloat | None = None
    """For `yarn`: what queries and keys are multiplied by; null: 0.1 ln(factor) + 1."""

    @property
    def resolved_attention_factor(self) -> float:
        """What queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(max(1.0, self.factor)) + 1.0


SETTLED: dict[str, tuple[type, tuple[str, ...]]] = {
    "hidden_size": (int, ("hidden_size", "n_embd", "d_model")),
    "num_hidden_layers": (int, ("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    "num_attention_heads": (int, ("num_attention_heads", "n_head", "n_heads", "num_heads")),
    "num_key_value_heads": (int, ("num_key_value_heads",)),
    "head_dim": (int, ("head_dim",)),
    "intermediate_size": (int, ("intermediate_size", "n_inner", "ffn_dim")),
    "vocab_size": (int, ("vocab_size",)),
    "max_position_embeddings": (int, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")),
    "tie_word_embeddings": (bool, ("tie_word_embeddings",)),
    "initializer_range": (float, ("initializer_range", "init_std")),
}
"""Fields of a model that settings of transformers settle: their type, and their names there."""
OWN_ONLY = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "norm", "norm_eps", "mlp", "parallel_residual"),
    *("qkv_bias", "output_bias", "mlp_bias", "qk_norm"),
)
"""Fields that only the trunks here read."""


def settled_by(settings: Any) -> dict[str, Any]:
    """Return the fields that settings of transformers settle.

    >>> settled_by({"n_embd": 32, "n_layer": 2, "tie_word_embeddings": True, "n_inner": None})
    {'hidden_size': 32, 'num_hidden_layers': 2, 'tie_word_embeddings': True}
    """
    if not isinstance(settings, dict):
        return {}
    found: dict[str, Any] = {}
    for field, (kind, names) in SETTLED.items():
        values = [settings[name] for name in names if type(settings.get(name)) is kind]
        found |= {field: values[0]} if values else {}
    return found


class ModelSection(Section):
    """Shape of the trunk: a decoder of the Llama or the GPT-NeoX type, or one of transformers."""

    hidden_size: PositiveInt = 256
    """Width D of the hidden states."""
    num_hidden_layers: Layers = 8
    """Transformer layers in all; with `heads.layers_from_trunk` the heads' layers are taken from these."""
    num_attention_heads: PositiveInt = 8
    """Query heads per layer."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads per layer (grouped-query attention); null means as many as query heads."""
    head_dim: PositiveInt | None = None
    """Width of one attention head; null means hidden_size / num_attention_heads."""
    intermediate_size: PositiveInt | None = None
    """Inner width of the feed-forward; null means 8/3 of the width, rounded up to a multiple of 64 (GELU: 4 widths)."""
    vocab_size: PositiveInt = 257
    """Vocabulary V; must exceed every token id in the data (257 = bytes + end of document)."""
    max_position_embeddings: PositiveInt = 4096
    """Longest window the rotary positions are meant for; exported with the model."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingSection | None = None
    """Scaling of the rotary frequencies, or null."""
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of each head's channels that the rotary positions turn, the first ones (Pythia: 0.25)."""
    norm: Literal["rms", "layer"] = "rms"
    """Every norm of width D: RMSNorm, or LayerNorm with a bias (GPT-NeoX)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every norm."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward: three matrices with a gate, or two with a GELU between them (GPT-NeoX)."""
    parallel_residual: bool = False
    """Let attention and feed-forward of a layer read the same input and add both to it (GPT-NeoX)."""
    qkv_bias: bool = False
    """Add a bias to the query, key and value projections (Qwen2)."""
    output_bias: bool = False
    """Add a bias to the output projection of attention (GPT-NeoX)."""
    mlp_bias: bool = False
    """Add a bias to every projection of the feed-forward (GPT-NeoX)."""
    qk_norm: bool = False
    """Normalise queries and keys per head (Qwen3)."""
    tie_word_embeddings: bool = False
    """Use the token embedding as the unembedding matrix."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections are scaled down by sqrt(2 x layers)."""
    family: Family | None = None
    """Architecture that the model was imported as and is exported as (`mtp export --format trunk`); null means the
    first that it fits. `transformers` builds the model of that library's own classes, by `hf_config`."""
    hf_config: dict[str, Any] | None = None
    """For family `transformers`: what the model's config.json says, whole; null for every other family. The fields of
    this section that it settles need not be given."""

    @model_validator(mode="before")
    @classmethod
    def _take_from_config(cls, given: Any) -> Any:
        """Fill in what `hf_config` settles."""
        if not isinstance(given, dict) or given.get("family") != "transformers":
            return given
        return settled_by(given.get("hf_config")) | given

    @property
    def is_foreign(self) -> bool:
        """Whether the model is built of transformers' classes."""
        return self.family == "transformers"

    @property
    def resolved_head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def resolved_key_value_heads(self) -> int:
        """Key and value heads per layer."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def resolved_intermediate_size(self) -> int:
        """Inner width of the feed-forward."""
        default = 4 * self.hidden_size if self.mlp == "gelu" else -(-8 * self.hidden_size // (3 * 64)) * 64
        return self.intermediate_size or default

    @property
    def resolved_rope_theta(self) -> float:
        """Base of the rotary frequencies, as `rope_scaling` of kind ntk makes it."""
        scaling, width = self.rope_scaling, self.rotary_width
        if scaling is None or scaling.kind != "ntk":
            return self.rope_theta
        return float(self.rope_theta * scaling.factor ** (width / (width - 2)))

    @property
    def rotary_width(self) -> int:
        """Channels of each head that the rotary positions turn."""
        return int(self.resolved_head_dim * self.partial_rotary_factor)


def _known_kind(name: str) -> str:
    if name not in BUILT_IN and name not in head_kinds():
        raise PydanticCustomError("literal_error", "must be a head kind")
    return name


class HeadsSection(Section):
    """Which offsets are predicted, and by what kind of head."""

    num_offsets: Offsets = 4
    """Number n of predicted tokens, the next one included; 1 is a plain next-token model."""
    kind: Annotated[str, AfterValidator(_known_kind), Choices(head_kinds)] = "parallel"
    """Head kind: parallel layers, linear maps, chained layers, DeepSeek modules, one unrolled module, Medusa blocks; or
    one that is registered."""
    order: Literal["causal", "anticausal"] = "causal"
    """Direction of the chain, for kind `chained`: next token first, or far token first."""
    layers_per_head: Layers = 1
    """Transformer layers (or Medusa blocks) in each head."""
    layers_from_trunk: bool = True
    """Take the extra heads' layers from the trunk, so that the layer count does not depend on n."""
    unembedding: Literal["shared", "replicated"] = "shared"
    """One V x D matrix for all offsets, or one per offset (byte vocabularies, original Medusa)."""
    draft_vocabulary: AtLeastTwo | LocalPath | None = None
    """Ids V' that offsets beyond the first score, of all V: how many, the most frequent of the training data, or a
    file of ids (a JSON list, or a text of numbers); the end of a document is always one. null: all V [FastMTP]."""
    draft_token_ids: str | None = None
    """The ids that a run chose, as a set of bits in base64: written when it starts, and kept ever after."""
    hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """Hidden state that sequential and recursive modules read: after or before the final norm."""
    concatenation: Literal["embedding_first", "hidden_first"] = "embedding_first"
    """Order of the 2D-wide input of sequential and recursive modules (DeepSeek: embedding first; MiMo: hidden)."""
    detach_trunk: bool = False
    """Keep the gradients of offsets beyond the first out of the trunk."""
    extend: Offsets | None = None
    """Where `init.path` has fewer offsets: how many of its trained heads, the last ones, the new ones are copied
    from, again and again; null refuses such a model."""

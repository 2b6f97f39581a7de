"""The whole model, and how it is built: first without memory, then initialised by one function."""

import hashlib
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.losses.row_losses import LossKernel
from mtp_lightning.model.heads import TRUNK, HeadContext, head_class
from mtp_lightning.model.layers import Geometry, LayerStack, Mlp, build_trunk, layers_of
from mtp_lightning.model.lora import add_updates, initialise_update
from mtp_lightning.model.positions import document_geometry, positions_in_document, window_geometry
from mtp_lightning.model.roles import LAYER_MIX, LORA, role_of
from mtp_lightning.model.scalar_mix import ScalarMix, Sums
from mtp_lightning.model.sequence_parallel import SequenceSlice
from mtp_lightning.model.transformers_init import initial_values
from mtp_lightning.model.transformers_routers import RouterLoss
from mtp_lightning.model.transformers_trunk import ForeignModules, ForeignStack, TransformersTrunk, check_masks
from mtp_lightning.model.unembedding import Unembedding
from mtp_lightning.model.width_scaling import initial_factor
from mtp_lightning.recipe.layer_counts import num_trunk_layers
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import mixing_offsets

KeptStates = Callable[[Tensor, Callable[[], Tensor]], Tensor]


class MtpModel(nn.Module):
    """Trunk, heads and unembedding of a recipe.

    Attributes:
        kept_states: gives the last states of a frozen trunk, (B, T, D), for all that it reads of rows, (B, ...)
            integers, and computes them by what it is given where it has none; None: the trunk runs on all rows.
        is_compiled: whether its layers are, and the cross-entropy of its scores is to be.
        loss_kernel: what computes the cross-entropy of its scores in training.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.section = recipe.model
        self.num_offsets = recipe.heads.num_offsets
        self.kept_states: KeptStates | None = None
        self.is_compiled = False
        self.loss_kernel: LossKernel = "own"
        self.attends_in_document = recipe.data.document_mask
        if recipe.model.is_foreign and recipe.data.document_mask:
            check_masks(recipe.model)
        self.trunk = build_trunk(recipe.model, num_trunk_layers(recipe), recompute=recipe.memory.recompute_trunk)
        self.heads = head_class(recipe.heads.kind)(recipe.model, recipe.heads, recompute=recipe.recomputes_heads)
        self.unembedding = Unembedding(recipe, self.heads)
        self.layer_mix = nn.ModuleDict(
            {str(offset): ScalarMix(num_trunk_layers(recipe), section) for offset in mixing_offsets(recipe)}
            if (section := recipe.adapt.layer_mix)
            else {}
        )
        if (lora := recipe.adapt.lora) is not None:
            for part in (self.trunk, self.heads) if lora.in_heads else (self.trunk,):
                add_updates(part, lora)
        for module in self.modules():
            if isinstance(module, Mlp):
                module.tile = recipe.memory.mlp_tile
            elif isinstance(module, LayerStack | ForeignStack | TransformersTrunk):
                module.on_host = recipe.memory.offload_activations
        self.tie_word_embeddings()

    def tie_word_embeddings(self) -> None:
        """Make embedding and unembedding one parameter where the recipe says so."""
        if self.section.tie_word_embeddings:
            self.unembedding.lm_heads[0].weight = self.trunk.embed_tokens.weight

    @property
    def router_loss(self) -> RouterLoss | None:
        """The load-balancing loss of a trunk with experts that has one."""
        return self.trunk.router_loss if isinstance(self.trunk, TransformersTrunk) else None

    @property
    def untrained(self) -> set[str]:
        """Names of parameters that no gradient reaches by design: saved buffers of transformers, what it freezes."""
        modules = [(path, module) for path, module in self.named_modules() if isinstance(module, ForeignModules)]
        return {f"{path}.{name}" for path, module in modules for name in module.untrained}

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed a batch of rows, or as much of them as is read: (B, T+n) -> (B, T+n, D) or (B, T, D)."""
        if not self.heads.reads_tokens:
            tokens = tokens[:, : tokens.shape[1] - self.num_offsets]
        embedded: Tensor = self.trunk.embed_tokens(tokens)
        return embedded

    def geometry(
        self,
        documents: Tensor,
        *,
        like: Tensor,
        starts: Tensor | None = None,
        sequence: SequenceSlice | None = None,
    ) -> Geometry:
        """Positions and attention mask of a batch of rows, from the documents of its (B, T+n) tokens.

        `starts`, (B, M), is where documents begin, to attend to them one by one (see `document_geometry`). `sequence`
        is this rank's slice of the rows, where they are cut over ranks; documents and starts are of the whole rows.
        """
        num_positions = documents.shape[1] - self.num_offsets
        if isinstance(self.trunk, TransformersTrunk):
            own = documents[:, :num_positions]
            inside = own if self.attends_in_document else None
            positions = positions_in_document(torch.zeros_like(own) if inside is None else own)
            return self.trunk.inputs(like[:, :num_positions], positions, inside)
        if self.attends_in_document:
            own = documents[:, :num_positions]
            return document_geometry(own, self.section, like=like, starts=starts, sequence=sequence)
        return window_geometry(num_positions, self.section, like=like, sequence=sequence)

    def context(self, embedded: Tensor, geometry: Geometry) -> HeadContext:
        """What heads may look at; without a gradient path to the embedding where the trunk is isolated."""
        if self.heads.detaches_trunk:
            embedded = embedded.detach()
        return HeadContext(geometry, embedded)

    def embed_drafts(self, drafts: Tensor) -> Tensor:
        """Embed what heads read in place of given tokens, as `context` would: (B, T) -> (B, T, D)."""
        embedded: Tensor = self.trunk.embed_tokens(drafts)
        return embedded.detach() if self.heads.detaches_trunk else embedded

    def parent_of(self, offset: int) -> int:
        """Name what an offset reads: another offset, `TRUNK`, or by its own number, negative, its mixture of layers."""
        return -offset if str(offset) in self.layer_mix else self.heads.parent_of(offset)

    def dependents(self, state: int) -> list[int]:
        """Offsets that read a state; the inverse of `parent_of`."""
        return [offset for offset in self.heads.offsets if self.parent_of(offset) == state]

    def trunk_states(self, embedded: Tensor, geometry: Geometry) -> dict[int, Tensor]:
        """Run the trunk: (B, T, D) -> one (B, T, D) for each of its states that `parent_of` names, and `TRUNK`."""
        if not self.layer_mix:
            return {TRUNK: self.trunk(embedded, geometry)[0]}
        sums = Sums({-int(offset): mixture() for offset, mixture in self.layer_mix.items()})
        last, *mixed = self.trunk(embedded, geometry, sums=sums)
        return {TRUNK: last, **dict(zip(sums.states, mixed, strict=True))}

    def states_of_rows(
        self, tokens: Tensor, documents: Tensor, embedded: Tensor, geometry: Geometry
    ) -> dict[int, Tensor]:
        """Run the trunk on rows, or take what is kept of them: two (B, T+n), (B, T+n, D) -> as `trunk_states`."""
        num_positions = geometry.num_positions

        def run() -> dict[int, Tensor]:
            return self.trunk_states(embedded[:, :num_positions], geometry)

        if self.kept_states is None:
            return run()
        read = (tokens, documents) if self.attends_in_document else (tokens,)
        return {TRUNK: self.kept_states(torch.stack(read, 1)[..., :num_positions], lambda: run()[TRUNK])}

    def read(self, offset: int, state: Tensor) -> Tensor:
        """What an offset reads of the state that it reads, normed or cut off: (B, T, D) -> (B, T, D)."""
        if self.heads.detaches_input(offset):
            state = state.detach()
        norm = self.heads.reads_norm_of(offset)
        return state if norm is None else self.unembedding.normalize(norm, state)

    def hidden_states(
        self,
        tokens: Tensor,
        documents: Tensor,
        offsets: Collection[int] | None = None,
        run: Callable[[int, Tensor, HeadContext], Tensor] | None = None,
        *,
        starts: Tensor | None = None,
        sequence: SequenceSlice | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states in one ordinary graph, main head first: two (B, T+n) -> one (B, T, D) per offset.

        `offsets` names those that are wanted (with all that they read); None means every one. `run` computes an offset
        in place of the heads. `starts` and `sequence` as in `geometry`; tokens and states are those of the slice then.
        """
        embedded = self.embed(tokens)
        geometry = self.geometry(documents, like=embedded, starts=starts, sequence=sequence)
        context = self.context(embedded, geometry)
        states = self.states_of_rows(tokens, documents, embedded, geometry)
        for offset in self.heads.order:
            if offsets is None or offset in offsets:
                source = self.read(offset, states[self.parent_of(offset)])
                states[offset] = (run or self.heads)(offset, source, context)
        return {offset: states[offset] for offset in self.heads.offsets if offset in states}

    def compile_parts(self) -> None:
        """Compile every transformer layer of trunk and heads, in place, and the loss's passes over scores."""
        self.is_compiled = True
        for layer in layers_of(self):
            layer.compile()


def build_model(recipe: Recipe, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> MtpModel:
    """Build the recipe's model on the meta device, allocate it on `device`, and initialise it from run.seed.

    Values are drawn in fp32 and rounded one parameter at a time: in another `dtype` the fp32 model is nowhere.
    """
    with torch.device("meta"):
        model = MtpModel(recipe)
    model.to(dtype=dtype).to_empty(device=device)
    model.tie_word_embeddings()
    initialise(model, recipe)
    return model


Whole = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def _as_they_are(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()


@torch.no_grad()
def initialise(model: MtpModel, recipe: Recipe, *, whole: Whole = _as_they_are, draws: bool = True) -> None:
    """Set every parameter from the seed and its own name, so that no parameter depends on the others' order.

    Matrices are normal; those that write into the residual stream are scaled down by sqrt(2 x layers). Norms
    start at one, biases at zero, linear heads at the identity, Medusa's maps at zero; `width_scaling.py` makes wider
    matrices smaller where `optimizer.mup_base_width` asks for it. Replicated unembeddings
    start as copies of the first, low-rank updates as none. Modules of transformers start by that library's own rules
    (`transformers_init.py`). `whole` makes parameters that are sharded over ranks whole
    for a while, and hands on what the rank that `draws` has set. Numbers are drawn on the CPU, wherever a parameter
    lies: one seed makes one model under every strategy and on every device.
    """
    for name, parameter in model.named_parameters():
        with whole([parameter]):
            if draws:
                initialise_parameter(name, parameter, recipe)
    if model.unembedding.is_replicated:
        first, *others = model.unembedding.lm_heads.parameters()
        for matrix in others:
            with whole([first, matrix]):
                matrix.copy_(first)


@torch.no_grad()
def initialise_parameter(name: str, parameter: Tensor, recipe: Recipe) -> None:
    """Set one parameter of the recipe's model, in place, as `initialise` says; replicated matrices apart."""
    if recipe.model.is_foreign and (values := initial_values(name, recipe)) is not None:
        parameter.copy_(values)
    elif parameter.dim() == 1 and role_of(name) == LAYER_MIX:
        assert recipe.adapt.layer_mix is not None
        parameter.fill_(recipe.adapt.layer_mix.init)
    elif parameter.dim() == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    elif role_of(name) == LORA:
        initialise_update(name, parameter, _generator_of(name, recipe))
    elif name.startswith("heads.") and recipe.heads.kind == "linear":
        nn.init.eye_(parameter)
    elif name.startswith("heads.") and recipe.heads.kind == "medusa":
        parameter.zero_()
    else:
        std = recipe.model.initializer_range * initial_factor(name, recipe)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * recipe.model.num_hidden_layers)
        generator = _generator_of(name, recipe)
        exact = torch.promote_types(parameter.dtype, torch.float32)
        drawn = torch.empty(parameter.shape, dtype=exact)
        parameter.copy_(drawn.normal_(0.0, std, generator=generator))


def _generator_of(name: str, recipe: Recipe) -> torch.Generator:
    digest = hashlib.sha256(f"{recipe.run.seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

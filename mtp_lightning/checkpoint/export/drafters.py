"""Heads as a drafter in a folder beside the trunk's: EAGLE-3's layout, and Medusa's.

An EAGLE-3 drafter is a transformer layer on a state from inside the trunk and on the embedding of the token that
follows. With columns of zero for the embedding it is a layer of ours on the state that the layer reads here; where the
second offset has no layer of its own, attention and feed-forward of the drafter write zeros, and its state passes
through. A linear head is a Medusa head whose block adds nothing, with the map inside of its unembedding matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.checkpoint.export.contents import Contents, Refusal, Source
from mtp_lightning.checkpoint.export.rewritten import (
    Made,
    RewrittenWeights,
    computed,
    filled,
    not_dense,
    notes_on,
    read_whole,
    refusal,
    row_by_row,
    rows_at,
    settings_as,
)
from mtp_lightning.checkpoint.export.trunk import trunk_contents
from mtp_lightning.checkpoint.huggingface.canonical_names import EXTRA, PLAIN, TensorSource
from mtp_lightning.checkpoint.huggingface.weights import OutgoingWeights
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe import Recipe, num_trunk_layers
from mtp_lightning.recipe.draft_vocabulary import draft_ids

DRAFTER = "drafter"
NARROW = 64
"""Inner width of a feed-forward that writes zeros."""
NORM, MATRICES, EMBEDDING = "unembedding.norms.0.weight", "unembedding.lm_heads.", "trunk.embed_tokens.weight"
BLOCKS = "heads.blocks."
OFFSETS, IS_DRAFTED = "d2t", "t2d"
"""What an EAGLE-3 drafter has beside the matrix of a draft vocabulary: id less number of each row, and which ids have
one. Medusa's has a row for every id: vLLM 0.32 names a `token_map` for fewer, and refuses every folder that has one."""
OF_IDS = {OFFSETS: torch.int64, IS_DRAFTED: torch.bool}
WIDENED = tuple(f"midlayer.self_attn.{one}_proj.weight" for one in "qkv")


def refuses_eagle(recipe: Recipe) -> Refusal | None:
    """Refuse kinds whose second offset is no layer or map of one state, and layers that the drafter cannot have."""
    heads, model = recipe.heads, recipe.model
    return refusal(
        "parallel, chained or linear heads on a trunk of Llama's kind, with neither norms of queries and keys nor a "
        "bias behind attention in the head's own layers",
        {f"{heads.kind} heads": heads.kind not in ("parallel", "chained", "linear")}
        | not_dense(recipe)
        | {
            "norms of queries and keys": model.qk_norm and _has_layers(recipe),
            "a bias behind attention": model.output_bias and _has_layers(recipe),
        },
    )


def refuses_medusa(recipe: Recipe) -> Refusal | None:
    """Refuse kinds that are neither blocks on the trunk's last state nor maps of it."""
    heads = recipe.heads
    return refusal(
        "Medusa or linear heads on a trunk of Llama's kind",
        {
            f"{heads.kind} heads": heads.kind not in ("medusa", "linear"),
            "linear maps before a matrix for each offset": heads.kind == "linear" and heads.unembedding == "replicated",
        }
        | not_dense(recipe),
    )


def eagle_contents(source: Source) -> dict[str, Contents]:
    """The trunk, and in a folder inside a drafter for the token after next."""
    recipe, width = source.recipe, source.section.hidden_size
    tensors = _own_layers(source) | {NORM: "norm.weight"}
    if recipe.heads.unembedding == "replicated":
        tensors[f"{MATRICES}1.weight"] = "lm_head.weight"
    if recipe.heads.kind == "linear":
        tensors[f"{BLOCKS}0.weight"] = "fc.weight"
    made = _around_layers(source, tensors) if _has_layers(recipe) else _no_layer(source)
    if recipe.heads.kind != "linear":
        made["fc.weight"] = computed((width, width), lambda: torch.eye(width))
    if (ids := draft_ids(recipe)) is not None:
        made["lm_head.weight"] = rows_at(source.reader, _matrix(source, 2), ids)
        made[OFFSETS] = computed((len(ids),), lambda: torch.tensor(ids) - torch.arange(len(ids)))
        made[IS_DRAFTED] = computed((recipe.model.vocab_size,), lambda: _is_among(ids, recipe.model.vocab_size))
    trunk = trunk_contents(source)
    return {"": trunk, DRAFTER: _drafter(source, tensors, made, _eagle_settings(source, trunk))}


def _is_among(ids: Sequence[int], vocab_size: int) -> Tensor:
    among = torch.zeros(vocab_size, dtype=torch.bool)
    among[[*ids]] = True
    return among


def _has_layers(recipe: Recipe) -> bool:
    """Tell whether the second offset has layers of its own, beyond those on the way to the next token."""
    heads = recipe.heads
    return heads.kind == "parallel" or (heads.kind == "chained" and heads.order == "causal")


def _layers_before(recipe: Recipe) -> int:
    """Count the layers of the next-token model before the state that the drafter reads."""
    heads, before = recipe.heads, num_trunk_layers(recipe)
    if heads.kind != "chained":
        return before
    return before + heads.layers_per_head * (1 if heads.order == "causal" else heads.num_offsets - 1)


def _own_layers(source: Source) -> dict[str, str]:
    """Name the tensors of the second offset's layers in the drafter; the first norm of the first is the state's."""
    extras = {name: EXTRA.fullmatch(one.place or "") for name, one in source.parameters.items()}
    named = {name: f"{_layer(int(place[2]))}.{place[3]}" for name, place in extras.items() if place and place[1] == "0"}
    return {name: stored.replace("midlayer.input_layernorm", "midlayer.hidden_norm") for name, stored in named.items()}


def _layer(number: int) -> str:
    return "midlayer" if number == 0 else f"layers.{number}"


def _around_layers(source: Source, tensors: Mapping[str, str]) -> dict[str, Made]:
    """Make what a drafter's layers have beyond ours: columns for the embedding, its norm, further names and biases."""
    reader, width = source.reader, source.section.hidden_size
    made = {"midlayer.input_layernorm.weight": filled(1.0, width)}
    for name, stored in tensors.items():
        if stored in WIDENED:
            made[stored] = computed((reader.shape(name)[0], 2 * width), _on_state(source, name))
        if stored.startswith("layers.") and stored.endswith("input_layernorm.weight"):  # SGLang's name of it
            made[stored.replace("input_layernorm", "hidden_norm")] = computed((width,), _read(source, name))
    if source.section.qkv_bias:
        layers = range(source.recipe.heads.layers_per_head)
        made |= {f"{_layer(number)}.self_attn.o_proj.bias": filled(0.0, width) for number in layers}
    return made


def _read(source: Source, name: str) -> Callable[[], Tensor]:
    return lambda: read_whole(source.reader, name)


def _on_state(source: Source, name: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        whole = read_whole(source.reader, name)
        return torch.cat((torch.zeros_like(whole), whole), dim=1)

    return make


def _no_layer(source: Source) -> dict[str, Made]:
    """Make a layer that adds nothing to the state."""
    section = source.section
    width, inside = section.hidden_size, section.num_attention_heads * section.resolved_head_dim
    shared = section.resolved_key_value_heads * section.resolved_head_dim
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    shapes = dict(zip(WIDENED, ((inside, 2 * width), (shared, 2 * width), (shared, 2 * width)), strict=True)) | {
        "midlayer.self_attn.o_proj.weight": (width, inside),
        "midlayer.mlp.gate_proj.weight": (NARROW, width),
        "midlayer.mlp.up_proj.weight": (NARROW, width),
        "midlayer.mlp.down_proj.weight": (width, NARROW),
    }
    ones = {f"midlayer.{name}.weight": filled(1.0, width) for name in norms}
    return ones | {name: filled(0.0, *shape) for name, shape in shapes.items()}


def _eagle_settings(source: Source, trunk: Contents) -> dict[str, Any]:
    """Write the drafter's config.json.

    vLLM counts the layers before a state; SGLang, which looks into `eagle_config`, numbers the layer that makes it.
    """
    recipe, section = source.recipe, source.section
    has_layers, before = _has_layers(recipe), _layers_before(recipe)
    has_bias = has_layers and section.qkv_bias
    settings = settings_as(
        source,
        trunk,
        "llama",
        num_hidden_layers=recipe.heads.layers_per_head if has_layers else 1,
        intermediate_size=section.resolved_intermediate_size if has_layers else NARROW,
        qkv_bias=has_bias,
        output_bias=has_bias,
        qk_norm=False,
        tie_word_embeddings=False,
    )
    ids, has_matrix = draft_ids(recipe), recipe.heads.unembedding == "replicated"
    return settings | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": len(ids) if ids else section.vocab_size if has_matrix else None,
        "num_aux_hidden_states": 1,
        "eagle_aux_hidden_state_layer_ids": [before],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [before - 1]},
    }


def medusa_contents(source: Source) -> dict[str, Contents]:
    """The trunk, and in a folder inside all heads beyond the main one."""
    recipe, width = source.recipe, source.section.hidden_size
    heads, is_linear = recipe.heads, recipe.heads.kind == "linear"
    num_heads, num_blocks = heads.num_offsets - 1, 1 if is_linear else heads.layers_per_head
    tensors: dict[str, str] = {}
    made: dict[str, Made] = {}
    for name in source.parameters:
        if name.startswith(BLOCKS):
            inside = name.removeprefix(BLOCKS)
            tensors[name] = f"{inside.partition('.')[0]}.1.weight" if is_linear else inside
    for head in range(num_heads):
        matrix, stored = _matrix(source, head + 2), f"{head}.{num_blocks}.weight"
        if is_linear:
            made[f"{head}.0.linear.weight"] = filled(0.0, width, width)
            made[f"{head}.0.linear.bias"] = filled(0.0, width)
            made[stored] = _through(source, matrix, f"{BLOCKS}{head}.weight")
        elif heads.unembedding == "replicated" or head == 0:
            tensors[matrix] = stored
    trunk = trunk_contents(source)
    settings = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": width,
        "vocab_size": source.section.vocab_size,
        "truncated_vocab_size": source.section.vocab_size,
        "medusa_num_heads": num_heads,
        "medusa_num_layers": num_blocks,
        "medusa_fc_bias": True,
        "original_lm_head": not is_linear and heads.unembedding == "shared",
        "torch_dtype": trunk.settings["torch_dtype"],
    }
    drafter = replace(_drafter(source, tensors, made, settings), notes=notes_on(recipe))
    return {"": trunk, DRAFTER: drafter}


def _matrix(source: Source, offset: int) -> str:
    """Name the parameter that scores an offset."""
    number = offset - 1 if source.recipe.heads.unembedding == "replicated" else 0
    name = f"{MATRICES}{number}.weight"
    return name if name in source.parameters else EMBEDDING


def _through(source: Source, matrix: str, block: str) -> Made:
    """Put a map of the state before the final norm into the matrix behind it: U W becomes U diag(w) W diag(1/w)."""
    norm = read_whole(source.reader, NORM)
    if not bool(norm.all()):
        raise CheckpointError(
            "linear heads can be exported to medusa where no weight of the final norm is 0",
            f"{int((norm == 0).sum())} of {norm.numel()} are",
            "Export with --format eagle, or consolidated",
        )

    def blocks() -> Iterator[tuple[int, Tensor]]:
        inner = norm[:, None] * read_whole(source.reader, block) / norm
        yield from row_by_row(source.reader, matrix, lambda rows: rows @ inner).blocks()

    return Made(source.reader.shape(matrix), blocks)


def _drafter(
    source: Source, tensors: Mapping[str, str], made: Mapping[str, Made], settings: Mapping[str, Any]
) -> Contents:
    """Put a drafter together: parameters as they are under the drafter's names, and what is made."""
    plain = {name: TensorSource(stored, PLAIN) for name, stored in tensors.items() if stored not in made}
    weights = RewrittenWeights(OutgoingWeights(source.reader, plain, source.section), made)
    taken = {*tensors.values()}
    return Contents(
        weights=weights,
        settings=settings,
        written=tensors,
        made={name: "what the layout has and the heads have not" for name in made if name not in taken},
        of_own_type=OF_IDS,
    )

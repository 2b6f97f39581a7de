"""Heads of every kind beside a model of transformers: the names of their tensors, and what config.json says of them.

The code in the folder (`export/folder_code/with_heads.py`) builds itself by these settings, and gives its parameters
these names; import reads both back.
"""

import base64
import binascii
import re
from typing import Any

from mtp_lightning.checkpoint.huggingface.canonical_names import (
    EXTRA,
    EXTRA_MATRICES,
    MODULE,
    PLAIN,
    TensorSource,
    layers_prefix,
)
from mtp_lightning.checkpoint.huggingface.configs import Config, named
from mtp_lightning.checkpoint.huggingface.families import base_source
from mtp_lightning.checkpoint.huggingface.modules import Native
from mtp_lightning.files.untrusted import described
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.draft_vocabulary import unpacked_ids
from mtp_lightning.recipe.schema.model import Family, HeadsSection, ModelSection

SETTINGS = "mtp_config"
"""Field of config.json that describes the heads."""
OF_HEADS = ("extra_heads.", EXTRA_MATRICES)
"""Beginnings of their tensors' names."""
KINDS = ("parallel", "linear", "chained", "sequential", "recursive", "medusa")
MOST = 1024  # heads, and layers of one
CHOICES: dict[str, tuple[str, ...]] = {
    "head_type": KINDS,
    "order": ("causal", "anticausal"),
    "hidden_source": ("post_norm", "pre_norm"),
    "concatenation": ("embedding_first", "hidden_first"),
    "unembedding": ("shared", "replicated"),
}
_OTHER = re.compile(r"extra\.(\d+)\.((?:map|blocks)\..+)")


def head_source(place: str, section: ModelSection, family: Family) -> TensorSource | None:
    """Find where a place of a head lies."""
    if place.startswith(EXTRA_MATRICES):
        return TensorSource(place, PLAIN)
    if other := _OTHER.fullmatch(place):
        return TensorSource(f"extra_heads.{other[1]}.{other[2]}", PLAIN)
    if extra := EXTRA.fullmatch(place):
        return _layer_source(int(extra[1]), int(extra[2]), extra[3], section, family)
    module = MODULE.fullmatch(place)
    if module is None:
        return None
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)", module[2]):
        return _layer_source(int(module[1]), int(layer[1]), layer[2], section, family)
    return TensorSource(f"extra_heads.{module[1]}.{module[2]}", PLAIN)


def _layer_source(head: int, layer: int, inner: str, section: ModelSection, family: Family) -> TensorSource | None:
    """Find a place in a layer of a head: it is stored as in a layer of the trunk."""
    source = base_source(f"{layers_prefix(section)}{layer}.{inner}", family)
    if source is None:
        return None
    stored = source.stored.removeprefix(f"{trunk_names(section, family)['layers']}.")
    return source._replace(stored=f"extra_heads.{head}.layers.{stored}")


def trunk_names(section: ModelSection, family: Family) -> dict[str, str]:
    """Name the trunk's layers and final norm in the model of transformers."""
    if section.is_foreign:
        names = architecture_of(section).names
        return {"layers": f"{names.decoder}.{names.layers}", "final_norm": f"{names.decoder}.{names.norm}"}
    layer, norm = base_source("layers.0.input_layernorm.weight", family), base_source("norm.weight", family)
    assert layer is not None
    assert norm is not None
    return {"layers": layer.stored.partition(".0.")[0], "final_norm": norm.stored.removesuffix(".weight")}


def heads_settings(heads: HeadsSection, section: ModelSection, family: Family) -> dict[str, Any]:
    """Describe heads: kind, their number K, which state each reads, and in what order a module reads its pair."""
    num_drafts, reads_tokens = heads.num_offsets - 1, heads.kind in ("sequential", "recursive")
    hidden = heads.hidden if reads_tokens else "post_norm" if heads.kind == "medusa" else "pre_norm"
    is_anticausal = heads.kind == "chained" and heads.order == "anticausal"
    return {
        "head_type": heads.kind,
        "num_drafts": num_drafts,
        "num_modules": 0 if is_anticausal else 1 if heads.kind == "recursive" else num_drafts,
        "layers_per_head": heads.layers_per_head,
        "order": heads.order,
        "hidden_source": hidden,
        "chain_source": hidden if reads_tokens or heads.kind == "chained" else None,
        "concatenation": heads.concatenation,
        "unembedding": heads.unembedding,
        "draft_token_ids": heads.draft_token_ids if heads.draft_vocabulary is not None else None,
        **trunk_names(section, family),
    }


def told_heads(config: Config, section: ModelSection, family: Family) -> Native | None:
    """Read what config.json says of heads under the names given here; None where it says nothing of any.

    Raises:
        CheckpointError: It is not what an export writes.
    """
    told = config.get(SETTINGS)
    if not isinstance(told, dict) or "head_type" not in told:
        return None  # of somebody else
    for name, choices in CHOICES.items():
        if told.get(name) not in choices:
            raise config.refused(
                f"{SETTINGS}.{name} must be one of {', '.join(choices)}", described(told.get(name)), _AGAIN
            )
    inside = Config(config.path, told)
    count, depth = (inside.whole(name, None, least=1, most=MOST) or 1 for name in ("num_drafts", "layers_per_head"))
    kind = told["head_type"]
    heads: dict[str, Any] = {
        "kind": kind,
        "layers_per_head": depth,
        "order": told["order"],
        "concatenation": told["concatenation"],
        "unembedding": told["unembedding"],
        "layers_from_trunk": kind == "chained" and told["order"] == "anticausal",  # whose heads are the last layers
        **_drafted(config, told.get("draft_token_ids"), section.vocab_size),
    }
    if kind in ("sequential", "recursive"):
        heads["hidden"] = told["hidden_source"]
    wanted = heads_settings(HeadsSection(num_offsets=count + 1, **heads), section, family)
    if odd := [name for name, value in wanted.items() if told.get(name) != value]:
        raise config.refused(
            f"{SETTINGS}.{odd[0]} of {kind} heads must be {described(wanted[odd[0]])}", named(told.get(odd[0])), _AGAIN
        )
    return Native(f"{kind} heads", count, heads, lambda place: head_source(place, section, family), {})


_AGAIN = "Export the model again, with mtp export --format hf_mtp"


def _drafted(config: Config, packed: Any, vocab_size: int) -> dict[str, Any]:
    if packed is None:
        return {}
    try:
        ids = unpacked_ids(packed if isinstance(packed, str) else "?")
    except (ValueError, binascii.Error):
        ids = ()
    if not ids or ids[-1] >= vocab_size or base64.b64encode(base64.b64decode(packed)).decode() != packed:
        raise config.refused(
            f"{SETTINGS}.draft_token_ids must be a set of ids below {vocab_size:,}", described(packed), _AGAIN
        )
    return {"draft_vocabulary": len(ids), "draft_token_ids": packed}

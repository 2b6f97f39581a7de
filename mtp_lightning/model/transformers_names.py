"""Where the parts of a causal model of transformers lie in it, found by what they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mtp_lightning.errors import CheckpointError

HINT = "Choose another model, or report it; `family: llama` and its kin have trunks of their own"
Differs = Callable[[Any], bool]
MORE_THAN_A_STATE: dict[str, tuple[Differs, str]] = {
    "hidden_size_per_layer_input": (bool, "layers that read the tokens besides the states"),
    "num_kv_shared_layers": (bool, "layers that read keys and values of other layers"),
    "indexer_types": (lambda kinds: "shared" in (kinds or ()), "layers that read which positions an earlier one chose"),
    "hc_mult": (lambda count: (count or 1) > 1, "layers that mix several states of each position"),
    "hc_count": (lambda count: (count or 1) > 1, "layers that mix several states of each position"),
}
"""Settings by which layers go on from more than the state of the layer before: when they do, and what that is."""


@dataclass(frozen=True)
class Names:
    """Where the parts of a causal model lie in it, by the names of transformers."""

    decoder: str  # "model"
    layers: str  # "layers", inside of the decoder
    norm: str | None  # "norm", inside of the decoder
    embedding: str  # "embed_tokens", inside of the decoder
    lm_head: str  # "lm_head"

    def theirs(self, name: str) -> str | None:
        """Name in the causal model of a parameter of ours; None for what it does not have (heads).

        >>> Names("model", "layers", "norm", "embed_tokens", "lm_head").theirs("unembedding.norms.0.weight")
        'model.norm.weight'
        """
        norm = "" if self.norm is None else f"{self.decoder}.{self.norm}."
        for ours, theirs in (
            ("trunk.decoder.", f"{self.decoder}."),
            ("unembedding.norms.0.", norm),
            ("unembedding.lm_heads.0.", f"{self.lm_head}."),
        ):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return None


def refused(name: str, found: str) -> CheckpointError:
    """Build the error for a model that cannot be a trunk."""
    return CheckpointError(
        f"model.hf_config must be of a decoder whose parts can be told apart and whose scores can be computed; {name} "
        "is none",
        found,
        HINT,
    )


def names_of(model: Any, config: Any) -> Names:
    """Find the parts of a causal model: layers by their number, the final norm as the last norm beside them."""
    name = type(model).__name__
    for setting, (differs, words) in MORE_THAN_A_STATE.items():
        if differs(value := getattr(config, setting, None)):
            raise refused(name, f"{words} ({setting}: {value})")
    modules = {id(module): path for path, module in model.named_modules()}
    lists = [
        (path.rpartition("."), module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", -1)
    ]
    owners = [owner for (owner, _, _), _ in lists]
    if getattr(config, "is_encoder_decoder", False) or not lists or len(set(owners)) != len(owners):
        raise refused(
            name, f"no single list of layers that a text passes one after the other; {_lists_of(model, config)}"
        )
    (owner, _, layers), _ = min(lists, key=lambda entry: entry[0][0].count("."))
    decoder = model.get_submodule(owner)
    norms = [child for child, module in decoder.named_children() if "norm" in type(module).__name__.lower()]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    path = modules.get(id(embedding), "")
    if not owner or not path.startswith(f"{owner}.") or not isinstance(head, nn.Linear):
        raise refused(name, "no decoder with an embedding, or no linear unembedding after it")
    if (embedding.weight.shape[1], head.in_features) != (config.hidden_size, config.hidden_size):
        raise refused(name, f"an embedding or unembedding that is not as wide as the states, {config.hidden_size}")
    return Names(owner, layers, norms[-1] if norms else None, path.removeprefix(f"{owner}."), modules[id(head)])


def _lists_of(model: Any, config: Any) -> str:
    """Say which lists of modules there are, beside how many layers are looked for."""
    lists = [(path, len(one)) for path, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    told = ", ".join(f"{path} of {length}" for path, length in lists[:3]) or "none"
    return f"num_hidden_layers is {getattr(config, 'num_hidden_layers', None)}, and its lists are {told}"


def further_parts(model: Any, names: Names) -> str:
    """Name the parts of a causal model with weights that are neither its decoder nor its unembedding."""
    known = (names.decoder, names.lm_head)
    parts = [(path, part) for path, part in model.named_children() if next(part.parameters(), None) is not None]
    told = [f"{path} ({type(part).__name__})" for path, part in parts if not any(one.startswith(path) for one in known)]
    return f"; beside its decoder and its unembedding it has {', '.join(told)}" if told else ""

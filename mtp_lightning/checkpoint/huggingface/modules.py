"""Extra modules for tokens beyond the next, as published folders name them; their numbers count extra tokens only.

[DeepSeek-V3] weights file description; [MiMo] and [Qwen3-Next] as vLLM 0.32 reads them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mtp_lightning.checkpoint.huggingface.canonical_names import EXTRA, MODULE, PLAIN, SWAPPED, TensorSource
from mtp_lightning.checkpoint.huggingface.configs import Config
from mtp_lightning.recipe.schema.model import HeadsSection

DECLARED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
MOST_MODULES = 1024


@dataclass(frozen=True)
class ModuleLayout:
    """Where the tensors of extra modules lie."""

    name: str
    prefix: Callable[[int, int], str]  # of module d behind L layers
    names: Mapping[str, str]  # beginnings of a place inside a module, and what they are called
    heads: Mapping[str, Any]  # fields of the heads section that the layout implies
    copies: Mapping[str, str]  # optional tensors in a module, and the place that they must be equal to
    marker: str  # pattern of one tensor per module

    def source(self, place: str, num_layers: int, *, concatenation: str | None = None) -> TensorSource | None:
        """Find a place inside a module; `concatenation` is the model's own, None for that of the layout."""
        match = MODULE.fullmatch(place)
        beginning = next((own for own in self.names if match and match[2].startswith(own)), None)
        if match is None or beginning is None:
            return None
        name = self.names[beginning] + match[2].removeprefix(beginning)
        swaps = beginning == "eh_proj." and concatenation not in (None, self.heads["concatenation"])
        return TensorSource(self.prefix(int(match[1]), num_layers) + name, SWAPPED if swaps else PLAIN)

    def count(self, stored: Iterable[str]) -> int:
        """Count the modules among names of stored tensors."""
        return sum(re.fullmatch(self.marker, name) is not None for name in stored)

    def layer(self, module: int, num_layers: int) -> str:
        """Beginning of the names in the layer of a module."""
        source = self.source(f"modules.{module}.layers.0.", num_layers)
        assert source is not None
        return source.stored

    def beginnings(self, stored: Iterable[str]) -> tuple[str, ...]:
        """Beginnings of the names in every module among stored tensors."""
        projection = f"{self.names['eh_proj.']}weight"
        return tuple(name.removesuffix(projection) for name in stored if re.fullmatch(self.marker, name))

    def copied(self, num_modules: int, num_layers: int) -> dict[str, str]:
        """Name the optional tensors, each with the place that it must be equal to."""
        return {
            self.prefix(module, num_layers) + name: place
            for module in range(num_modules)
            for name, place in self.copies.items()
        }


_NORMED = {"kind": "sequential", "hidden": "post_norm", "concatenation": "embedding_first"}

DEEPSEEK = ModuleLayout(
    name="DeepSeek",
    prefix=lambda module, num_layers: f"model.layers.{num_layers + module}.",
    names={
        "enorm.": "enorm.",
        "hnorm.": "hnorm.",
        "eh_proj.": "eh_proj.",
        "layers.0.": "",
        "norm.": "shared_head.norm.",
    },
    heads=_NORMED,
    copies={"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"},
    marker=r"model\.layers\.\d+\.eh_proj\.weight",
)
MIMO = ModuleLayout(
    name="MiMo",
    prefix=lambda module, num_layers: f"model.mtp_layers.{module}.",
    names={
        "enorm.": "token_layernorm.",
        "hnorm.": "hidden_layernorm.",
        "eh_proj.": "input_proj.",
        "layers.0.": "",
        "norm.": "final_layernorm.",
    },
    heads={"kind": "sequential", "hidden": "pre_norm", "concatenation": "hidden_first"},
    copies={},
    marker=r"model\.mtp_layers\.\d+\.input_proj\.weight",
)
QWEN = ModuleLayout(
    name="Qwen",
    prefix=lambda module, num_layers: "mtp.",
    names={
        "enorm.": "pre_fc_norm_embedding.",
        "hnorm.": "pre_fc_norm_hidden.",
        "eh_proj.": "fc.",
        "layers.": "layers.",
        "norm.": "norm.",
    },
    heads=_NORMED,
    copies={},
    marker=r"mtp\.fc\.weight",
)
LAYOUTS = (DEEPSEEK, MIMO, QWEN)


@dataclass(frozen=True)
class Native:
    """The heads that a folder brings with it."""

    name: str
    count: int  # modules or heads beyond the next token
    heads: Mapping[str, Any]  # fields of the heads section
    source: Callable[[str], TensorSource | None]  # of a place in them
    copies: Mapping[str, str]  # optional stored tensors, and the place that each must be equal to
    apart: tuple[str, ...] = ()  # beginnings of stored tensors that may be left out where other heads are wanted


def declared_modules(config: Config) -> int:
    """Count the modules that the settings, or those of the text part, speak of."""
    text = config.get("text_config")
    told = [config, *([Config(config.path, text)] if isinstance(text, dict) else [])]
    return max(one.whole(name, 0, least=0, most=MOST_MODULES) or 0 for one in told for name in DECLARED)


def layout_of(stored: Iterable[str]) -> ModuleLayout | None:
    """Find the layout that names of stored tensors are in, if there are modules among them."""
    names = [*stored]
    return next((layout for layout in LAYOUTS if layout.count(names)), None)


def module_beginnings(stored: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of the names of modules among stored tensors; none where there are no modules."""
    names = [*stored]
    layout = layout_of(names)
    return layout.beginnings(names) if layout else ()


def native_modules(stored: Iterable[str], num_layers: int, declared: int, *, default: ModuleLayout) -> Native | None:
    """Find the modules among the names of a folder's tensors; those that its settings declare must be there.

    Args:
        stored: names of all tensors.
        num_layers: layers of the model without modules.
        declared: number of modules in its settings.
        default: layout to look for where only the settings speak of modules.
    """
    names = [*stored]
    layout = layout_of(names) or default
    count = layout.count(names) if layout is QWEN else max(layout.count(names), declared)  # Qwen's has one place alone
    if not count:
        return None
    return Native(
        name=layout.name,
        count=count,
        heads=layout.heads,
        source=lambda place: layout.source(place, num_layers),
        copies=layout.copied(count, num_layers),
    )


def extra_place(place: str) -> tuple[int, str] | None:
    """Number a head of one layer beside the main head, from 0, and name the place inside its layer."""
    match = EXTRA.fullmatch(place)
    return (int(match[1]), match[3]) if match and match[2] == "0" else None


def fits(layout: ModuleLayout, heads: HeadsSection) -> bool:
    """Tell whether readers of a layout compute what the heads do."""
    return heads.kind == "sequential" and heads.hidden == layout.heads["hidden"] and heads.layers_per_head == 1

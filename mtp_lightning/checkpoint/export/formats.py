"""The formats of `mtp export`, one row each: what it can hold, who reads it, and how it is served.

To add a format:

1. Its name in `names.FormatName`, with the words that others use for it in `names.SPELLINGS`.
2. One file beside this one with a writer `NAME(source: Source) -> dict[str, Contents]`: the folders that the format
   consists of, by their names inside of `--out` ("" is that folder itself; a drafter lies in, say, "drafter"). It
   opens nothing for writing: `write.export_model` streams the tensors, reads them back, and publishes all by one
   rename. Every parameter stands in `written` or, with the reason, in `left_out` of one of the folders; every tensor
   that holds no parameter stands in `made`. `trunk.trunk_contents(source)` is the next-token model, for formats that
   put heads beside it.
3. Its row in FORMATS. `refuses(recipe)` says what a model must be, and what this one is, or None; the formats that can
   hold the model are named by the table. For `--verify`, `judge` of an engine loads the folder as that engine does
   (scores, text, kept drafts), and `reread` builds our own model of the folder, to compare every head; see `judges`.
4. A line per head kind in `tests/laws/test_export.py` (law 18). `docs/howto/serve.md` is checked against this table:
   `python docs/generate.py` writes its tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mtp_lightning.checkpoint.export.contents import Contents, Refusal, Source
from mtp_lightning.checkpoint.export.hf_mtp import hf_mtp_contents, refuses_hf_mtp
from mtp_lightning.checkpoint.export.judges import Judge, Reread, heard_by_transformers, reread_by_import
from mtp_lightning.checkpoint.export.names import FormatName
from mtp_lightning.checkpoint.export.trunk import modules_contents, trunk_contents
from mtp_lightning.checkpoint.huggingface.modules import MIMO, ModuleLayout, fits
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.trainable import mixing_offsets

Refuses = Callable[[Recipe], Refusal | None]
Writer = Callable[[Source], dict[str, Contents]]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A program that reads a format."""

    name: str
    versions: str
    heads: str  # what it does with the heads
    serve: str  # command; {folder} is the exported folder
    judge: Judge | None = None  # for --verify, where the engine is installed


@dataclass(frozen=True, kw_only=True)
class Format:
    """What there is to know of a format."""

    name: FormatName
    holds: str  # which heads, in words
    lost: str  # what a model loses in it
    refuses: Refuses
    write: Writer | None  # None: by `consolidate`, in the package's own form
    engines: tuple[Engine, ...]
    reread: Reread | None = None  # for --verify: our own model of a written folder, heads included


def _holds_all(recipe: Recipe) -> Refusal | None:
    return None


def _refuses_trunk(recipe: Recipe) -> Refusal | None:
    if 1 not in mixing_offsets(recipe):
        return None
    return Refusal(
        "the main head of an exported model must read the last layer, as its readers run it",
        "a mixture of all layers (adapt.layer_mix; without it: adapt.layer_mix.main_head=false)",
    )


def _refuses_modules(layout: ModuleLayout, *, families: tuple[str | None, ...]) -> Refuses:
    def refuses(recipe: Recipe) -> Refusal | None:
        heads, family = recipe.heads, recipe.model.family
        if family in families and fits(layout, heads):
            return _refuses_trunk(recipe)
        return Refusal(
            f"modules in {layout.name}'s layout must be sequential, of one layer, behind a trunk of "
            f"{', '.join(one for one in families if one)}, and read the hidden state {layout.heads['hidden']}",
            f"{heads.kind} heads of {heads.layers_per_head} layers, {heads.hidden}, on {family or 'no family'}",
        )

    return refuses


def _not_yet(recipe: Recipe) -> Refusal | None:
    return Refusal("this format must have a writer", "none in this version")


_GENERATE = "mtp generate {folder} 'Once upon'"
_VLLM = "vllm serve {folder}"
_LOADED = "transformers serve {folder}"

FORMATS: Mapping[FormatName, Format] = {
    row.name: row
    for row in (
        Format(
            name=FormatName.consolidated,
            holds="heads of every kind",
            lost="nothing",
            refuses=_holds_all,
            write=None,
            engines=(Engine(name="mtp", versions="this one", heads="all draft", serve=_GENERATE),),
        ),
        Format(
            name=FormatName.trunk,
            holds="the next-token model alone, of heads of every kind",
            lost="all heads beyond the main one",
            refuses=_refuses_trunk,
            write=lambda source: {"": trunk_contents(source)},
            reread=reread_by_import,
            engines=(
                Engine(name="transformers", versions="5.x", heads="none", serve=_LOADED, judge=heard_by_transformers),
                Engine(name="vLLM", versions="0.32", heads="none", serve=_VLLM),
            ),
        ),
        Format(
            name=FormatName.hf_mtp,
            holds="heads of every built-in kind, with the code that drafts with them",
            lost="nothing",
            refuses=refuses_hf_mtp,
            write=lambda source: {"": hf_mtp_contents(source)},
            reread=reread_by_import,
            engines=(
                Engine(
                    name="transformers",
                    versions="5.23",
                    heads="draft with generate(use_mtp=True), once loaded with trust_remote_code=True",
                    serve=_LOADED,
                    judge=heard_by_transformers,
                ),
            ),
        ),
        Format(
            name=FormatName.mimo,
            holds="sequential modules of one layer that read the state before the final norm",
            lost="a draft vocabulary: readers let modules score every id",
            refuses=_refuses_modules(MIMO, families=("mimo",)),
            write=lambda source: {"": modules_contents(source, MIMO)},
            reread=reread_by_import,
            engines=(Engine(name="vLLM", versions="0.32", heads="the first drafts", serve=_VLLM),),
        ),
        *(
            Format(name=name, holds="nothing yet", lost="", refuses=_not_yet, write=None, engines=())
            for name in (FormatName.qwen3_5, FormatName.eagle, FormatName.medusa, FormatName.gguf_ready)
        ),
    )
}
"""By name, in the order of the command's help."""


def formats_for(recipe: Recipe) -> list[FormatName]:
    """Name the formats that can hold a model."""
    return [name for name, row in FORMATS.items() if row.refuses(recipe) is None]


def check_holds(name: FormatName, recipe: Recipe) -> None:
    """Refuse a model that a format cannot hold.

    Raises:
        CheckpointError: names what the model must be, what it is, and the formats that can hold it.
    """
    refusal = FORMATS[name].refuses(recipe)
    if refusal is not None:
        others = ", ".join(formats_for(recipe))
        hint = f"Formats that can hold this model: {others}; mtp export --format NAME"
        raise CheckpointError(f"{name} cannot hold this model: {refusal.expected}", refusal.found, hint)

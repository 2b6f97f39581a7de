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
from mtp_lightning.checkpoint.export.drafters import (
    DRAFTER,
    eagle_contents,
    medusa_contents,
    refuses_eagle,
    refuses_medusa,
)
from mtp_lightning.checkpoint.export.hf_mtp import hf_mtp_contents, refuses_hf_mtp
from mtp_lightning.checkpoint.export.judges import Judge, Reread, heard_by_transformers, reread_by_import
from mtp_lightning.checkpoint.export.mimo import mimo_contents, refuses_mimo
from mtp_lightning.checkpoint.export.names import FormatName
from mtp_lightning.checkpoint.export.qwen3_5 import qwen3_5_contents, refuses_gguf, refuses_qwen3_5
from mtp_lightning.checkpoint.export.reread import reread_drafter, reread_qwen3_5
from mtp_lightning.checkpoint.export.trunk import trunk_contents
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
    drafts: Callable[[Recipe], bool] = lambda recipe: True  # whether it runs these heads as they were trained


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


_GENERATE = "mtp generate {folder} 'Once upon'"
_VLLM = "vllm serve {folder}"
_SGLANG = "python -m sglang.launch_server --model-path {folder} --speculative-algorithm NEXTN"


def _vllm(method: str, *, tokens: int | str = 1, drafter: str = "") -> str:
    """Write the command with drafts."""
    config = "--speculative-config"
    model = f" {config}.model {{folder}}/{drafter}" if drafter else ""
    return f"{_VLLM} {config}.method {method}{model} {config}.num_speculative_tokens {tokens}"


def _drafts_in_sglang(recipe: Recipe) -> bool:
    """Tell whether SGLang 0.5.23 runs an EAGLE-3 drafter of these heads.

    Of one state it skips the drafter's projection, which is a linear head's map; it does not hand out the last layer's
    state, which causal heads read; and it skips biases of queries, keys and values.
    """
    heads = recipe.heads
    if heads.kind == "parallel":
        return not recipe.model.qkv_bias
    return heads.kind == "chained" and heads.order == "anticausal"


_LOADED = "transformers serve {folder}"

_TRUNK_ALONE = Engine(name="transformers", versions="5.x", heads="none", serve=_LOADED, judge=heard_by_transformers)

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
                _TRUNK_ALONE,
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
                    serve=f"{_LOADED} --trust-remote-code",
                    judge=heard_by_transformers,
                ),
            ),
        ),
        Format(
            name=FormatName.mimo,
            holds="sequential or recursive modules of one layer that read the state before the final norm "
            "(heads.hidden: pre_norm), on trunks of Llama's, Mistral's and Qwen2's kind; sequential: the first module",
            lost="modules beyond the first; a draft vocabulary: readers let modules score every id",
            refuses=refuses_mimo,
            write=mimo_contents,
            reread=reread_by_import,
            engines=(
                _TRUNK_ALONE,
                Engine(name="vLLM", versions="0.32", heads="one draft", serve=_vllm("mtp")),
                Engine(
                    name="SGLang",
                    versions="0.5 (by its source), which reads the state behind the final norm: fewer drafts are kept",
                    heads="one draft",
                    serve=_SGLANG,
                ),
            ),
        ),
        Format(
            name=FormatName.qwen3_5,
            holds="sequential or recursive modules of one layer, on trunks of Qwen3's kind; sequential: the first "
            "module; recursive before the final norm: of two offsets; on trunks of Qwen3.5's own kind: as released",
            lost="modules beyond the first; a draft vocabulary: readers let modules score every id",
            refuses=refuses_qwen3_5,
            write=qwen3_5_contents,
            reread=reread_qwen3_5,
            engines=(
                _TRUNK_ALONE,
                Engine(
                    name="vLLM",
                    versions="0.32",
                    heads="any number of drafts by the one module",
                    serve=_vllm("mtp"),
                ),
                Engine(name="SGLang", versions="0.5 (by its source)", heads="the same", serve=_SGLANG),
            ),
        ),
        Format(
            name=FormatName.eagle,
            holds="the head for the token after next, of parallel, chained and linear heads",
            lost="heads beyond the second offset",
            refuses=refuses_eagle,
            write=eagle_contents,
            reread=reread_drafter,
            engines=(
                _TRUNK_ALONE,
                Engine(
                    name="vLLM",
                    versions="0.32",
                    heads="one draft",
                    serve=_vllm("eagle3", drafter=DRAFTER),
                ),
                Engine(
                    name="SGLang",
                    versions="0.5 (by its source): parallel and anticausal heads without biases",
                    heads="one draft",
                    serve="python -m sglang.launch_server --model-path {folder} --speculative-algorithm EAGLE3 "
                    "--speculative-draft-model-path {folder}/drafter --speculative-num-steps 1 "
                    "--speculative-eagle-topk 1 --speculative-num-draft-tokens 2",
                    drafts=_drafts_in_sglang,
                ),
            ),
        ),
        Format(
            name=FormatName.medusa,
            holds="Medusa and linear heads, all of them",
            lost="a draft vocabulary: readers let heads score every id",
            refuses=refuses_medusa,
            write=medusa_contents,
            reread=reread_drafter,
            engines=(
                _TRUNK_ALONE,
                Engine(
                    name="vLLM",
                    versions="up to 0.32 (0.33 has no Medusa)",
                    heads="all draft, first choices only",
                    serve=_vllm("medusa", tokens="HEADS", drafter=DRAFTER),
                ),
            ),
        ),
        Format(
            name=FormatName.gguf_ready,
            holds="what qwen3_5 holds, on trunks of Qwen3's kind",
            lost="as in qwen3_5",
            refuses=refuses_gguf,
            write=lambda source: qwen3_5_contents(source, for_llama_cpp=True),
            reread=reread_qwen3_5,
            engines=(
                _TRUNK_ALONE,
                Engine(
                    name="llama.cpp",
                    versions="b11434",
                    heads="draft (arch qwen35)",
                    serve="python convert_hf_to_gguf.py {folder} && llama-server -m FILE.gguf --spec-type draft-mtp",
                ),
            ),
        ),
    )
}
"""By name, in the order of the command's help."""


def engines_for(row: Format, recipe: Recipe) -> list[Engine]:
    """List the engines that serve a model from a format."""
    return [one for one in row.engines if one.drafts(recipe)]


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

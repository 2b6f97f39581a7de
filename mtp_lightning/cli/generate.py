"""`mtp generate`: text from a trained model, its heads drafting."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mtp_lightning.cli.generate_view import print_generations
from mtp_lightning.cli.prompts import encode_prompts, read_chats, read_prompts, texts_of

if TYPE_CHECKING:
    import torch

    from mtp_lightning.decode.settings import Decoder
    from mtp_lightning.model.mtp_model import MtpModel
    from mtp_lightning.recipe import Recipe

SAMPLE_TOKENS = 128
SAMPLE_TEMPERATURE = 0.7  # by its likeliest tokens alone, a small model repeats itself
ADAPTIVE: Literal["adaptive"] = "adaptive"


class DecoderName(StrEnum):
    """Ways to decode."""

    auto = "auto"
    greedy = "greedy"
    blockwise = "blockwise"
    chain = "chain"
    tree = "tree"


class DeviceName(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DtypeName(StrEnum):
    """Types of weights to run with."""

    stored = "stored"
    fp32 = "fp32"
    bf16 = "bf16"


class WeightsName(StrEnum):
    """Which of a run's weights to take."""

    trained = "trained"
    ema = "ema"


def _choose_weights(context: typer.Context, weights: WeightsName) -> WeightsName:
    """Let what this command opens show the weights that are asked for, until it ends."""
    if weights is WeightsName.ema:
        from mtp_lightning.checkpoint.format.folder import reading_averages

        context.with_resource(reading_averages())
    return weights


WeightsOption = Annotated[
    WeightsName,
    typer.Option(
        "--weights", callback=_choose_weights, help="The weights as trained, or their average (optimizer.ema)."
    ),
]
ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="Folder of a run, of one of its checkpoints, or of an export.", show_default=False
    ),
]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts: one per line, or *.jsonl with `prompt`.")
]
DeviceOption = Annotated[DeviceName, typer.Option(help="Where to run; auto takes CUDA when there is one.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="Type of the weights to run with.")]
TreeOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Tree for --decoder tree, from `mtp bench tree`.")
]


PromptOption = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given again.")]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Prompts are turns of a user, written by the model's own chat template.")
]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="With --chat: the system's turn.", show_default=False)
]
SpecialTokensOption = Annotated[
    bool, typer.Option("--special-tokens", help="Special tokens that prompts spell out become their ids.")
]
DecoderOption = Annotated[
    DecoderName, typer.Option(help="greedy: one token per forward; the others draft. auto: by head kind.")
]
DraftLengthOption = Annotated[
    str | None,
    typer.Option(
        metavar="K|adaptive",
        help="Drafts per step; as many as pay (adaptive) unless given, all with --compile.",
        show_default=False,
    ),
]
StopOption = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End where this text is complete.")]
ShowDraftsOption = Annotated[
    bool, typer.Option("--show-drafts", help="Colour drafts: kept ones green, rejected ones red.")
]
CompileOption = Annotated[
    bool,
    typer.Option("--compile", help="Compile steps of fixed shapes (a minute or so); on a GPU, replay them as a graph."),
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="Decode without drafts too, and say how much faster this was.")
]


def generate(
    path: ModelArgument,
    *,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    special_tokens: SpecialTokensOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    decoder: DecoderOption = DecoderName.auto,
    draft_length: DraftLengthOption = None,
    tree: TreeOption = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that hold this share.")] = None,
    typical: Annotated[bool, typer.Option("--typical", help="LOSSY: keep drafts that are likely enough.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    stop: StopOption = None,
    compile: CompileOption = False,
    show_drafts: ShowDraftsOption = False,
    compare: CompareOption = False,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
    weights: WeightsOption = WeightsName.trained,
) -> None:
    """Continue prompts with a trained model, its heads drafting; the text is the model's own."""
    if bool(prompt) == (prompts is not None):
        raise typer.BadParameter("give either --prompt TEXT or --prompts FILE", param_hint="--prompt")
    if system is not None and not chat:
        raise typer.BadParameter("needs --chat", param_hint="--system")
    if tree is not None and decoder not in (DecoderName.auto, DecoderName.tree):
        raise typer.BadParameter(f"needs --decoder tree; found {decoder}", param_hint="--tree")
    given = texts_of(prompt or []) if prompts is None else prompts
    texts = read_chats(given, system) if chat else read_prompts(given)
    length = parse_draft_length(draft_length)

    from mtp_lightning.checkpoint.convert.load_model import load_model
    from mtp_lightning.checkpoint.format.carried_files import all_end_ids
    from mtp_lightning.data.loading.corpus import recipe_tokenizer
    from mtp_lightning.decode import Settings
    from mtp_lightning.decode.packed_linear import pack_linear_maps
    from mtp_lightning.decode.tree import read_tree

    known_tree = None if tree is None else read_tree(tree)
    recipe, model = load_model(path, device=device_of(device), dtype=dtype_of(dtype))
    pack_linear_maps(model)
    tokenizer = recipe_tokenizer(recipe)
    way: Decoder = "tree" if tree is not None and decoder == DecoderName.auto else decoder.value
    settings = Settings(
        max_new_tokens=max_new_tokens,
        decoder=way,
        draft_length=default_draft_length(model, way) if length is None and not compile else length,
        tree=known_tree,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical=typical,
        compile=compile,
        seed=seed,
        stop_tokens=all_end_ids(recipe, tokenizer.end_of_document, path),
        stop_strings=texts_of(stop or [], what="stop string"),
    )
    encoded = encode_prompts(recipe, tokenizer, texts, parse_special_tokens=special_tokens)
    print_generations(model, tokenizer, encoded, settings, show_drafts=show_drafts, compare=compare)


def show_sample(recipe: "Recipe") -> None:
    """Continue `run.sample` with what a run has trained, drafts coloured, and say what drafting gains."""
    from mtp_lightning.checkpoint.convert.load_model import load_model
    from mtp_lightning.checkpoint.format.carried_files import all_end_ids
    from mtp_lightning.console.errors import screen
    from mtp_lightning.data.loading.corpus import recipe_tokenizer
    from mtp_lightning.decode import Settings

    assert recipe.run.sample is not None
    trained, model = load_model(recipe.run.dir, device=device_of(DeviceName.auto))
    tokenizer = recipe_tokenizer(trained)
    prompts = encode_prompts(trained, tokenizer, texts_of([recipe.run.sample]))
    room = trained.model.max_position_embeddings - len(prompts[0].tokens)
    if room < 1:
        screen(stderr=True).print(
            f"\nrun.sample fills all {trained.model.max_position_embeddings} positions: nothing is written"
        )
        return
    settings = Settings(
        max_new_tokens=min(SAMPLE_TOKENS, room),
        temperature=SAMPLE_TEMPERATURE,
        seed=recipe.run.seed,
        stop_tokens=all_end_ids(trained, tokenizer.end_of_document),
    )
    is_drafting = trained.heads.num_offsets > 1
    screen(stderr=True).print(f"\nWhat it writes (mtp generate {recipe.run.dir} --prompt TEXT --show-drafts for more):")
    print_generations(model, tokenizer, prompts, settings, show_drafts=is_drafting, compare=is_drafting)


def parse_draft_length(text: str | None) -> int | Literal["adaptive"] | None:
    """Read a draft length from the command line."""
    if text is None:
        return None
    if text == ADAPTIVE:
        return ADAPTIVE
    if not text.isdecimal():
        raise typer.BadParameter(f"must be a whole number or {ADAPTIVE}; found {text!r}", param_hint="--draft-length")
    return int(text)


def default_draft_length(model: "MtpModel", decoder: "Decoder") -> Literal["adaptive"] | None:
    """Draft as many tokens as pay, where the number of drafts can be chosen."""
    from mtp_lightning.decode.settings import resolve_decoder

    return None if resolve_decoder(model, decoder) in ("greedy", "tree") else ADAPTIVE


def device_of(name: DeviceName) -> "torch.device":
    """Choose the device.

    Raises:
        DecodingError: CUDA is asked for, and there is none.
    """
    import torch

    from mtp_lightning.errors import DecodingError

    has_cuda = torch.cuda.is_available()
    if name == DeviceName.cuda and not has_cuda:
        raise DecodingError(
            "--device cuda needs a CUDA device", f"none (torch {torch.__version__})", "Use --device cpu"
        )
    return torch.device("cuda" if has_cuda and name != DeviceName.cpu else "cpu")


def dtype_of(name: DtypeName) -> "torch.dtype | None":
    """Choose the type of the weights; None for that in which they are stored."""
    import torch

    return {DtypeName.stored: None, DtypeName.fp32: torch.float32, DtypeName.bf16: torch.bfloat16}[name]

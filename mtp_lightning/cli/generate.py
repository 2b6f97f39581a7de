"""`mtp generate`: text from a trained model, its drafts and their gain; prompts from files."""

import codecs
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from mtp_lightning.console.errors import screen
from mtp_lightning.errors import DecodingError

if TYPE_CHECKING:
    import torch

    from mtp_lightning.data.tokenizers.base import Tokenizer
    from mtp_lightning.decode import Settings, Statistics, Step
    from mtp_lightning.model.mtp_model import MtpModel
    from mtp_lightning.recipe import Recipe


STYLES = {"prompt": "dim", "kept": "green", "rejected": "red strike", "own": ""}
MARKS = {"kept": ("{", "}"), "rejected": ("~", "~")}  # around drafts, where nothing can be coloured
EMPTY = ("", "")


def print_generations(
    model: "MtpModel",
    tokenizer: "Tokenizer",
    prompts: Sequence[bytes],
    settings: "Settings",
    *,
    show_drafts: bool,
    compare: bool,
) -> None:
    """Continue the prompts one after the other, each streamed; the figures of each go to stderr."""
    import numpy as np

    from mtp_lightning.decode import stream
    from mtp_lightning.decode.generation import count

    settings = replace(settings, detokenize=lambda tokens: tokenizer.decode(np.asarray(tokens, dtype=np.int64)))
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    err = screen(stderr=True)
    for prompt, tokens in zip(prompts, encoded, strict=True):
        began_at = time.perf_counter()
        steps = stream(model, [tokens], settings)  # refuses what does not fit before anything is printed
        writer = Writer(screen(), tokenizer, show_drafts=show_drafts)
        if show_drafts:
            err.print(writer.legend())
        writer.write(prompt, "prompt")
        done = [writer.step(step) for step in steps]
        writer.end()
        err.print(figures(count(done), time.perf_counter() - began_at))
        if compare:
            err.print(comparison(model, tokens, settings))


class Writer:
    """Writes one text to a console, token by token."""

    def __init__(self, console: Console, tokenizer: "Tokenizer", *, show_drafts: bool) -> None:
        self.console = console
        self.tokenizer = tokenizer
        self.show_drafts = show_drafts
        self.marks = MARKS if show_drafts and console.color_system is None else {}
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, step: "Step") -> "Step":
        """Write what a step gave: kept drafts, rejected ones, the main head's token."""
        import numpy as np

        kept, accepted = int(step.kept[0]), int(step.accepted[0])
        tokens, drafts = step.block[0, :kept].tolist(), step.drafts[0].tolist()
        decode, is_chain = self.tokenizer.decode, len(drafts) == step.block.shape[1] - 1
        if not self.show_drafts:
            self.write(decode(np.asarray(tokens)), "own")
            return step
        self.write(decode(np.asarray(tokens[:accepted], dtype=np.int64)), "kept")
        if is_chain and kept > accepted:  # a tree's branches would not read as a text
            self._print("".join(map(self.tokenizer.printable, drafts[accepted:])), "rejected")
        self.write(decode(np.asarray(tokens[accepted:], dtype=np.int64)), "own")
        return step

    def write(self, text: bytes, role: str) -> None:
        """Write some bytes of the text; those of an unfinished character wait for the rest."""
        self._print(self.bytes.decode(text), role)

    def end(self) -> None:
        """End the text."""
        self._print(self.bytes.decode(b"", final=True) + "\n", "own")

    def legend(self) -> Text:
        """Say how drafts look."""
        kept, rejected = self._shown("kept", "kept"), self._shown("rejected", "rejected")
        return Text.assemble("drafts: ", kept, ", ", rejected, "; the rest is the main head's own")

    def _print(self, text: str, role: str) -> None:
        if not text:
            return
        shown, style = self._shown(text, role)
        if self.console.is_terminal:
            self.console.print(Text(shown, style), end="")  # leaves out characters that would move the cursor
        else:
            self.console.file.write(shown)
            self.console.file.flush()

    def _shown(self, text: str, role: str) -> tuple[str, str]:
        before, after = self.marks.get(role, EMPTY)
        return f"{before}{text}{after}", STYLES[role]


def figures(statistics: "Statistics", taken_s: float) -> str:
    """Say in one line what a text took."""
    num_tokens = statistics.num_emitted_tokens
    line = f"{num_tokens} tokens in {taken_s:.2f} s, {num_tokens / taken_s:,.0f} tokens/s"
    if not statistics.num_draft_tokens:
        return line
    share = statistics.num_accepted_tokens / statistics.num_draft_tokens
    return (
        f"{line}; {statistics.num_drafts} verifying forwards, "
        f"acceptance length {statistics.mean_acceptance_length:.2f}, "
        f"{share:.0%} of {statistics.num_draft_tokens} drafts kept"
    )


def comparison(model: "MtpModel", tokens: list[int], settings: "Settings") -> str:
    """Decode a prompt with and without drafts, nothing printed in between, and say what drafting gained."""
    from mtp_lightning.decode import generate

    plain = replace(settings, decoder="greedy", draft_length=None, tree=None, typical=False, sample_drafts=False)
    pairs = [(generate(model, [tokens], settings), generate(model, [tokens], plain)) for _ in range(2)]
    drafted, alone = pairs[-1]  # the first pair warms up
    speeds = [len(made.tokens[0]) / (made.prefill_s + made.decode_s) for made in (drafted, alone)]
    same = "the same text" if drafted.tokens == alone.tokens else "another text"
    if not settings.sampling.is_greedy:
        same = "a text of the same law" if not settings.typical else "a text of another law"
    gain = f"drafting is {speeds[0] / speeds[1]:.2f} times as fast"
    return f"without drafts: {same}; printing nothing, {speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s; {gain}"


KEYS = ("prompt", "text")


def read_prompts(path: Path) -> list[bytes]:
    """Read prompts from a file: one per line, or, from *.jsonl, the `prompt` (or `text`) of every line's object.

    Raises:
        DecodingError: The file cannot be read, holds no prompt, or has a line that is none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DecodingError(
            "the file of prompts must be readable", f"{path}: {error.strerror}", "Name another"
        ) from None
    is_json = path.suffix == ".jsonl"
    prompts = [_prompt_of(line, path, number) if is_json else line for number, line in enumerate(lines, 1) if line]
    if not prompts:
        raise DecodingError("a file of prompts must hold one", f"none in {path}", "Write one prompt per line")
    return prompts


def _prompt_of(line: bytes, path: Path, number: int) -> bytes:
    try:
        document: Any = json.loads(line)
    except ValueError:
        document = None
    values = [document[key] for key in KEYS if key in document] if isinstance(document, dict) else []
    if not values or not isinstance(values[0], str):
        raise DecodingError(
            'every line of a *.jsonl file of prompts must be an object with a text "prompt" (or "text")',
            f"line {number} of {path}: {line[:60].decode(errors='replace')}",
            "Correct the line, or name the file *.txt for one prompt per line",
        )
    return values[0].encode()


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


def generate(
    path: ModelArgument,
    *,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given again.")] = None,
    prompts: PromptsOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    decoder: Annotated[
        DecoderName, typer.Option(help="greedy: one token per forward; the others draft. auto: by head kind.")
    ] = DecoderName.auto,
    draft_length: Annotated[
        str | None, typer.Option(metavar="K|adaptive", help="Drafts per step; n - 1 unless given.", show_default=False)
    ] = None,
    tree: TreeOption = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that hold this share.")] = None,
    typical: Annotated[bool, typer.Option("--typical", help="LOSSY: keep drafts that are likely enough.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End where this text is complete.")] = None,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour drafts: kept ones green, rejected ones red.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode without drafts too, and say how much faster this was.")
    ] = False,
    device: DeviceOption = DeviceName.auto,
    dtype: DtypeOption = DtypeName.stored,
) -> None:
    """Continue prompts with a trained model, its heads drafting; the text is the model's own."""
    texts = _texts(prompt, prompts)
    length = parse_draft_length(draft_length)
    from mtp_lightning.checkpoint.convert.load_model import load_model
    from mtp_lightning.data.loading.corpus import recipe_tokenizer
    from mtp_lightning.decode import Settings
    from mtp_lightning.decode.tree import read_tree

    recipe, model = load_model(path, device=device_of(device), dtype=dtype_of(dtype))
    tokenizer = recipe_tokenizer(recipe)
    settings = Settings(
        max_new_tokens=max_new_tokens,
        decoder=decoder.value,
        draft_length=length,
        tree=None if tree is None else read_tree(tree),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical=typical,
        seed=seed,
        stop_tokens=[tokenizer.end_of_document],
        stop_strings=[text.encode() for text in stop or []],
    )
    print_generations(model, tokenizer, texts, settings, show_drafts=show_drafts, compare=compare)


def show_sample(recipe: "Recipe") -> None:
    """Continue `run.sample` with what a run has trained, drafts coloured, and say what drafting gains."""
    from mtp_lightning.checkpoint.convert.load_model import load_model
    from mtp_lightning.console.errors import screen
    from mtp_lightning.data.loading.corpus import recipe_tokenizer
    from mtp_lightning.decode import Settings

    assert recipe.run.sample is not None
    trained, model = load_model(recipe.run.dir, device=device_of(DeviceName.auto))
    tokenizer = recipe_tokenizer(trained)
    prompt = recipe.run.sample.encode()
    room = trained.model.max_position_embeddings - len(tokenizer.encode(prompt))
    if room < 1:
        screen(stderr=True).print(
            f"\nrun.sample fills all {trained.model.max_position_embeddings} positions: nothing is written"
        )
        return
    settings = Settings(
        max_new_tokens=min(SAMPLE_TOKENS, room),
        temperature=SAMPLE_TEMPERATURE,
        seed=recipe.run.seed,
        stop_tokens=[tokenizer.end_of_document],
    )
    is_drafting = trained.heads.num_offsets > 1
    screen(stderr=True).print(f"\nWhat it writes (mtp generate {recipe.run.dir} --prompt TEXT --show-drafts for more):")
    print_generations(model, tokenizer, [prompt], settings, show_drafts=is_drafting, compare=is_drafting)


def parse_draft_length(text: str | None) -> int | Literal["adaptive"] | None:
    """Read a draft length from the command line."""
    if text is None:
        return None
    if text == ADAPTIVE:
        return ADAPTIVE
    if not text.isdecimal():
        raise typer.BadParameter(f"must be a whole number or {ADAPTIVE}; found {text!r}", param_hint="--draft-length")
    return int(text)


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


def _texts(prompts: list[str] | None, file: Path | None) -> list[bytes]:
    if bool(prompts) == (file is not None):
        raise typer.BadParameter("give either --prompt TEXT or --prompts FILE", param_hint="--prompt")
    return [text.encode() for text in prompts or []] if file is None else read_prompts(file)

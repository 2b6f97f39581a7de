"""What `mtp generate` shows: texts as they are written, drafts and their gain."""

import codecs
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from mtp_lightning.console.errors import screen

if TYPE_CHECKING:
    from mtp_lightning.cli.prompts import Prompt
    from mtp_lightning.data.tokenizers.base import Tokenizer
    from mtp_lightning.decode import Settings, Statistics, Step
    from mtp_lightning.decode.text_stream import TextStream
    from mtp_lightning.model.mtp_model import MtpModel

STYLES = {"prompt": "dim", "kept": "green", "rejected": "red strike", "own": ""}
MARKS = {"kept": ("{", "}"), "rejected": ("~", "~")}  # around drafts, where nothing can be coloured
EMPTY = ("", "")
UP_TO_COMPILED = 3  # steps: that of the prompt, one eager, one of fixed shapes


def print_generations(
    model: "MtpModel",
    tokenizer: "Tokenizer",
    prompts: Sequence["Prompt"],
    settings: "Settings",
    *,
    show_drafts: bool,
    compare: bool,
) -> None:
    """Continue the prompts one after the other, each streamed; the figures of each go to stderr."""
    from mtp_lightning.decode import stream
    from mtp_lightning.decode.generation import count
    from mtp_lightning.decode.settings import check_each_prompt
    from mtp_lightning.decode.text_stream import detokenizer, text_stream

    check_each_prompt(model, [prompt.tokens for prompt in prompts], settings.max_new_tokens)
    settings = replace(settings, detokenize=detokenizer(tokenizer))
    err = screen(stderr=True)
    for prompt in prompts:
        if settings.compile:
            compile_steps(model, prompt.tokens, settings, err)
        began_at = time.perf_counter()
        steps = stream(model, [prompt.tokens], settings)  # refuses what does not fit before anything is printed
        text = text_stream(tokenizer, prompt.tokens, stop_strings=settings.stop_strings, left_out=settings.stop_tokens)
        writer = Writer(screen(), tokenizer, text, show_drafts=show_drafts)
        if show_drafts:
            err.print(writer.legend())
        writer.write(prompt.shown, "prompt")
        done = [writer.step(step) for step in steps]
        writer.end()
        err.print(figures(count(done), time.perf_counter() - began_at))
        if compare:
            err.print(comparison(model, prompt.tokens, settings))


def compile_steps(model: "MtpModel", prompt: Sequence[int], settings: "Settings", err: Console) -> None:
    """Take the first steps for nothing, so that the compiler's time is no part of the text's; say how long it took."""
    from mtp_lightning.decode import stream

    err.print("compiling steps, unless they are known already ...")
    began_at = time.perf_counter()
    list(islice(stream(model, [prompt], settings), UP_TO_COMPILED))
    err.print(f"compiled in {time.perf_counter() - began_at:.1f} s, which is not in the figures below")


class Writer:
    """Writes one text to a console, token by token."""

    def __init__(self, console: Console, tokenizer: "Tokenizer", text: "TextStream", *, show_drafts: bool) -> None:
        self.console = console
        self.tokenizer = tokenizer
        self.text = text
        self.show_drafts = show_drafts
        self.marks = MARKS if show_drafts and console.color_system is None else {}
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, step: "Step") -> "Step":
        """Write what a step gave: kept drafts, rejected ones, the main head's token."""
        kept, accepted = int(step.kept[0]), int(step.accepted[0])
        tokens, drafts = step.block[0, :kept].tolist(), step.drafts[0].tolist()
        is_chain = len(drafts) == step.block.shape[1] - 1
        if not self.show_drafts:
            self.write(self.text.push(tokens), "own")
            return step
        self.write(self.text.push(tokens[:accepted]), "kept")
        if is_chain and kept > accepted:  # a tree's branches would not read as a text
            self._print("".join(map(self.tokenizer.printable, drafts[accepted:])), "rejected")
        self.write(self.text.push(tokens[accepted:]), "own")
        return step

    def write(self, text: bytes, role: str) -> None:
        """Write some bytes of the text; those of an unfinished character wait for the rest."""
        self._print(self.bytes.decode(text), role)

    def end(self) -> None:
        """End the text."""
        self._print(self.bytes.decode(self.text.end(), final=True) + "\n", "own")

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
        f"{share:.0%} of {statistics.num_draft_tokens} drafts kept, "
        f"{statistics.num_draft_tokens / statistics.num_drafts:.1f} drafted in each"
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

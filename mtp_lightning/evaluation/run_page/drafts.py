"""Drafts on a text: what each head says ahead of a text, and how far it is kept, as greedy self-speculation would.

One forward over the whole text gives what every head drafts at every place: the drafts before the first that is not
kept are tokens of the text, so heads that read tokens read the same as while a text is written.
"""

from codecs import getincrementaldecoder
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.carried_files import all_end_ids
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.decode import generate
from mtp_lightning.decode.text_stream import UNFINISHED, detokenizer, text_stream
from mtp_lightning.errors import DataError, DecodingError, MtpError
from mtp_lightning.evaluation.run_page.runs import Run
from mtp_lightning.files.untrusted import OddFileError, read_bounded, reason_of
from mtp_lightning.model.mtp_model import MtpModel

MOST_TOKENS = 512  # of a sample text
MOST_BYTES = 2**20


class Token(NamedTuple):
    """A token as it is shown."""

    text: str
    role: str  # own, kept, rejected
    offset: int  # of the head that it is from
    probability: float  # that this head gives it

    @property
    def tip(self) -> str:
        """What is said of it."""
        head = "main head" if self.offset == 1 else f"draft of offset {self.offset}"
        verdict = {"own": "", "kept": ", kept", "rejected": ", not kept"}[self.role]
        return f"{head}{verdict}, probability {self.probability:.3f}"


class Place(NamedTuple):
    """A token of a text, or a draft in its place that was not kept."""

    token: int
    role: str
    offset: int
    probability: float


def drafts_of(runs: list[Run], given: str | Path, *, max_new_tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """Show drafts of every run's last checkpoint in what it makes of a prompt, or along a text in a file.

    Args:
        runs: those of the page.
        given: the prompt, or the file.
        max_new_tokens: of what follows the prompt.
        device: where to compute.

    Raises:
        DataError: The file cannot be read, or is empty.
    """
    content = _read(given) if isinstance(given, Path) else given.encode(errors="replace")
    made = []
    for number, run in enumerate(runs, 1):
        told: dict[str, Any] = {"run": number, "name": run.name}
        if run.status.checkpoint is None:
            made.append({**told, "missing": "no checkpoint yet"})
            continue
        try:
            most_new = 0 if isinstance(given, Path) else max_new_tokens
            made.append(told | _drafts(run.status.path, content, most_new, device))
        except MtpError as error:
            made.append({**told, "missing": f"{error.expected}; found {error.found}"})
    return made


def _read(path: Path) -> bytes:
    try:
        content = read_bounded(path, MOST_BYTES)
    except (OSError, OddFileError) as error:
        raise DataError("the sample text must be readable", f"{path}: {reason_of(error)}", "Give another") from None
    if not content:
        raise DataError("the sample text must hold text", f"{path}, which is empty", "Give another")
    return content


def _drafts(path: Path, content: bytes, most_new: int, device: torch.device) -> dict[str, Any]:
    recipe, model = load_model(path, device=device)
    tokenizer, room = recipe_tokenizer(recipe), recipe.model.max_position_embeddings
    tokens = _encoded(tokenizer, content)
    if not most_new:
        tokens = tokens[: min(room, MOST_TOKENS)]
        begin = _first_character(tokenizer, tokens)
        return _told(tokenizer, places_of(model, tokens, begin), tokens[:begin])
    if not 0 < len(tokens) < room:
        raise DecodingError(
            f"the prompt must hold a token, and leave room in the context of {room:,}", f"{len(tokens):,}", "Change it"
        )
    ends = all_end_ids(recipe, tokenizer.end_of_document, path)
    made = generate(model, [tokens], max_new_tokens=min(most_new, room - len(tokens)), stop_tokens=ends)
    return _told(tokenizer, places_of(model, tokens + made.tokens[0], len(tokens)), tokens)


def _encoded(tokenizer: Tokenizer, content: bytes) -> list[int]:
    try:
        return [*tokenizer.opening, *tokenizer.encode(content).tolist()]
    except UnicodeDecodeError:
        raise DataError("this tokenizer's text must be UTF-8", "other bytes", "Convert it to UTF-8") from None


def _first_character(tokenizer: Tokenizer, tokens: list[int]) -> int:
    """Count the tokens of the first character, which is given; one where they make none."""
    whole = (
        n for n in range(1, 5) if UNFINISHED not in detokenizer(tokenizer)(tokens[:n]).decode(errors="replace").encode()
    )
    return next(whole, 1)


@torch.inference_mode()
def places_of(model: MtpModel, tokens: list[int], begin: int) -> list[Place]:
    """Walk along a text as greedy self-speculation does, from its token at `begin` on.

    Every step takes one token of the main head, then the drafts of offsets 2, 3, ... that are the text's own; the
    first that is not is there, too.
    """
    padded = torch.tensor([tokens + [0] * model.num_offsets], device=model.trunk.embed_tokens.weight.device)
    states = model.hidden_states(padded, torch.zeros_like(padded))
    likeliest: dict[int, tuple[list[float], list[int]]] = {}
    own: list[float] = []  # probabilities of the text's tokens by the main head
    for offset, state in states.items():
        scores = model.unembedding.logits(offset, state[:, begin - 1 :])[0]
        laws = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # (T', V)
        best = laws.max(-1)
        likeliest[offset] = best.values.tolist(), best.indices.tolist()
        if offset == 1:
            own = laws[:-1].gather(1, padded[0, begin : len(tokens), None])[:, 0].tolist()
    places, at = [], 0
    while at < len(own):
        places.append(Place(tokens[begin + at], "own", 1, own[at]))
        step = 1
        for offset in range(2, min(model.num_offsets, len(own) - at) + 1):
            probability, draft = (values[at] for values in likeliest[offset])
            is_kept = draft == tokens[begin + at + offset - 1]
            places.append(Place(int(draft), "kept" if is_kept else "rejected", offset, probability))
            if not is_kept:
                break
            step += 1
        at += step
    return places


def _told(tokenizer: Tokenizer, places: list[Place], given: list[int]) -> dict[str, Any]:
    """Put places into texts. A token that ends no character shows as a dot: the next one has it."""
    stream, characters = text_stream(tokenizer, given), getincrementaldecoder("utf-8")(errors="replace")
    shown = []
    for place in places:
        if place.role == "rejected":
            text = tokenizer.printable(place.token)
        else:
            text = characters.decode(stream.push([place.token])).replace("\n", "↵\n") or "·"
        shown.append(Token(text, *place[1:]))
    steps = sum(place.role == "own" for place in places)
    kept = sum(place.role == "kept" for place in places)
    return {
        "given": detokenizer(tokenizer)(given).decode(errors="replace"),
        "tokens": shown,
        "summary": f"{steps + kept} tokens in {steps} steps of greedy self-speculation: {kept} drafts kept, "
        f"{(steps + kept) / max(1, steps):.2f} tokens per step.",
    }

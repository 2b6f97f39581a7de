"""Whether an exported folder says in its reader's hands what the model says here: scores, text and kept drafts."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.consolidate import DTYPES
from mtp_lightning.checkpoint.export.contents import Source
from mtp_lightning.checkpoint.export.formats import Format
from mtp_lightning.checkpoint.export.judges import Heard, Probe, model_of
from mtp_lightning.checkpoint.export.names import FormatName
from mtp_lightning.checkpoint.export.write import REPORT
from mtp_lightning.checkpoint.format.manifest import CONFIG_NAME
from mtp_lightning.checkpoint.huggingface.heads_layout import SETTINGS
from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.decode import applicable_decoders, generate
from mtp_lightning.errors import CheckpointError, DataError, DecodingError
from mtp_lightning.files.untrusted import read_object
from mtp_lightning.model.mtp_model import MtpModel

NUM_TOKENS = 32
PROMPT = b"The first thing to say about it is that"
MOST_DEVIATION = 1e-4
"""Largest difference of two scores that rounding in fp32 makes, as a share of the largest score."""
HINT = "Nothing was exported. Export with --format consolidated, and report what was found"


def check_parity(folder: Path, row: Format, source: Source) -> dict[str, Any]:
    """Compare a written folder with the model that it was made of, by every judge that there is for its format.

    Kept drafts are predicted from one teacher-forced pass over the finished text. Memory: one model at a time, in fp32.

    Returns:
        What was compared, for parity.json.

    Raises:
        CheckpointError: a head is lost or another one, scores, text or kept drafts differ, or nobody could judge.
    """
    told = read_object(folder / CONFIG_NAME).get(SETTINGS)
    told = told if isinstance(told, dict) else {}
    has_ids = told.get("draft_token_ids") is not None or row.name is FormatName.eagle
    ours = _Ours(source, keeps_draft_vocabulary=has_ids)
    heard = []
    if row.reread is not None:  # it names the head that is wrong
        heard.append(_reread(row.reread(folder, source.recipe), ours, _written_offsets(folder, source)))
    heard += [_judged(judge(folder, ours.probe), ours) for judge in (one.judge for one in row.engines) if judge]
    if not any("judge" in one for one in heard):
        reasons = "; ".join(one["not_judged"] for one in heard) or "none for this format"
        raise CheckpointError("--verify must have a judge", reasons, "Install the engine, or leave --verify out")
    for one in heard:
        _tell(one)
    return {
        "prompt": ours.probe.prompt,
        "text": ours.text,
        "predicted_accepted": ours.accepted,
        "judges": heard,
    }


class _Ours:
    """What the exported model says, and how many of its own drafts every step would keep."""

    def __init__(self, source: Source, *, keeps_draft_vocabulary: bool) -> None:
        recipe = source.recipe
        if not keeps_draft_vocabulary:
            recipe = recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"draft_vocabulary": None})})
        model = model_of(recipe, source.given or source.reader, dtype=DTYPES[source.dtype])
        prompt = _prompt(source)
        room = recipe.model.max_position_embeddings - len(prompt) - model.num_offsets
        num_tokens = max(1, min(NUM_TOKENS, room))
        said = plain_text(model, prompt, num_tokens + model.num_offsets)
        self.text = said[:num_tokens]
        self.probe = Probe(prompt, [*prompt, *said], num_tokens)
        self.logits = scores(model, self.probe.text)
        self.accepted = self.predicted([*self.logits])

    def predicted(self, offsets: Iterable[int]) -> list[int]:
        """Count the drafts that every step keeps, where only some offsets draft."""
        logits, probe = {offset: self.logits[offset] for offset in offsets}, self.probe
        return predicted_accepts(logits, len(probe.prompt), probe.text, probe.num_tokens)


def plain_text(model: MtpModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Say the main head's first choices, by a whole pass for each: any model can, whatever its layers keep."""
    text = [*prompt]
    for _ in range(num_tokens):
        text.append(int(scores(model, text, model.heads.chain(1))[1][-1].argmax()))
    return text[len(prompt) :]


def scores(model: MtpModel, text: Sequence[int], offsets: list[int] | None = None) -> dict[int, Tensor]:
    """Score a text by every offset, or some, in one pass: (T, V) each."""
    padded = torch.tensor([[*text, *[0] * model.num_offsets]])
    with torch.no_grad():
        states = model.hidden_states(padded, torch.zeros_like(padded), offsets)
        return {offset: model.unembedding.logits(offset, state)[0] for offset, state in states.items()}


def predicted_accepts(logits: dict[int, Tensor], prompt_length: int, text: Sequence[int], num_tokens: int) -> list[int]:
    """Count the drafts that every verifying step keeps, from one pass over the finished text.

    Args:
        logits: (T, V) of every offset over the text.
        prompt_length: tokens of the prompt.
        text: (T,) prompt and new tokens; at least as many more as there are offsets.
        num_tokens: new tokens at which the last step ends, or behind which.
    """
    choices = {offset: one.argmax(-1).tolist() for offset, one in logits.items() if offset > 1}
    counts: list[int] = []
    while (emitted := 1 + sum(counts) + len(counts)) < num_tokens and choices:
        last = prompt_length + emitted - 2  # position of the last token that the model has seen
        right = [choices[offset][last] == text[last + offset] for offset in sorted(choices)]
        counts.append([*right, False].index(False))
    return counts


def _prompt(source: Source) -> list[int]:
    most = source.recipe.model.vocab_size
    try:
        ids = [int(one) for one in recipe_tokenizer(source.recipe).encode(PROMPT)]
    except DataError:  # its file is gone
        ids = []
    return [one for one in ids if one < most][:16] or [number % most for number in range(1, 9)]


def _judged(heard: Heard | str, ours: _Ours) -> dict[str, Any]:
    if isinstance(heard, str):
        return {"not_judged": heard}
    deviation = _deviation(heard.judge, 1, ours.logits[1], heard.logits)
    _check(heard.judge, "the same text", ours.text, heard.text)
    told: dict[str, Any] = {"judge": heard.judge, "deviation": {1: deviation}, "text": "equal"}
    if heard.accepted is not None:
        _check(heard.judge, "the kept drafts that training predicts", ours.accepted[:-1], heard.accepted)
        told["accepted"] = heard.accepted
    return told


def _written_offsets(folder: Path, source: Source) -> list[int]:
    """List the offsets of which the report of an export says that every tensor was written."""
    written = read_object(folder / REPORT)["written"]
    left = {one.owner for name, one in source.parameters.items() if name not in written}
    heads = source.recipe.heads
    own = {k: 2 if heads.kind == "recursive" else k for k in range(2, heads.num_offsets + 1)}
    return [1, *(offset for offset, owner in own.items() if f"offset {owner}" not in left)]


def _reread(model: MtpModel, ours: _Ours, written: list[int]) -> dict[str, Any]:
    """Compare the scores of all heads that were written."""
    judge, found = "mtp import", scores(model, ours.probe.text)
    _check(judge, "the offsets that were written", written, found)
    deviations = {offset: _deviation(judge, offset, ours.logits[offset], one) for offset, one in found.items()}
    told: dict[str, Any] = {"judge": judge, "deviation": deviations, "text": "equal"}
    try:
        said = generate(model, [ours.probe.prompt], max_new_tokens=len(ours.text))
    except DecodingError as error:  # recurrent layers
        _check(judge, "the same text", ours.text, plain_text(model, ours.probe.prompt, len(ours.text)))
        return told | {"not_counted": error.found}
    _check(judge, "the same text", ours.text, said.tokens[0])
    if applicable_decoders(model) == ["greedy"] and len(found) > 1:
        return told | {"not_counted": "layers with a state that cannot be taken back: no drafts are made"}
    if len(found) > 1:
        predicted = ours.predicted(written)
        _check(judge, "the kept drafts that training predicts", predicted, said.statistics.accepted_by_row[0])
        told["accepted"] = predicted
    return told


def _deviation(judge: str, offset: int, expected: Tensor, found: Tensor) -> float:
    """Return the largest difference of two scores, as a share of the largest score."""
    if found.shape != expected.shape:
        found = found[:, : expected.shape[1]]
    difference = torch.where(expected == found, 0.0, expected - found).abs().max()  # ids that are not drafted are -inf
    deviation = float(difference / expected[expected.isfinite()].abs().max().clamp(min=1e-9))
    if not deviation <= MOST_DEVIATION:
        raise CheckpointError(
            f"an exported folder must give the scores of the model, within {MOST_DEVIATION:g} of the largest",
            f"{deviation:.2g} at offset {offset}, by {judge}: a head is lost, or another one"
            if offset > 1
            else f"{deviation:.2g}, by {judge}",
            HINT,
        )
    return deviation


def _check(judge: str, what: str, expected: Iterable[int], found: Iterable[int]) -> None:
    if [*expected] != [*found]:
        raise CheckpointError(f"an exported folder must give {what}", f"{[*found]} for {[*expected]}, by {judge}", HINT)


def _tell(one: dict[str, Any]) -> None:
    if "not_judged" in one:
        say(f"Not judged by an engine: {one['not_judged']}")
        return
    worst = max(one["deviation"].values())
    heads = f"{len(one['deviation'])} offsets" if len(one["deviation"]) > 1 else "the next token"
    kept = (
        f", {sum(one['accepted'])} drafts kept in {len(one['accepted'])} steps as predicted"
        if "accepted" in one
        else ""
    )
    say(f"Verified by {one['judge']}: scores of {heads} within {worst:.1g} of the largest, the same text{kept}")

"""Synthetic tasks of Gloeckle et al. 2024, section 4: how often the main head's likeliest tokens are the true ones.

Induction: the second token of a name that the story has mentioned before. Polynomial arithmetic: all tokens of the
result, which is what greedy decoding gets right: its tokens are the true ones until it makes a mistake.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.console.plots import label_of, save_picture
from mtp_lightning.console.progress import counted
from mtp_lightning.data.loading.corpus import check_largest_token, recipe_tokenizer
from mtp_lightning.data.tokenizers.base import Offsets, Tokenizer
from mtp_lightning.decode.state import main_path
from mtp_lightning.errors import DataError, DecodingError
from mtp_lightning.evaluation.json_lines import json_rows
from mtp_lightning.evaluation.spread import spread
from mtp_lightning.files.durable import describe_file
from mtp_lightning.files.untrusted import OddFileError, described, open_regular, reason_of, shown
from mtp_lightning.model.mtp_model import MtpModel

BATCH_TOKENS = 16_384
Z_95 = 1.96  # quantile of the normal law for a two-sided 95 % interval
WRITE = "Give the test.jsonl of `mtp data probe {}`, or rows like its own"


@final
@dataclass(frozen=True)
class Problem:
    """A text, and what is to be predicted in it."""

    tokens: list[int]
    trials: list[list[int]]  # positions, all of which must be predicted from what stands before them
    group: str


@dataclass(frozen=True)
class Accuracy:
    """Share of trials whose tokens are all predicted, with its 95 % interval."""

    group: str
    value: float
    low: float
    high: float
    num_right: int
    num_trials: int


@dataclass(frozen=True)
class ProbeReport:
    """What a model has reached on one file of problems."""

    probe: str
    recipe: str
    data_sha256: str
    accuracies: tuple[Accuracy, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values to be written to a file."""
        return asdict(self)


def measure_probe(
    probe: str, path: Path, data: Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> ProbeReport:
    """Measure a run, checkpoint or exported folder on the problems of a file.

    Raises:
        CheckpointError: There is nothing to load.
        DataError: The file holds no problems of this kind, or they are not such ones by the model's tokenizer.
        DecodingError: A problem is longer than the model's context.
    """
    read = PROBES[probe]
    rows = list(json_rows(data))
    recipe, model = load_model(path, device=device, dtype=dtype)
    tokenizer = recipe_tokenizer(recipe)
    problems = [read(row, f"line {number} of {data}", tokenizer) for number, row in rows]
    if not any(problem.trials for problem in problems):
        raise DataError(f"there must be something to predict for {probe}", f"nothing in {data}", WRITE.format(probe))
    _check_fit(problems, recipe.model.max_position_embeddings, data)
    check_largest_token(max(max(problem.tokens) for problem in problems), recipe.model.vocab_size, str(data))
    rights: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for problem, right in zip(problems, predict(model, problems), strict=True):
        rights[problem.group].append((sum(right), len(right)))
    return ProbeReport(
        probe, recipe.name, read_digest(data), tuple(accuracy(group, own) for group, own in rights.items())
    )


def read_digest(data: Path) -> str:
    """Return the sha256 of a file of problems.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with open_regular(data):
            return describe_file(data, is_synced=True).sha256
    except (OSError, OddFileError) as error:
        raise DataError("a file of problems must be readable", f"{data}: {reason_of(error)}", "Name another") from None


def draw(reports: Sequence[ProbeReport], path: Path) -> None:
    """Draw accuracy by group, a line for each recipe: the mean over its runs, with its 95 % interval if several.

    Raises:
        RunFolderError: The picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for recipe in dict.fromkeys(report.recipe for report in reports):
        values: dict[str, list[float]] = defaultdict(list)
        for own in (own for report in reports if report.recipe == recipe for own in report.accuracies):
            values[own.group].append(own.value)
        spreads = [spread(of_group) for of_group in values.values()]
        means, margins = [one.mean for one in spreads], [one.margin or 0.0 for one in spreads]
        axes.errorbar([*values], means, yerr=margins, marker="o", capsize=3, label=label_of(recipe))
    axes.set(xlabel="operations", ylabel="right results", ylim=(0, 1), title="Accuracy by number of operations")
    axes.legend()
    save_picture(figure, path, "--plot")


def _check_fit(problems: Sequence[Problem], most_tokens: int, data: Path) -> None:
    if (longest := max(len(problem.tokens) for problem in problems)) > most_tokens:
        raise DecodingError(
            f"problems must fit the model's context of {most_tokens:,} tokens",
            f"one of {longest:,} in {data}",
            "Leave out longer ones, or train with a larger data.seq_len",
        )


@torch.no_grad()
def predict(model: MtpModel, problems: Sequence[Problem]) -> list[list[bool]]:
    """Tell of every trial whether the main head's likeliest tokens are the true ones."""
    device, path = model.trunk.embed_tokens.weight.device, main_path(model)
    found: dict[int, list[bool]] = {}
    with counted("Measuring", total=len(problems), unit="problems") as advance:
        for batch in _batches(problems):
            longest = max(len(problems[number].tokens) for number in batch)
            tokens = torch.zeros(len(batch), longest + model.num_offsets, dtype=torch.long)
            for row, number in enumerate(batch):
                tokens[row, : len(problems[number].tokens)] = torch.tensor(problems[number].tokens)
            tokens = tokens.to(device)
            states = model.hidden_states(tokens, torch.zeros_like(tokens), offsets=path)[1]  # (B, T, D)
            asked = [(row, place) for row, number in enumerate(batch) for t in problems[number].trials for place in t]
            rows, places = torch.tensor(asked, dtype=torch.long, device=device).view(-1, 2).unbind(1)
            likeliest = model.unembedding.logits(1, states[rows, places - 1]).argmax(-1)
            right = iter((likeliest == tokens[rows, places]).tolist())
            for number in batch:
                seen = [[next(right) for _ in trial] for trial in problems[number].trials]
                found[number] = [all(trial) for trial in seen]
            advance(len(batch))
    return [found[number] for number in range(len(problems))]


def _batches(problems: Sequence[Problem]) -> list[list[int]]:
    """Put problems of like lengths together."""
    batches: list[list[int]] = []
    for number in sorted(range(len(problems)), key=lambda number: len(problems[number].tokens)):
        size = len(problems[number].tokens)
        if not batches or (len(batches[-1]) + 1) * size > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(number)
    return batches


def accuracy(group: str, rows: Sequence[tuple[int, int]]) -> Accuracy:
    """Sum up rows, each with its trials that were right and all of them.

    The interval is Wilson's. Trials of a row are not independent: as many are counted as have the rows' spread.

    >>> found = accuracy("x", [(1, 1), (0, 1), (1, 1), (1, 1)])
    >>> found.value, round(found.low, 3), round(found.high, 3)
    (0.75, 0.301, 0.954)
    """
    right, trials = np.array(rows, dtype=np.int64).T
    share = float(right.sum() / trials.sum())
    spread = float(((right - share * trials) ** 2).sum() / trials.sum() ** 2)
    count = min(share * (1 - share) / spread if spread else len(rows), int(trials.sum()))
    middle, scale = share + Z_95**2 / (2 * count), 1 + Z_95**2 / count
    half = Z_95 * (share * (1 - share) / count + Z_95**2 / (4 * count**2)) ** 0.5
    low, high = max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
    return Accuracy(group, share, low, high, int(right.sum()), int(trials.sum()))


def _story(row: Mapping[str, Any], place: str, tokenizer: Tokenizer) -> Problem:
    """Find the second tokens of all names that have been mentioned before."""
    text, names = row.get("text"), row.get("names")
    if not isinstance(text, str) or not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise _wrong_row("induction", "`text` and `names`, which are texts", row, place)
    tokens, spans = _encoded(text, place, tokenizer)
    trials = []
    for name in names:
        mentions = [
            (_length(text[: found.start()], tokenizer), _length(text[: found.end()], tokenizer))
            for found in re.finditer(rf"\b{re.escape(name)}\b", text)
        ]
        for begin, end in mentions:
            own = np.flatnonzero((spans[:, 1] > begin) & (spans[:, 0] < end))
            if len(own) != 2 or spans[own[1], 1] != end:
                raise DataError(
                    "every name must be two tokens of the model's tokenizer",
                    f"{shown(name)} is {len(own)} of {tokenizer.name}, {place}",
                    "Measure a model that was trained with the tokenizer.json of `mtp data probe induction`",
                )
            if begin != mentions[0][0]:
                trials.append([int(own[1]) + len(tokenizer.opening)])
    return Problem([*tokenizer.opening, *tokens], trials, "repeated names")


def _calculation(row: Mapping[str, Any], place: str, tokenizer: Tokenizer) -> Problem:
    """Ask for all tokens of the completion."""
    prompt, completion, operations = (row.get(key) for key in ("prompt", "completion", "operations"))
    texts = [text for text in (prompt, completion) if isinstance(text, str) and text]
    if len(texts) < 2 or not isinstance(operations, int):
        fields = "`prompt` and `completion`, which are texts, and a number `operations`"
        raise _wrong_row("polynomial", fields, row, place)
    prompt, completion = texts
    tokens, spans = _encoded(prompt + completion, place, tokenizer)
    asked = np.flatnonzero(spans[:, 1] > _length(prompt, tokenizer)) + len(tokenizer.opening)
    return Problem([*tokenizer.opening, *tokens], [asked.tolist()], str(operations))


PROBES: dict[str, Callable[[Mapping[str, Any], str, Tokenizer], Problem]] = {
    "induction": _story,
    "polynomial": _calculation,
}


def _encoded(text: str, place: str, tokenizer: Tokenizer) -> tuple[list[int], Offsets]:
    ((tokens, spans),) = tokenizer.encode_with_offsets([text.encode()], parse_special_tokens=False)
    if tokenizer.unknown is not None and (unknown := np.flatnonzero(tokens == tokenizer.unknown)).size:
        begin, end = spans[unknown[0]]
        raise DataError(
            "the model's tokenizer must know all of a problem",
            f"{shown(text[begin:end])}, which {tokenizer.name} does not, {place}",
            "Measure a model that was trained on this task",
        )
    return tokens.tolist(), spans


def _length(text: str, tokenizer: Tokenizer) -> int:
    """Return the length of a text as the tokenizer's offsets count: in bytes, or in characters."""
    return len(text.encode() if tokenizer.takes_any_bytes else text)


def _wrong_row(probe: str, fields: str, row: Mapping[str, Any], place: str) -> DataError:
    return DataError(f"every row for {probe} must have {fields}", f"{described(row)}, {place}", WRITE.format(probe))

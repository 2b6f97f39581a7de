"""Writes samples, in batches through the decoders of the package."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.decode import Settings, generate
from mtp_lightning.decode.generation import Generation
from mtp_lightning.decode.settings import resolve_decoder
from mtp_lightning.decode.text_stream import detokenizer, text_stream
from mtp_lightning.errors import DataError, DecodingError
from mtp_lightning.evaluation.code.answers import cut
from mtp_lightning.evaluation.code.samples import Line, LineLog
from mtp_lightning.model.mtp_model import MtpModel


class Place(NamedTuple):
    """One sample to write."""

    problem: str
    temperature: float
    sample: int


@final
@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be written for one task."""

    task: str
    prompts: Mapping[str, Sequence[int]]  # tokens, by the name of the problem
    stop_strings: tuple[str, ...]
    temperatures: Sequence[float]
    num_samples: int  # per problem and temperature; 1 where that is 0
    top_p: float | None
    settings: Settings  # all else; its seed is that of the evaluation
    rows: int  # of a batch

    def batches(self) -> list[list[Place]]:
        """List what is written together, in order; prompts of like length lie beside each other."""
        names = sorted(self.prompts, key=lambda name: len(self.prompts[name]))
        return [
            places[first : first + self.rows]
            for temperature in self.temperatures
            for places in [[Place(n, temperature, s) for n in names for s in range(self.num_of(temperature))]]
            for first in range(0, len(places), self.rows)
        ]

    def num_of(self, temperature: float) -> int:
        """Say how many samples a problem gets."""
        return self.num_samples if temperature else 1

    def check_context(self, context: int) -> None:
        """Refuse prompts that leave no room for an answer.

        Raises:
            DecodingError: Names the longest.
        """
        name = max(self.prompts, key=lambda name: len(self.prompts[name]))
        longest, new = len(self.prompts[name]), self.settings.max_new_tokens
        if longest + new > context:
            raise DecodingError(
                f"prompts and answers together must fit the model's context of {context:,} tokens",
                f"{longest:,} tokens in the prompt of {self.task} {name}, and --max-new-tokens {new:,}",
                f"Give --max-new-tokens {context - longest} or less" if longest < context else "Leave the task out",
            )


@final
@dataclass
class Speed:
    """What decoding took."""

    num_tokens: int = 0
    seconds: float = 0.0
    num_steps: int = 0
    num_accepted: int = 0
    gain: float | None = None  # of drafts, on the first batch: tokens per second over those without drafts
    is_same: bool | None = None  # the texts of that batch, where they should be

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step."""
        return 1 + self.num_accepted / self.num_steps if self.num_steps else 1.0

    def add(self, made: Generation) -> None:
        """Count a batch."""
        self.num_tokens += made.statistics.num_emitted_tokens
        self.seconds += made.prefill_s + made.decode_s
        self.num_steps += made.statistics.num_drafts
        self.num_accepted += made.statistics.num_accepted_tokens


def num_done(log: LineLog, batches: Sequence[Sequence[Place]]) -> int:
    """Count the batches that are there whole, and cut off what follows them.

    Raises:
        DataError: Other samples than those that were asked for are there.
    """
    places = [place for batch in batches for place in batch]
    for number, line in enumerate(log.lines, 1):
        there = Place(line["task_id"], line["temperature"], line["sample"])
        if number > len(places) or there != places[number - 1]:
            raise DataError(
                "samples must be there in the order in which they were asked for",
                f"sample {there.sample} of {there.problem} at temperature {there.temperature:g} in line {number}",
                "Put back what was there, or give another --out",
            )
    num_lines, number = 0, 0
    while number < len(batches) and num_lines + len(batches[number]) <= len(log.lines):
        num_lines += len(batches[number])
        number += 1
    log.cut(num_lines)
    return number


def write_samples(
    model: MtpModel, tokenizer: Tokenizer, wanted: Wanted, log: LineLog, advance: Callable[[int], None]
) -> Speed:
    """Write what is not in the log yet; say how fast that was."""
    speed, batches = Speed(), wanted.batches()
    wanted.check_context(model.section.max_position_embeddings)
    for batch in batches[num_done(log, batches) :]:
        settings = _settings_of(wanted, batch[0], tokenizer)
        prompts = [wanted.prompts[place.problem] for place in batch]
        made = generate(model, prompts, settings)
        if speed.gain is None and resolve_decoder(model, settings.decoder) != "greedy":
            _compare(model, prompts, settings, made, speed)
        speed.add(made)
        pairs = zip(batch, prompts, made.tokens, strict=True)
        log.append([_line(place, prompt, tokens, tokenizer, settings) for place, prompt, tokens in pairs])
        advance(len(batch))
    return speed


def _settings_of(wanted: Wanted, first: Place, tokenizer: Tokenizer) -> Settings:
    """Draw each batch by a seed of its own, which its first sample decides."""
    named = f"{wanted.settings.seed} {wanted.task} {first.problem} {first.temperature!r} {first.sample}"
    return replace(
        wanted.settings,
        temperature=first.temperature,
        top_p=wanted.top_p if first.temperature else None,
        seed=int.from_bytes(hashlib.blake2b(named.encode(), digest_size=7).digest(), "little"),
        stop_strings=[stop.encode() for stop in wanted.stop_strings],
        detokenize=detokenizer(tokenizer),
    )


def _compare(
    model: MtpModel, prompts: Sequence[Sequence[int]], settings: Settings, made: Generation, speed: Speed
) -> None:
    plain = generate(model, prompts, replace(settings, decoder="greedy", draft_length=None, tree=None))
    rates = [one.statistics.num_emitted_tokens / (one.prefill_s + one.decode_s) for one in (made, plain)]
    speed.gain = rates[0] / rates[1]
    speed.is_same = made.tokens == plain.tokens if settings.sampling.is_greedy else None


def _line(place: Place, prompt: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer, settings: Settings) -> Line:
    stream = text_stream(tokenizer, prompt, stop_strings=settings.stop_strings, left_out=settings.stop_tokens)
    text = (stream.push(tokens) + stream.end()).decode(errors="replace")
    completion = cut(text, [stop.decode() for stop in settings.stop_strings])
    return {
        "task_id": place.problem,
        "temperature": place.temperature,
        "sample": place.sample,
        "completion": completion,
        "num_tokens": len(tokens),
    }

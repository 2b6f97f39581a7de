"""Sections of a recipe on data: where tokens come from, how windows are cut, how many make a step."""

from typing import Annotated, Literal

from pydantic import Field

from mtp_lightning.recipe.schema.base import (
    AtLeastTwo,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rows,
    Section,
)
from mtp_lightning.recipe.schema.paths import EXPANDED_NAMES, LocalPath, PathOrUrl

MIXTURE_BLOCK_ROWS = 4096
"""Rows over which a mixture keeps its weights exactly."""


class StreamSection(Section):
    """WebDataset tars that others made, for `data.kind: webdataset_stream`.

    A sample is a document: `.txt`, `.json` with a text field, or token ids in `.npy` or `.tok`.
    """

    train: list[PathOrUrl] = Field(min_length=1)
    """Tars to train on: paths, globs, URLs; {00..17} stands for numbers. As many as ranks x loader processes, or more.
    """
    validation: list[PathOrUrl] = Field(min_length=1)
    """Tars whose first rows are held out for validation."""
    member: str | None = Field(default=None, min_length=1)
    """Which member of a sample is the document, e.g. `txt`, `seg.txt` or `txt.gz`; null takes the only one of a known
    kind."""
    text_field: str = "text"
    """Field of `.json` samples that holds the text."""
    token_type: Literal["uint16", "uint32"] = "uint16"
    """How `.tok` samples store ids, little-endian."""


class MixtureScheduleSection(Section):
    """Weights of a mixture that change over the run, as a function of the rows consumed alone."""

    at_rows: list[NonNegativeInt] = Field(min_length=1)
    """Rows consumed at which the weights hold, growing; before the first and after the last the weights stay."""
    weights: Annotated[dict[str, list[NonNegativeFloat]], *EXPANDED_NAMES]
    """Sources and their weights at these rows, e.g. {shards/code: [1, 4]}, in place of those in `data.mixture`."""
    between: Literal["linear", "steps"] = "linear"
    """Weights change evenly from one of the rows to the next, or stay until the next."""


class DataSection(Section):
    """Where the tokens come from, and how windows are cut."""

    kind: Literal["shards", "webdataset_stream"] = "shards"
    """Shards with an index, whose rows come in an exact order that any number of ranks resumes; or plain WebDataset
    tars read from front to back (`data.stream`), whose resume is not exact: it begins at another place, so some
    documents come again early and others late."""
    stream: StreamSection | None = None
    """For kind `webdataset_stream`: the tars."""
    corpus: list[LocalPath] = Field(default=["stdlib"], min_length=1)
    """Text to build shards from: folders, files, globs, `stdlib` (Python's own library), `stdlib:json` (a package)."""
    shards: PathOrUrl | None = None
    """Folder made by `mtp data build` or `mtp data adopt`, or the URL (https://, s3://, …) of shards; null means: build
    from the corpus into run.cache when missing."""
    mixture: Annotated[dict[str, PositiveFloat], *EXPANDED_NAMES] = Field(default_factory=dict)
    """Several folders or URLs of shards and their weights, e.g. {shards/code: 1, shards/web: 3}, instead of `shards`.
    """
    mixture_schedule: MixtureScheduleSection | None = None
    """Weights of the mixture that change over the run, or null."""
    max_epochs: Annotated[dict[str, PositiveFloat], *EXPANDED_NAMES] = Field(default_factory=dict)
    """How often a run may at most read through a source of the mixture, e.g. {shards/code: 4}; without, any number."""
    shuffle: Literal["rows", "shards"] = "rows"
    """Shuffle all rows of an epoch; or shuffle the shards, and rows within groups of `shuffle_shards` of them, so that
    a cache smaller than the data will do."""
    shuffle_shards: PositiveInt = 8
    """For order `shards`: how many shards rows are shuffled over."""
    cache_gib: PositiveFloat = 256.0
    """Most that shards from URLs take below run.cache, in GiB."""
    tokenizer: LocalPath = "byte"
    """Tokenizer: `byte` (256 bytes + end of document), a folder of transformers, or a file, `tokenizer.json` or a
    SentencePiece `*.model`."""
    end_of_document: NonNegativeInt | None = None
    """Id of the token that ends a document; null means the tokenizer's own (its `eos_token`)."""
    parse_special_tokens: bool = False
    """Whether special tokens that a text spells out (`<|im_start|>`) become their ids. For text you trust: else
    anybody can write an end of document. In chats those of the template always do."""
    add_special_tokens: bool = False
    """Put around each document what the tokenizer's post-processor adds, as a begin of sequence; not in chats, where
    the template writes it."""
    chat_template: str | None = None
    """Template that makes text of chats: a Jinja file, the name of one of several, or `plain` (roles as ordinary text);
    null means the tokenizer's own, and `plain` with bytes."""
    text_field: str | None = Field(default=None, min_length=1)
    """Field or column of the corpus that holds the text, `a.b` for one within another; null finds `text`, `prompt` and
    `completion`, `messages` and other known ones by their names."""
    template: str | None = Field(default=None, min_length=1)
    """A text made of several fields, e.g. '# {title}\\n{text}'; nothing in it is computed."""
    encoding: str | None = None
    """Encoding of texts without a byte-order mark, e.g. `latin-1`; null means UTF-8."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Refuse a corpus with a row that is no document (no text, damaged JSON), or leave such rows out and count them."""
    deduplicate: bool = False
    """Leave out of a corpus every document that is equal to an earlier one."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.03
    """Share of documents held out for validation, chosen by a hash of their path."""
    seq_len: AtLeastTwo = 256
    """Positions T per sequence; each sample holds T + n tokens."""
    packing: Literal["cut", "best_fit"] = "cut"
    """Windows cut from the documents one after another, or filled with whole documents by best fit."""
    document_mask: bool = False
    """Attend within the document only (positions restart there) instead of over the whole window."""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Loader processes per rank; 0 reads in a thread of the training process."""

    def weights_at_rows(self) -> dict[str, list[float]]:
        """Return the weights of every source of the mixture, at the rows of its schedule or at the beginning."""
        schedule = self.mixture_schedule
        if schedule is None:
            return {name: [weight] for name, weight in self.mixture.items()}
        return {
            name: schedule.weights.get(name, [weight] * len(schedule.at_rows)) for name, weight in self.mixture.items()
        }


class RampSection(Section):
    """A batch that grows from `from_batch_size`, in steps of as many, to `batch.global_batch_size`."""

    from_batch_size: Rows
    """Batch size of the first steps; must divide `batch.global_batch_size`."""
    over_samples: PositiveInt
    """Samples after which a step has `batch.global_batch_size`."""


class BatchSection(Section):
    """Sequences per optimizer step, and how they are cut up."""

    global_batch_size: Rows = 16
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Rows = 16
    """Sequences per forward and backward on one rank; ranks times it must divide the global batch."""
    ramp: RampSection | None = None
    """Smaller batches at the beginning, or null; the learning rate goes by steps all the same."""

    def batch_size_at(self, rows_consumed: int) -> int:
        """Rows of the step that begins at a position: a function of it alone, so ranks and restarts agree.

        >>> batch = BatchSection(global_batch_size=16, ramp=RampSection(from_batch_size=4, over_samples=90))
        >>> [batch.batch_size_at(position) for position in (0, 29, 30, 60, 90, 1000)]
        [4, 4, 8, 12, 16, 16]
        """
        if self.ramp is None or rows_consumed >= self.ramp.over_samples:
            return self.global_batch_size
        num_growths = self.global_batch_size // self.ramp.from_batch_size - 1
        return self.ramp.from_batch_size * (1 + rows_consumed * num_growths // self.ramp.over_samples)

    def samples_after(self, steps: int) -> int:
        """Rows of that many steps from the beginning; costs a few operations per size of a step.

        >>> ramp = RampSection(from_batch_size=4, over_samples=90)
        >>> BatchSection(global_batch_size=16, ramp=ramp).samples_after(8 + 4 + 3 + 2)
        132
        """
        position = 0
        while self.ramp is not None and steps > 0 and (size := self.batch_size_at(position)) < self.global_batch_size:
            grown, num_growths = (
                size // self.ramp.from_batch_size,
                self.global_batch_size // self.ramp.from_batch_size - 1,
            )
            next_growth = -(-grown * self.ramp.over_samples // num_growths)  # the first position of a larger step
            num_steps = min(steps, -(-(next_growth - position) // size))
            position, steps = position + num_steps * size, steps - num_steps
        return position + steps * self.global_batch_size

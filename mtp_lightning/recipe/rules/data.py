"""Rules of data and model: what is read, from where, how it is packed, and which shapes a trunk can have."""

import itertools
import re
from functools import cache

from mtp_lightning.files.paths import is_url
from mtp_lightning.recipe.rules.base import Rule, divisors
from mtp_lightning.recipe.schema.data import DataSection
from mtp_lightning.recipe.schema.root import Recipe


def _turns_pairs(recipe: Recipe) -> bool:
    """Leave heads of an odd width to the rule about these."""
    model = recipe.model
    if model.partial_rotary_factor == 1 or (model.hidden_size % model.num_attention_heads and model.head_dim is None):
        return True
    return model.rotary_width >= 2 and model.rotary_width % 2 == 0


def _slows_a_range(recipe: Recipe) -> bool:
    scaling = recipe.model.rope_scaling
    return scaling is None or scaling.kind != "llama3" or scaling.low_freq_factor < scaling.high_freq_factor


def _turns_fall(recipe: Recipe) -> bool:
    scaling = recipe.model.rope_scaling
    return scaling is None or scaling.kind != "yarn" or scaling.beta_slow < scaling.beta_fast


def _has_a_slower_pair(recipe: Recipe) -> bool:
    """Leave widths that are impossible to the rules about these."""
    model = recipe.model
    if model.rope_scaling is None or model.rope_scaling.kind != "ntk" or model.rotary_width < 2:
        return True
    return model.rotary_width > 2


MOST_BATCH_SIZES = 10_000  # of a ramp, which are walked through to count tokens

MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("model.partial_rotary_factor", "model.head_dim", "model.hidden_size", "model.num_attention_heads"),
        holds=_turns_pairs,
        expected="must leave an even number of channels, 2 or more: rotary positions turn pairs",
        hint=lambda recipe: (
            f"It is {recipe.model.rotary_width} of {recipe.model.resolved_head_dim} channels: change the share, "
            "or the width of a head."
        ),
    ),
    Rule(
        fields=("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor"),
        holds=_slows_a_range,
        expected="must lie below model.rope_scaling.high_freq_factor",
        hint="Take the factors from the model's config.json: low_freq_factor is the smaller one.",
    ),
    Rule(
        fields=("model.rope_scaling.beta_slow", "model.rope_scaling.beta_fast"),
        holds=_turns_fall,
        expected="must lie below model.rope_scaling.beta_fast",
        hint="Take both from the model's config.json, or leave them out: 1 and 32.",
    ),
    Rule(
        fields=("model.rope_scaling.kind", "model.head_dim", "model.hidden_size", "model.num_attention_heads"),
        holds=_has_a_slower_pair,
        expected="must not be ntk where one pair of channels turns: its frequency is 1 whatever the base",
        hint="Choose linear, or wider heads.",
    ),
)


TEMPLATE_EXPECTED = "must name fields in braces"
TEMPLATE_HINT = "Write it so: '# {title}\\n{text}'; {{ and }} stand for braces."
ENCODING_EXPECTED = "must be an encoding of text that Python knows"
ENCODING_HINT = "Give its name: utf-16-le, latin-1, cp1252, shift_jis or gb18030."
_IN_TEMPLATE = re.compile(r"\\n|\\t|\{\{|\}\}|\{[^{}]+\}|[{}]")
_ESCAPES = {"\\n": "\n", "\\t": "\t", "{{": "{", "}}": "}"}


@cache
def template_parts(template: str) -> tuple[tuple[str, str], ...]:
    r"""Split a template into pairs of a text and the field that comes after it, the last one without.

    Doubled braces stand for one, and `\n` and `\t` for a line break and a tab.

    >>> template_parts(r"# {title}\n{a.b} {{x}}")
    (('# ', 'title'), ('\n', 'a.b'), (' {x}', ''))

    Raises:
        ValueError: a brace stands alone.
    """
    parts, text, at = [], "", 0
    for found in _IN_TEMPLATE.finditer(template):
        text, at, mark = text + template[at : found.start()], found.end(), found[0]
        if mark in ("{", "}"):
            raise ValueError(f"a single {mark} at character {found.start() + 1}")
        if mark in _ESCAPES:
            text += _ESCAPES[mark]
        else:
            parts.append((text, mark[1:-1].strip()))
            text = ""
    return (*parts, (text + template[at:], ""))


def is_template(template: str) -> bool:
    """Say whether a text names fields in braces, and has no brace besides."""
    try:
        fields = [field for _, field in template_parts(template)[:-1]]
    except ValueError:
        return False
    return bool(fields) and all(fields)


def is_encoding(name: str) -> bool:
    """Say whether Python knows an encoding of text.

    >>> is_encoding("latin-1"), is_encoding("latin-99"), is_encoding("hex")
    (True, False, False)
    """
    try:
        return "a".encode(name).decode(name) == "a"
    except (LookupError, ValueError, AttributeError):  # codecs that are no encodings of text raise all of them
        return False


def _remote_sources(data: DataSection) -> list[str]:
    names = [*data.mixture, *([data.shards] if data.shards is not None else [])]
    return [name for name in names if is_url(name)]


def _ramp_starts_with_a_divisor(recipe: Recipe) -> bool:
    ramp = recipe.batch.ramp
    return ramp is None or recipe.batch.global_batch_size % ramp.from_batch_size == 0


def _num_sizes(recipe: Recipe) -> int:
    ramp = recipe.batch.ramp
    return recipe.batch.global_batch_size // ramp.from_batch_size if ramp else 1


def _ramp_can_be_shared(recipe: Recipe) -> bool:
    ramp, num_shares = recipe.batch.ramp, recipe.strategy.num_shares
    return ramp is None or ramp.from_batch_size % (num_shares * recipe.batch.micro_batch_size) == 0


def _reads_only_the_stream(recipe: Recipe) -> bool:
    data = recipe.data
    is_default = not data.mixture and data.shards is None and data.packing == "cut" and data.shuffle == "rows"
    is_default = is_default and data.text_field is None and data.template is None and data.on_bad_row == "refuse"
    return data.kind != "webdataset_stream" or is_default


def _schedule_names_sources(recipe: Recipe) -> bool:
    schedule = recipe.data.mixture_schedule
    return schedule is None or (bool(schedule.weights) and schedule.weights.keys() <= recipe.data.mixture.keys())


def _schedule_grows(recipe: Recipe) -> bool:
    schedule = recipe.data.mixture_schedule
    return schedule is None or all(one < other for one, other in itertools.pairwise(schedule.at_rows))


def _schedule_is_full(recipe: Recipe) -> bool:
    schedule = recipe.data.mixture_schedule
    return schedule is None or all(len(own) == len(schedule.at_rows) for own in schedule.weights.values())


def _schedule_always_mixes(recipe: Recipe) -> bool:
    """Check that at each of the rows some source has a weight, and so in between, and each source somewhere."""
    schedule, weights = recipe.data.mixture_schedule, recipe.data.weights_at_rows().values()
    return schedule is None or (all(map(any, zip(*weights, strict=False))) and all(map(any, weights)))


DATA_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("data.mixture_schedule.weights", "data.mixture"),
        holds=_schedule_names_sources,
        expected="must name one or more sources of data.mixture, and no others",
        hint="Spell the sources as in data.mixture, where each has the weight that it would have without a schedule.",
    ),
    Rule(
        fields=("data.mixture_schedule.at_rows",),
        holds=_schedule_grows,
        expected="must grow from each to the next",
        hint="Sort them, with the weights of every source, and name none twice.",
    ),
    Rule(
        fields=("data.mixture_schedule.weights", "data.mixture_schedule.at_rows"),
        holds=_schedule_is_full,
        expected="must have as many weights for each source as there are data.mixture_schedule.at_rows",
        hint="Give every source one weight for each of the rows.",
    ),
    Rule(
        fields=("data.mixture_schedule.weights", "data.mixture"),
        holds=_schedule_always_mixes,
        expected="must have a weight above 0 at each of the rows, and one for each source",
        hint="Raise one of them there, or leave the source out of data.mixture.",
    ),
    Rule(
        fields=("data.template",),
        holds=lambda recipe: recipe.data.template is None or is_template(recipe.data.template),
        expected=TEMPLATE_EXPECTED,
        hint=TEMPLATE_HINT,
    ),
    Rule(
        fields=("data.encoding",),
        holds=lambda recipe: recipe.data.encoding is None or is_encoding(recipe.data.encoding),
        expected=ENCODING_EXPECTED,
        hint=ENCODING_HINT,
    ),
    Rule(
        fields=("data.text_field", "data.template"),
        holds=lambda recipe: recipe.data.text_field is None or recipe.data.template is None,
        expected="must be null beside data.template, which names the fields",
        hint="Keep one of the two.",
    ),
    Rule(
        fields=("data.kind", "data.stream.train"),
        holds=lambda recipe: (recipe.data.kind == "webdataset_stream") == (recipe.data.stream is not None),
        expected="must be webdataset_stream when data.stream is given, and only then",
        hint="Set both, or neither.",
    ),
    Rule(
        fields=(
            *("data.kind", "data.shards", "data.mixture", "data.packing", "data.shuffle"),
            *("data.text_field", "data.template", "data.on_bad_row"),
        ),
        holds=_reads_only_the_stream,
        expected=(
            "must be shards for data.shards, data.mixture, data.packing and data.shuffle, and for data.text_field, "
            "data.template and data.on_bad_row, which a stream lacks"
        ),
        hint="Remove these fields, or build shards of the text with `mtp data build`.",
    ),
    Rule(
        fields=("data.packing", "data.shards", "data.mixture"),
        holds=lambda recipe: recipe.data.packing == "cut" or not _remote_sources(recipe.data),
        expected="must be cut for shards from a URL: the plan of a packing needs every document's length",
        hint="Set data.packing=cut, or copy the shards to a folder.",
    ),
    Rule(
        fields=("batch.ramp.from_batch_size", "batch.global_batch_size"),
        holds=_ramp_starts_with_a_divisor,
        expected="must divide batch.global_batch_size",
        hint=lambda recipe: f"Set batch.ramp.from_batch_size to {divisors(recipe.batch.global_batch_size)}.",
    ),
    Rule(
        fields=("batch.ramp.from_batch_size", "batch.global_batch_size"),
        holds=lambda recipe: recipe.batch.ramp is None or _num_sizes(recipe) <= MOST_BATCH_SIZES,
        expected=f"must be at least 1/{MOST_BATCH_SIZES:,} of batch.global_batch_size",
        hint="Raise batch.ramp.from_batch_size.",
    ),
    Rule(
        fields=(
            "batch.ramp.from_batch_size",
            "strategy.num_nodes",
            "strategy.ranks_per_node",
            "batch.micro_batch_size",
        ),
        holds=_ramp_can_be_shared,
        expected="must be a multiple of the ranks (strategy.num_nodes x ranks_per_node) times batch.micro_batch_size",
        hint="Raise batch.ramp.from_batch_size, lower batch.micro_batch_size, or take fewer ranks.",
    ),
)

"""Settings of a model as transformers writes them: config.json read with care, and the fields that families share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES
from mtp_lightning.checkpoint.format.tensors import Entry
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import LONGEST_VALUE, described
from mtp_lightning.recipe.schema.model import ModelSection

MOST = 2**27  # so that no product of three overflows what torch counts with
MOST_POSITIONS = 2**40
MOST_LAYERS = 4096
LONGEST_NAME = 300
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    *("dim", "n_layers", "n_heads", "n_kv_heads"),  # of Meta's
)
PLAIN_AGAIN = {
    "bitsandbytes": "model = from_pretrained(FOLDER).dequantize()",
    "fp8": "model = from_pretrained(FOLDER, quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "model = from_pretrained(FOLDER, quantization_config=Mxfp4Config(dequantize=True))",
}
"""How transformers makes plain numbers of quantized weights, by method."""
POSITIONS = ("max_position_embeddings", "sliding_window", "max_seq_len")


class UncoveredError(CheckpointError):
    """Possible settings, of a model that the trunks here do not cover."""


@final
class Config:
    """The fields of a config.json; null counts as absent."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def need(self, name: str) -> Any:
        """Return a field.

        Raises:
            CheckpointError: It is not there.
        """
        value = self.values.get(name)
        if value is None:
            raise self.refused(f"{self.path.name} must say {name}", "nothing", "Download the folder again")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or the default where it is absent."""
        value = self.values.get(name)
        return default if value is None else value

    def refused(self, expected: str, found: str, hint: str) -> CheckpointError:
        """Build the error about a field."""
        return CheckpointError(expected, f"{found}, in {self.path}", hint)

    def uncovered(self, expected: str, found: str, hint: str) -> CheckpointError:
        """Build the error about a field that the trunks here cannot do, but another program might."""
        return UncoveredError(expected, f"{found}, in {self.path}", hint)

    def check_is(self, name: str, wanted: Any, default: Any = None) -> None:
        """Check that a field has the one value that the model here can have.

        Raises:
            CheckpointError: It has another.
        """
        if (value := self.get(name, default)) != wanted:
            hint = "Models with another value are not supported: choose another model"
            raise self.uncovered(f"{name} must be {wanted!r}", described(value), hint)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Config":
        """Let fields that are absent (not null) be read as the defaults of a class of transformers."""
        return Config(self.path, {**defaults, **self.values})

    def impossible(self, found: str) -> CheckpointError:
        """Build the error about a field of a wrong type or value."""
        return self.refused("the settings must be possible ones", found, "Download the folder again")

    def whole(self, name: str, default: int | None, *, least: int, most: int) -> int | None:
        """Return a field that is a whole number within bounds.

        Raises:
            CheckpointError: It is something else.
        """
        value = self.get(name, default)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise self.impossible(f"{name}: {described(value)} (a whole number up to {most:,} is meant)")
        return value

    def number(self, name: str, value: Any) -> float:
        """Return what a field says as a floating-point number.

        Raises:
            CheckpointError: It says none.
        """
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.impossible(f"{name}: {described(value)} (a number is meant)") from None


def listed(names: Sequence[str]) -> str:
    """Name some, and say how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    short = (name if len(name) <= LONGEST_NAME else described(name) for name in names[:MOST_NAMES])
    return (", ".join(short) or "none") + more


def named(value: object) -> str:
    """Show a value as it is if it is a short text, else in a few words."""
    return value if isinstance(value, str) and len(value) <= LONGEST_VALUE else described(value)


@contextmanager
def possible_settings(config: Config) -> Iterator[None]:
    """Turn what settings of a wrong type or value bring about into an error about the file."""
    try:
        yield
        return
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {described(first['input'])} ({first['msg']})"
    except KeyError as error:
        found = f"no {error.args[0]} beside the others that belong to it"
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        found = named(str(error))
    raise config.impossible(found)


def shared_fields(config: Config) -> dict[str, Any]:
    """Read what every family says in the same words into fields of the model section."""
    check_attends_to_all(config)
    heads, width = config.need("num_attention_heads"), config.need("hidden_size")
    head_dim = config.get("head_dim")
    return {
        "hidden_size": width,
        "num_hidden_layers": config.need("num_hidden_layers"),
        "num_attention_heads": heads,
        "head_dim": None if head_dim is None or head_dim * heads == width else head_dim,
        "intermediate_size": config.need("intermediate_size"),
        "vocab_size": config.need("vocab_size"),
        "max_position_embeddings": config.need("max_position_embeddings"),
        "tie_word_embeddings": config.get("tie_word_embeddings", default=False),
        "initializer_range": config.get("initializer_range") or ModelSection().initializer_range,
    }


def written_shared(section: ModelSection) -> dict[str, Any]:
    """Write what every family says in the same words; transformers 4 and 5 and vLLM read it."""
    return {
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.num_hidden_layers,
        "num_attention_heads": section.num_attention_heads,
        "intermediate_size": section.resolved_intermediate_size,
        "vocab_size": section.vocab_size,
        "max_position_embeddings": section.max_position_embeddings,
        "tie_word_embeddings": section.tie_word_embeddings,
        "initializer_range": section.initializer_range,
        "use_cache": True,
    }


def check_attends_to_all(config: Config) -> None:
    """Check that no layer attends to less than the whole window.

    Raises:
        CheckpointError: A sliding window is shorter than the positions, or a layer is of another type.
    """
    positions = config.need("max_position_embeddings")
    window = config.get("sliding_window") if config.get("use_sliding_window", default=True) else None
    if window is not None and window < positions and _has_sliding_layers(config):
        raise config.uncovered(
            "every layer must attend to all positions",
            f"a sliding_window of {window} for {positions} positions",
            "Set sliding_window to null in config.json if no longer text than the window is to be read, "
            "and max_position_embeddings to the window; else choose a model without one",
        )
    told = config.get("layer_types", default=[])
    kinds = sorted({named(kind) for kind in told} - {"full_attention", "sliding_attention"})
    if kinds:
        hint = "Choose a model whose layers are ordinary attention"
        raise config.uncovered("every layer must be of type full_attention", listed(kinds), hint)


def _has_sliding_layers(config: Config) -> bool:
    """Tell whether a window is used at all: by Qwen's models only in some layers, perhaps in none."""
    first = config.whole("max_window_layers", None, least=0, most=MOST)
    if first is None:
        return True
    told = config.get("layer_types")
    return "sliding_attention" in told if told else bool(first < config.need("num_hidden_layers"))


def rotary_fields(config: Config, *, theta: str = "rope_theta", share: str = "partial_rotary_factor") -> dict[str, Any]:
    """Read the rotary positions, from `rope_scaling` (before transformers 5) or else from `rope_parameters`.

    Args:
        config: the settings.
        theta: name of the base of the frequencies where these do not say it.
        share: name of the share of channels that are turned, likewise.

    Raises:
        CheckpointError: They are scaled in a way that is not known here.
    """
    told = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(told, dict):
        raise config.impossible(f"rope_parameters or rope_scaling: {described(told)}")
    return {
        "rope_theta": config.number("rope_theta", told.get("rope_theta") or config.get(theta, default=10000.0)),
        "partial_rotary_factor": config.number(share, told.get("partial_rotary_factor") or config.get(share, 1.0)),
        "rope_scaling": _scaling(config, told),
    }


def _scaling(config: Config, told: dict[str, Any]) -> dict[str, Any] | None:
    kind = told.get("rope_type") or told.get("type") or "default"
    if kind == "default" and not any(isinstance(value, dict) for value in told.values()):
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": config.number("factor", told["factor"])}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        numbers = {name: config.number(name, told[name]) for name in names}
        name = "original_max_position_embeddings"
        positions = config.get(name) or told.get(name) or config.need("max_position_embeddings")
        return {"kind": kind, **numbers, "original_positions": positions}
    if kind == "dynamic" and told.keys() <= {"factor", *OF_ROTARY}:
        return {"kind": kind, "factor": config.number("factor", told["factor"])}
    name, is_yarn = "original_max_position_embeddings", kind == "yarn" and told.keys() <= {*YARN, *OF_ROTARY}
    if is_yarn and told.get(name) and config.get(name) is None:
        numbers = {ours: config.number(key, told[key]) for key, ours in YARN.items() if told.get(key) is not None}
        return {"kind": kind, **numbers, "original_positions": told[name]}
    raise config.uncovered(
        "rotary positions must be plain, or scaled by linear, dynamic or llama3, or by yarn from a window of training",
        "another scaling for each type of layer" if kind == "default" else named(kind),
        "Choose a model with one of these; a model that was scaled afterwards (longrope) is the plain one without that "
        "entry, for texts as long as it was first trained on",
    )


OF_ROTARY = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
YARN = {
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "original_max_position_embeddings": "original_positions",
}
"""Settings of YaRN that trunks here know, and their names in a recipe."""


def written_rotary(section: ModelSection) -> dict[str, Any]:
    """Write the rotary positions in the keys before transformers 5, which all readers know."""
    scaling = section.rope_scaling
    if scaling is None or scaling.kind == "ntk":
        return {"rope_theta": section.resolved_rope_theta, "rope_scaling": None}
    told: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        told |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    if scaling.kind == "yarn":
        told |= {name: getattr(scaling, ours) for name, ours in YARN.items() if getattr(scaling, ours) is not None}
    return {"rope_theta": section.rope_theta, "rope_scaling": told}


def check_numbers(config: Config) -> None:
    """Check that sizes are whole numbers, before anything is computed from them.

    Raises:
        CheckpointError: One is something else, or larger than any model's.
    """
    for names, most in ((SIZES, MOST), (POSITIONS, MOST_POSITIONS)):
        for name in names:
            value = config.get(name) if name == "intermediate_size" else None
            if isinstance(value, list) and value and all(type(one) is int and abs(one) <= most for one in value):
                continue  # one for each layer, as Gemma 3n has it
            config.whole(name, None, least=-most, most=most)  # the model section knows what is too small


def check_plain_numbers(config: Config) -> None:
    """Check that weights are not quantized.

    Raises:
        CheckpointError: They are.
    """
    quantization = config.get("quantization_config", config.get("quantization"))
    if quantization is None:
        return
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
    raise config.refused(
        "weights must be plain fp32, bf16 or fp16 numbers",
        f"weights quantized by the method {named(method)}",
        "Take the model's release without quantization"
        + (f", or write one: {PLAIN_AGAIN[method]}; model.save_pretrained(OUT)" if str(method) in PLAIN_AGAIN else ""),
    )


def check_held(config: Config, section: ModelSection, num_extra: int, entries: Mapping[str, Entry]) -> None:
    """Check sizes against the headers of the files, before anything of these sizes is made.

    Every layer and module has at least one tensor, and no side of a tensor is longer than all of them together. Which
    tensor has another shape or is missing is found out later: some may be missing on purpose.

    Args:
        config: the settings, for the error.
        section: what they say.
        num_extra: number of modules or heads beside the main one.
        entries: all stored tensors.

    Raises:
        CheckpointError: The files cannot hold what the settings speak of.
    """
    num_values = sum(math.prod(entry.shape) for entry in entries.values())
    most_layers = min(len(entries), MOST_LAYERS)
    sizes = {
        "layers": (section.num_hidden_layers + num_extra, most_layers),
        "channels of a hidden state": (section.hidden_size, num_values),
        "tokens in the vocabulary": (section.vocab_size, num_values),
        "channels inside a feed-forward": (section.resolved_intermediate_size, num_values),
        "channels of all query heads": (section.num_attention_heads * section.resolved_head_dim, num_values),
        "channels of all key heads": (section.resolved_key_value_heads * section.resolved_head_dim, num_values),
    }
    for what, (size, most) in sizes.items():
        if size > min(most, MOST):
            raise config.refused(
                "the settings must ask for no more than the weights hold",
                f"{size:,} {what} beside {len(entries):,} tensors of {num_values:,} values together",
                "Take settings and weights from the same model",
            )

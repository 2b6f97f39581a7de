"""Sizes that a folder's settings speak of: whole numbers, and none that its files cannot hold."""

import math
from collections.abc import Mapping

from mtp_lightning.checkpoint.format.tensors import Entry
from mtp_lightning.checkpoint.huggingface.configs import Config
from mtp_lightning.recipe.schema.model import ModelSection

MOST = 2**27  # so that no product of three overflows what torch counts with
MOST_POSITIONS = 2**40
MOST_LAYERS = 4096
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
POSITIONS = ("max_position_embeddings", "sliding_window", "max_seq_len")


def check_numbers(config: Config) -> None:
    """Check that sizes are whole numbers, before anything is computed from them.

    Raises:
        CheckpointError: One is something else, or larger than any model's.
    """
    for names, most in ((SIZES, MOST), (POSITIONS, MOST_POSITIONS)):
        for name in names:
            config.whole(name, None, least=-most, most=most)  # the model section knows what is too small


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

"""Head kinds: how the hidden state of every offset is computed.

To add a kind: write a final subclass of `Heads` in a file of its own (`forward`, `modules_of`), give it a row in
`KINDS`, and add its name to `heads.kind` in `recipe/sections.py`, to `recipe/head_tree.py` (which state an offset
reads) and, if its layers are taken from the trunk, to `recipe/layers.py`. Backward orders, checks, benchmarks and the
laws run on it unchanged.
"""

from collections.abc import Callable

from mtp_lightning.model.heads.base import HeadContext, Heads
from mtp_lightning.model.heads.chained import ChainedHeads
from mtp_lightning.model.heads.linear import LinearHeads
from mtp_lightning.model.heads.medusa import MedusaHeads
from mtp_lightning.model.heads.parallel import ParallelHeads
from mtp_lightning.model.heads.recursive import RecursiveHeads
from mtp_lightning.model.heads.sequential import SequentialHeads
from mtp_lightning.recipe.layer_counts import TRUNK

KINDS: dict[str, Callable[..., Heads]] = {
    "parallel": ParallelHeads,
    "linear": LinearHeads,
    "chained": ChainedHeads,
    "sequential": SequentialHeads,
    "recursive": RecursiveHeads,
    "medusa": MedusaHeads,
}

__all__ = ["KINDS", "TRUNK", "HeadContext", "Heads"]

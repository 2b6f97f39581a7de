"""Self-speculative generation: the heads draft, one forward of the trunk verifies, the text stays the model's own.

`generate` runs a batch of ragged prompts to the end, `stream` yields a step per forward. A text's cache is a slot per
position (`cache`); a step drafts (`drafting`), verifies (`session`), accepts (`accepting`, `tree`) and cuts the text
where it ends (`stopping`). A head kind needs nothing of its own here: whom an offset reads, and whether it reads
tokens, decides how it drafts (`settings.applicable_decoders`).
"""

from mtp_lightning.decode.generation import Generation, generate, stream
from mtp_lightning.decode.settings import Settings, applicable_decoders
from mtp_lightning.decode.statistics import Statistics
from mtp_lightning.decode.steps import Step
from mtp_lightning.decode.tree import Tree, build_tree

__all__ = [
    "Generation",
    "Settings",
    "Statistics",
    "Step",
    "Tree",
    "applicable_decoders",
    "build_tree",
    "generate",
    "stream",
]

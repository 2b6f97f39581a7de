"""What must hold of a draft vocabulary."""

from mtp_lightning.recipe.draft_vocabulary import draft_vocab_size, unpacked_ids
from mtp_lightning.recipe.rules.base import Rule
from mtp_lightning.recipe.schema.root import Recipe


def _ids_fit(recipe: Recipe) -> bool:
    """Check ids that are there: a set of bits, of as many as are asked for, all of them in the model's vocabulary."""
    heads = recipe.heads
    if heads.draft_token_ids is None:
        return True
    try:
        ids = unpacked_ids(heads.draft_token_ids)
    except ValueError:
        return False
    wanted = heads.draft_vocabulary
    return bool(ids) and ids[-1] < recipe.model.vocab_size and (not isinstance(wanted, int) or len(ids) == wanted)


DRAFT_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("heads.draft_vocabulary", "model.vocab_size"),
        holds=lambda recipe: (
            not isinstance(recipe.heads.draft_vocabulary, int)
            or recipe.heads.draft_vocabulary <= recipe.model.vocab_size
        ),
        expected="must not exceed model.vocab_size, of which it is a part",
        hint="Lower heads.draft_vocabulary, or set it to null for the whole vocabulary.",
    ),
    Rule(
        fields=("heads.draft_vocabulary", "heads.num_offsets"),
        holds=lambda recipe: recipe.heads.draft_vocabulary is None or recipe.heads.num_offsets > 1,
        expected="must be null with one offset, which drafts nothing",
        hint="Raise heads.num_offsets, or set heads.draft_vocabulary=null.",
    ),
    Rule(
        fields=("heads.draft_vocabulary", "data.kind"),
        holds=lambda recipe: (
            not isinstance(recipe.heads.draft_vocabulary, int)
            or recipe.heads.draft_token_ids is not None
            or recipe.data.stream is None
        ),
        expected="must be a file of ids where the data are a stream, whose tokens nobody has counted",
        hint="Give a file of ids, or train on shards.",
    ),
    Rule(
        fields=("heads.draft_token_ids", "heads.draft_vocabulary", "model.vocab_size"),
        holds=_ids_fit,
        expected="must be the set of ids that a run has written, as many as heads.draft_vocabulary says, each below "
        "model.vocab_size",
        hint="Remove heads.draft_token_ids, and a run chooses them again.",
    ),
    Rule(
        fields=("heads.draft_token_ids", "heads.draft_vocabulary"),
        holds=lambda recipe: recipe.heads.draft_token_ids is None or recipe.heads.draft_vocabulary is not None,
        expected="must be null where heads.draft_vocabulary is null, which means the whole vocabulary",
        hint="Give heads.draft_vocabulary, or remove heads.draft_token_ids.",
    ),
    Rule(
        fields=("objective.distill.top_k", "heads.draft_vocabulary"),
        holds=lambda recipe: (
            recipe.objective.distill is None
            or recipe.heads.draft_vocabulary is None
            or not recipe.objective.distill.exceeds(draft_vocab_size(recipe))
        ),
        expected="must not exceed heads.draft_vocabulary, beyond which nothing is compared",
        hint="Lower objective.distill.top_k, or set it to all, or to null for 10,000 at most.",
    ),
)

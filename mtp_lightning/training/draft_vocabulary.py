"""The draft vocabulary of a run: chosen when it begins, kept for as long as its weights are trained."""

from pathlib import Path

from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.draft_ids import choose_draft_ids
from mtp_lightning.errors import MtpError
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.draft_vocabulary import digest_of, unpacked_ids, with_draft_ids


def with_draft_vocabulary(recipe: Recipe, run_recipe: Path | None = None) -> Recipe:
    """Write the ids of a recipe's draft vocabulary into it; as it is where it has none, or has them already.

    They are those that the run began with (`run_recipe`, where it has a checkpoint), else those that the heads of
    `init.path` were trained on, if it was as many, else chosen anew. Other data change nothing in the first two.

    Raises:
        DataError: They cannot be chosen.
    """
    wanted = recipe.heads.draft_vocabulary
    if wanted is None or recipe.heads.draft_token_ids is not None:
        return recipe
    before = load_recipe(run_recipe).recipe if run_recipe is not None and run_recipe.exists() else None
    if before is not None:  # another number than before is refused when the two recipes are compared
        kept = before.heads.draft_token_ids
        return recipe if kept is None else with_draft_ids(recipe, unpacked_ids(kept))
    if isinstance(wanted, int) and (ids := _trained_ids(recipe)) is not None and len(ids) == wanted:
        say(f"draft vocabulary: the {wanted:,} ids of {recipe.init.path} (sha256 {digest_of(ids)[:12]})", stderr=True)
        return with_draft_ids(recipe, ids)
    return with_draft_ids(recipe, choose_draft_ids(recipe))


def _trained_ids(recipe: Recipe) -> tuple[int, ...] | None:
    """Return the ids that the model of `init.path` drafts; what is wrong with that folder is said when it is loaded."""
    if recipe.init.path is None:
        return None
    try:
        heads = open_checkpoint(Path(recipe.init.path), verify=False).recipe.heads
    except (MtpError, OSError):
        return None
    return unpacked_ids(heads.draft_token_ids) if heads.draft_token_ids else None

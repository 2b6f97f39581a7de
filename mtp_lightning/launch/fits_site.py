"""Whether a recipe can run at a site at all: ranks on GPUs, memory, folders."""

import os
from pathlib import Path

from mtp_lightning.errors import LaunchError
from mtp_lightning.launch.site import Site
from mtp_lightning.recipe.schema.root import Recipe

GIB = 2**30


def check_fits_site(recipe: Recipe, site: Site, *, force: bool = False) -> None:
    """Refuse what the job would be refused for, or would burn its allocation on.

    Raises:
        LaunchError: says what does not fit and what would.
    """
    _check_ranks(recipe, site)
    _check_folder(recipe, site)
    if not force:
        _check_memory(recipe, site)


def _check_ranks(recipe: Recipe, site: Site) -> None:
    ranks, gpus, total = recipe.strategy.ranks_per_node, site.gpus_per_node, recipe.strategy.num_ranks
    if gpus and gpus % ranks:
        nodes, rest = divmod(total, gpus)
        hint = f"Set strategy.num_nodes={nodes} strategy.ranks_per_node={gpus}"
        raise LaunchError(
            f"the {gpus} GPUs of a node must be a multiple of strategy.ranks_per_node",
            str(ranks),
            hint if nodes and not rest else f"Choose a number of ranks that is a multiple of {gpus}, or divides it",
        )


def _check_folder(recipe: Recipe, site: Site) -> None:
    folder = Path(recipe.run.dir).absolute()
    own = [local for local in site.node_local if folder.is_relative_to(local)]
    if own and recipe.strategy.num_nodes > 1:
        raise LaunchError(
            f"run.dir of a run on {recipe.strategy.num_nodes} nodes must be on a file system that they share",
            f"{folder}, beneath {own[0]}, which every node has its own of",
            "Give another run.dir, or correct node_local of the site",
        )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "read-only" if existing.is_dir() else "a file"
        raise LaunchError("run.dir must be a folder that can be written to", f"{existing}, {what}", "Give another")
    if recipe.run.restart:
        raise LaunchError(
            "a submitted run must be able to go on when it is requeued",
            "run.restart=true, which would start it over each time",
            "Give another run.dir, or move the earlier run aside",
        )


def _check_memory(recipe: Recipe, site: Site) -> None:
    if site.gpu is None:
        return
    from mtp_lightning.planner.hardware import hardware
    from mtp_lightning.planner.layout import layout_of
    from mtp_lightning.planner.report import build_variant
    from mtp_lightning.planner.shape import shape_of

    device = hardware(site.gpu)
    variant = build_variant(recipe, shape_of(recipe), layout_of(recipe), device)
    if not variant.fits:
        micro_batch_size = variant.most_micro_rows
        raise LaunchError(
            f"the recipe must fit into the {device.memory_bytes / GIB:.0f} GiB of an {device.name}",
            f"{variant.memory.total / GIB:.1f} GiB by `mtp plan`",
            f"Set batch.micro_batch_size={micro_batch_size}"
            if micro_batch_size
            else "Use more GPUs, a later ZeRO stage or memory.recompute_trunk=true; --force submits all the same",
        )

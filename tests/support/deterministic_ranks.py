"""Train as one rank, and write which kernels torch was to take in each step and after: recipe, folder, overrides."""

import json
import os
import sys
from pathlib import Path

import torch

from mtp_lightning.recipe import load_recipe
from mtp_lightning.training import lightning_module
from mtp_lightning.training.fit import train


def in_force():
    """Flags that a deterministic run sets, and the variable that cuBLAS reads."""
    cudnn = torch.backends.cudnn
    flags = [torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, not cudnn.benchmark]
    return [*flags, os.environ.get("CUBLAS_WORKSPACE_CONFIG")]


def main(path, folder, *overrides):
    """Watch the batches come."""
    seen, prepare = [], lightning_module.prepare_batch

    def watched(*arguments, **keywords):
        seen.append(in_force())
        return prepare(*arguments, **keywords)

    lightning_module.prepare_batch = watched
    assert train(load_recipe(Path(path), [*overrides])) == 0
    facts = {"steps": seen, "after": in_force()}
    Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])

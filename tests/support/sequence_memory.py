"""A rank that runs one step and prints the most bytes of tensors alive in it, beside the weights.

Arguments: over how many ranks windows are cut, and their length.
"""

import sys

import torch
import torch.distributed as dist

from mtp_lightning.losses.targets import count_targets, shifted_targets
from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.model.sequence_parallel import slice_of_this_rank
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import prepare_batch
from mtp_lightning.training.step.objective import Objective
from tests.support.live_tensors import LiveTensors


def recipe_of(seq_len):
    return Recipe.model_validate(
        {
            "model": {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 128}
            | {"num_key_value_heads": 4, "vocab_size": 256, "max_position_embeddings": seq_len},
            "heads": {"kind": "sequential", "num_offsets": 3},
            "objective": {"chunk_mib": 0.25},
            "data": {"seq_len": seq_len},
            "batch": {"global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def main(num_slices, seq_len):
    dist.init_process_group("gloo")
    recipe, sequence, ranks = recipe_of(int(seq_len)), slice_of_this_rank(int(num_slices)), Ranks()
    model, generator = build_model(recipe), torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (1, recipe.data.seq_len + 3), generator=generator)
    documents = torch.zeros_like(tokens)
    prepared = prepare_batch({"tokens": tokens, "documents": documents}, recipe, 0, sequence)
    counts = count_targets(shifted_targets(tokens, documents, 3))
    objective = Objective(recipe.objective, [1.0, 0.5, 0.5], counts)
    with LiveTensors(known=[*model.parameters(), *prepared.micro_batches[0][:3]]) as seen:
        accumulate_gradients(model, prepared.micro_batches[0], objective, torch.Tensor.backward)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    peaks = ranks.gather(seen.peak_bytes - gradients)
    if ranks.is_first:
        print(max(peaks))
    ranks.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()

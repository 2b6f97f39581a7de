"""Import and export of a model that is large against what they may hold at once."""

import ctypes
import json
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from tests.checkpoint.foreign import llama_tensors, write_folder
from tests.checkpoint.savers import forkserver

WIDTH, LAYERS = 1024, 4
LARGEST_MIB = 4 * WIDTH * WIDTH * 4 / 2**20
SETTINGS = {
    "model_type": "gpt_neox",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "intermediate_size": 4 * WIDTH,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rotary_pct": 0.25,
}


def write_neox(folder: Path) -> int:
    """Write a random model whose layers take most of the room; return its bytes."""
    shapes = {"gpt_neox.embed_in.weight": (64, WIDTH), "embed_out.weight": (64, WIDTH)}
    shapes |= {f"gpt_neox.final_layer_norm.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    for layer in (f"gpt_neox.layers.{number}" for number in range(LAYERS)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{name}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
        matrices = {
            "attention.query_key_value": (3 * WIDTH, WIDTH),
            "attention.dense": (WIDTH, WIDTH),
            "mlp.dense_h_to_4h": (4 * WIDTH, WIDTH),
            "mlp.dense_4h_to_h": (WIDTH, 4 * WIDTH),
        }
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in matrices.items()}
    tensors = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


M_MMAP_THRESHOLD = -3  # of <malloc.h>


def _report_growth(pipe: Connection, folder: Path) -> None:
    torch.set_num_threads(1)
    # Blocks that are freed go back to the system at once: else the peak counts the heap's holes, 25 MiB more or less
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    import_folder(folder / "small", folder / "warm", Wanted())
    export_model(folder / "warm", folder / "warm_back")
    growths, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import_folder(folder / "hf", folder / "ours", Wanted())
    growths.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    export_model(folder / "ours", folder / "back")
    growths.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    pipe.send([growth / 1024 for growth in growths])


def growths_mib(folder: Path) -> list[float]:
    """Import and export a folder's `hf` in a process of its own; return how much more memory that took."""
    write_folder(folder / "small")
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_growth, args=(sender, folder))
    process.start()
    sender.close()
    assert receiver.poll(120)
    growths: list[float] = receiver.recv()
    process.join()
    ours, theirs = (safetensors.torch.load_file(folder / name / "model.safetensors") for name in ("back", "hf"))
    assert ours.keys() == theirs.keys()
    return growths


@pytest.mark.slow
def test_memory_holds_a_few_tensors_not_the_model(tmp_path: Path) -> None:
    assert write_neox(tmp_path / "hf") > 200e6
    assert max(growths_mib(tmp_path)) < 5 * LARGEST_MIB, "12 MiB is the largest tensor taken apart, 193 the model"


@pytest.mark.slow
def test_a_large_tensor_is_read_in_blocks(tmp_path: Path) -> None:
    large = torch.zeros(200 * 2**20 // 64, 16)
    tensors = llama_tensors() | {"model.embed_tokens.weight": large}
    del tensors["lm_head.weight"]
    write_folder(tmp_path / "hf", tensors, vocab_size=len(large), tie_word_embeddings=True)
    assert max(growths_mib(tmp_path)) < 32, "blocks are 4 MiB, the tensor is 200"

"""A GPU and its node, measured in minutes: `mtp doctor --gpu`.

Every part runs in a process of its own, so that what stops one, and what one holds, does not reach the others:

    device       names and versions; rates of plain products and copies, cost of a launch and of a wait
    strategies   gradients of ZeRO stages and backward orders against plain torch, on one GPU and on two (`parity.py`)
    training     step time, MFU and peak memory of the largest shape that fits, n = 1 and 4, beside `mtp plan`; launches
                 and host waits of one step
    decoding     plain greedy and drafting, batch 1, of the same shape with random weights
    compiled     the same with compiled steps, on a GPU replayed as a graph; are the texts those of eager steps?

The figures go into one file of JSON, to be compared or sent.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from mtp_lightning.bench.decoding.rounds import time_variants
from mtp_lightning.bench.machine import describe_machine
from mtp_lightning.bench.training.cells import build_cells
from mtp_lightning.bench.training.rounds import Timings, time_rounds
from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.decode import Settings, generate
from mtp_lightning.diagnostics.parity import compare_strategies
from mtp_lightning.diagnostics.parity_matrix import sample
from mtp_lightning.errors import TrainingError
from mtp_lightning.launch.local import run_to_end
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.planner.flops import flops_per_step, tokens_per_step
from mtp_lightning.planner.hardware import hardware, known_hardware, peak_flops_per_s
from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.planner.throughput import step_time
from mtp_lightning.recipe.schema.root import Recipe

PART_LIMIT_S = 240.0
ROUNDS = 3
REPEATS = 20
NUM_LAUNCHES = 1_000
NEW_TOKENS = 48
OFFSETS = [1, 4]
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
WIDTHS = {"1.3B": (2048, 24, 5632, 4), "0.3B": (1024, 18, 2816, 8), "tiny": (256, 8, 704, 2)}  # rows last


def shape_named(name: str) -> Recipe:
    """Return the recipe of one of `WIDTHS`: 4 offsets in bf16 on one device, a step of one micro-batch."""
    width, layers, ffn, rows = WIDTHS[name]
    return Recipe.model_validate(
        {
            "name": name,
            "model": {
                "hidden_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": width // 64 if width < 2048 else 16,
                "intermediate_size": ffn,
                "vocab_size": 32_000,
                "max_position_embeddings": 4096,
            },
            "heads": {"num_offsets": 4},
            "data": {"seq_len": 4096},
            "batch": {"global_batch_size": rows, "micro_batch_size": rows},
            "run": {"precision": "bf16"},
        }
    )


def largest_shape(limit_bytes: float) -> Recipe:
    """Return the largest shape whose step fits, by the planner's count.

    >>> largest_shape(80 * 2**30).name, largest_shape(24 * 2**30).name
    ('1.3B', 'tiny')
    """
    for name in WIDTHS:
        recipe = shape_named(name)
        if planned_bytes(recipe) <= limit_bytes:
            return recipe
    return recipe


def planned_bytes(recipe: Recipe) -> float:
    """Peak of a step, as `mtp plan` counts it."""
    return memory(shape_of(recipe), layout_of(recipe)).total


def examine(on_part: Callable[[str], None], *, limit_s: float = PART_LIMIT_S) -> dict[str, Any]:
    """Run all parts; a part that fails, or takes longer than `limit_s`, is figures less and a reason more.

    Raises:
        TrainingError: There is no GPU that torch can use.
    """
    if not torch.cuda.is_available():
        raise TrainingError(
            "mtp doctor --gpu needs a CUDA device and a torch that can use it",
            f"none (torch {torch.__version__})",
            "Run it on a node that has one (srun --gpus=1 mtp doctor --gpu), or see `mtp doctor`.",
        )
    report: dict[str, Any] = {}
    for name in PARTS:
        on_part(name)
        report[name] = run_part(name, "cuda", limit_s)
    return report


def run_part(name: str, device: str, limit_s: float) -> dict[str, Any]:
    """Run a part in a fresh process; return its figures with its seconds, or its `failure`."""
    began_at = time.monotonic()
    command = [sys.executable, "-m", "mtp_lightning.bench.gpu", name, device]
    try:
        done = run_to_end(command, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {limit_s:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failure": f"exit code {done.returncode}: {last}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures | {"seconds": round(time.monotonic() - began_at, 1)}


def measure_device(device: torch.device) -> dict[str, Any]:
    """Versions, and what the device does at best with plain torch."""
    figures: dict[str, Any] = asdict(describe_machine(device)) | {"cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        figures |= {
            "gpus": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
            "data_sheet_bf16_flops_per_s": peak_flops_per_s(figures["name"], "bf16"),
        }
    width = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(width, width, dtype=torch.bfloat16, device=device)
    other, one = torch.empty_like(matrix), torch.ones(1, device=device)
    figures["bf16_flops_per_s"] = 2 * width**3 / _seconds(device, lambda: torch.mm(matrix, matrix, out=other))
    figures["copied_bytes_per_s"] = 2 * matrix.nbytes / _seconds(device, lambda: other.copy_(matrix))

    def launch() -> None:
        for _ in range(NUM_LAUNCHES):
            one.add_(1)

    figures["launch_s"] = _seconds(device, launch) / NUM_LAUNCHES
    figures["wait_s"] = _seconds(device, lambda: one.item())
    names = ("PYTORCH_CUDA_ALLOC_CONF", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES")
    return figures | {"environment": {name: os.environ.get(name) for name in names}}


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Median time of some work, the device's included."""
    taken = []
    for _ in range(REPEATS):
        began_at = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began_at)
    return median(taken)


def measure_strategies(device: torch.device) -> dict[str, Any]:
    """Worst errors of the cells of `mtp doctor --strategies` on as many of the devices as there are."""
    most = torch.cuda.device_count() if device.type == "cuda" else 1
    outcomes = compare_strategies([replace(cell, device=device.type) for cell in sample() if cell.ranks <= most])
    bad = [f"{outcome.cell}: {outcome.failure or outcome.worst}" for outcome in outcomes if not outcome.is_good]
    worst = max((outcome.error for outcome in outcomes if not outcome.failure), default=None)
    return {"cells": len(outcomes), "worst_error": worst, "not_equal": bad}


def measure_training(device: torch.device) -> dict[str, Any]:
    """Step time, share of the peak, and memory of the largest shape for n = 1 and 4, beside the planner's figures."""
    recipe = _fitting(device)
    cells = [cell for cell in build_cells(recipe, OFFSETS, ["sequential"]) if cell.obstacle is None]
    timings = time_rounds(cells, device, ROUNDS)
    figures = [_figure(cell.recipe, timings, cell.key, device) for cell in cells]
    return {"shape": recipe.name, "figures": figures} | count_launches(recipe, device)


def _figure(recipe: Recipe, timings: Timings, key: Any, device: torch.device) -> dict[str, Any]:
    step_s, name = median(timings.step_s[key]), describe_machine(device).name
    peak = peak_flops_per_s(name, "bf16")
    known = next((known for known in known_hardware() if known.partition("-")[0] in name), None)
    planned_s = known and step_time(shape_of(recipe), layout_of(recipe), hardware(known)).total_s
    return {
        "num_offsets": recipe.heads.num_offsets,
        "step_s": step_s,
        "planned_step_s": planned_s,
        "tokens_per_s": tokens_per_step(recipe) / step_s,
        "mfu": peak and flops_per_step(recipe) / step_s / peak,
        "peak_bytes": timings.peak_bytes.get(key),
        "planned_peak_bytes": planned_bytes(recipe),
    }


def count_launches(recipe: Recipe, device: torch.device) -> dict[str, int]:
    """Kernels that a plain step launches, and times that the host waits for the device in it, by torch's profiler."""
    step = TrainingStep(recipe, device)
    step.run("sequential", predicts=False)
    with torch.profiler.profile() as profile:
        step.run("sequential", predicts=False)
    counts = {event.key: event.count for event in profile.key_averages()}
    return {
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
        "host_waits": sum(counts.get(name, 0) for name in WAITS),
    }


def measure_decoding(device: torch.device) -> dict[str, Any]:
    """Tokens per second of plain greedy, and of drafting when nothing and when everything is accepted; batch 1."""
    recipe, model, prompt = _decodable(device)
    timings = time_variants(model, [prompt], None, [1], new_tokens=NEW_TOKENS, rounds=ROUNDS)
    read_bytes = sum(parameter.nbytes for parameter in model.parameters()) - model.trunk.embed_tokens.weight.nbytes
    ways = [
        {
            "decoder": variant.decoder,
            "draft_length": variant.draft_length,
            "all_accepted": variant.is_ceiling,
            "tokens_per_s": (taken.statistics.num_emitted_tokens - 1) / median(taken.decode_s),
        }
        for (_, variant), taken in timings.items()
    ]
    return {"shape": recipe.name, "weight_bytes": read_bytes, "ways": ways}


def measure_compiled(device: torch.device) -> dict[str, Any]:
    """Tokens per second of plain greedy and of the longest drafts, eager and compiled; batch 1.

    All drafts but chance ones are refused: the weights are random.
    """
    recipe, model, prompt = _decodable(device)
    ways = []
    for settings in (
        Settings(decoder="greedy", max_new_tokens=NEW_TOKENS),
        Settings(decoder="blockwise", draft_length=model.num_offsets - 1, max_new_tokens=NEW_TOKENS),
    ):
        texts = []
        for chosen in (settings, replace(settings, compile=True)):
            began_at = time.perf_counter()
            generate(model, [prompt], chosen)
            first_s = time.perf_counter() - began_at
            made = [generate(model, [prompt], chosen) for _ in range(ROUNDS)]
            texts.append(made[-1].tokens)
            ways.append(
                {
                    "decoder": chosen.decoder,
                    "draft_length": chosen.draft_length,
                    "compiled": chosen.compile,
                    "first_s": first_s,
                    "tokens_per_s": (NEW_TOKENS - 1) / median(own.decode_s for own in made),
                    "same_text": texts[-1] == texts[0],
                }
            )
    return {"shape": recipe.name, "ways": ways}


def _decodable(device: torch.device) -> tuple[Recipe, MtpModel, list[int]]:
    """Return the largest shape that fits, a model of it with random weights, in bf16 on a GPU, and a prompt."""
    recipe = _fitting(device)
    model = build_model(recipe, device).eval()
    model = model.to(torch.bfloat16) if device.type == "cuda" else model
    prompt = torch.randint(recipe.model.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    return recipe, model, prompt


def _fitting(device: torch.device) -> Recipe:
    if device.type == "cpu":
        return shape_of_cpu()
    return largest_shape(0.95 * torch.cuda.get_device_properties(device).total_memory)


def shape_of_cpu() -> Recipe:
    """Return a shape that a CPU can try all of this with."""
    model = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 48}
    return Recipe.model_validate({"name": "cpu", "model": model, "heads": {"num_offsets": 4}, "data": {"seq_len": 128}})


PARTS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "device": measure_device,
    "strategies": measure_strategies,
    "training": measure_training,
    "decoding": measure_decoding,
    "compiled": measure_compiled,
}


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](torch.device(sys.argv[2]))))

"""A step of a decoder in the middle of a text, on a device that is not there."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_lightning.decode import generation, static
from mtp_lightning.decode.settings import Settings
from mtp_lightning.decode.state import DecodeState
from mtp_lightning.decode.tree import Tree
from mtp_lightning.recipe import Recipe
from tests.support.fake_cuda.fits import on_device
from tests.support.fake_cuda.ledger import Ledger
from tests.support.fake_cuda.patches import Nothing, operators, torch_cuda

GENERATOR, NOTE = torch.Generator, DecodeState.note_progress
NUM_PROMPT_TOKENS = 64
TREE = Tree(parents=(0, 0, 1), ranks=(0, 1, 0))


def run_decoding(guard: ctypes.CDLL, recipe: Recipe, *, rows: int = 1, **settings: Any) -> dict[str, Any]:
    """Decode until the caches are as in the middle of a text, and book the next step.

    With `compile` that is the step which is captured, of the same shapes as a compiled one, but not compiled.

    Args:
        guard: of this process.
        recipe: of the model, which is in bf16.
        rows: texts at a time.
        settings: fields of `Settings`; the decoder `tree` takes a tree of two levels.
    """
    if settings.get("decoder") == "tree":
        settings["tree"] = TREE
    with contextlib.ExitStack() as stack:
        for patch in (*torch_cuda(guard), *operators(), *_of_decoding()):
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        ledger = stack.enter_context(Ledger())
        model = on_device(recipe, dtype=torch.bfloat16).eval()
        prompts = [[1] * NUM_PROMPT_TOKENS] * rows
        steps = iter(generation.stream(model, prompts, Settings(max_new_tokens=64, **settings)))
        for _ in range(2 + (static.WARM_UPS if settings.get("compile") else 0)):
            next(steps)
        ledger.reset()
        next(steps)
        return {"launches": dict(ledger.launches), "moved": dict(ledger.moved), "waits": dict(ledger.waits)}


def _of_decoding() -> Iterator[Any]:
    """Yield patches: a generator of the host's, and texts that grow though lengths have no values."""
    reached = [NUM_PROMPT_TOKENS]

    def note_progress(self: DecodeState, *args: Any) -> Any:
        noted = NOTE(self, *args)
        reached[0] += 2
        self.shortest = self.longest = reached[0]
        self.all_finished = False
        self.spans = dict.fromkeys(self.spans, (reached[0] - 1, reached[0] - 1, 1))
        return noted

    yield mock.patch.object(DecodeState, "note_progress", note_progress)
    yield mock.patch("torch.Generator", _generator)
    yield mock.patch.object(static, "_compiled", static._step)
    for name in ("CUDAGraph", "graph"):
        yield mock.patch(f"torch.cuda.{name}", Nothing)
    undecorated = generation._steps.__wrapped__  # type: ignore[attr-defined]
    yield mock.patch.object(generation, "_steps", undecorated)  # in inference mode nothing is taken apart


def _generator(device: Any = None) -> torch.Generator:
    return GENERATOR()

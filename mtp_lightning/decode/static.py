"""Steps of fixed shapes, which `torch.compile` turns into few kernels and a GPU replays as one CUDA graph.

An eager step attends to as many slots as its texts are long and recomputes as many positions of the heads as have
changed, so no two steps are alike. Here a step attends to all slots of the cache under a mask, and recomputes as many
positions as could have changed. All that it reads and writes lies in tensors that stay where they are: keys and values,
tokens, lengths, which texts have ended, and random numbers, which are drawn before it. What the host is to know is one
tensor, which it waits for once a step.

`mode="reduce-overhead"` of `torch.compile` is not used: its graphs leave out steps that write into their inputs
(pytorch#103985, #121861), as all do that keep a cache. The compiled step is captured here instead.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from mtp_lightning.decode.packed_linear import PackedLinear
from mtp_lightning.decode.sampling import DrawnNoise
from mtp_lightning.decode.state import DecodeState
from mtp_lightning.decode.steps import Decoding, Step
from mtp_lightning.decode.stopping import Stopping
from mtp_lightning.errors import DecodingError
from mtp_lightning.model.mtp_model import MtpModel

FEWEST_SLOTS = 256
MOST_COMPILED = 256  # steps of other shapes or models, in one process; torch's own limit is 8
WARM_UPS = 3  # steps before a capture, in which libraries choose their kernels and take their memory


def fixed_capacity(needed: int) -> int:
    """Round positions up to a power of two, so that steps compiled for one text serve others."""
    return max(FEWEST_SLOTS, 1 << (needed - 1).bit_length())


def check_compilable(model: MtpModel) -> None:
    """Refuse models whose steps cannot be compiled.

    Raises:
        DecodingError: Its layers are those of transformers, or its maps are packed.
    """
    eager = "leave compile away"
    if model.section.is_foreign:
        raise DecodingError(
            "compiled steps need layers of our own",
            f"model.family {model.section.family}, whose own forward prepares the calls of its layers",
            eager.capitalize(),
        )
    if isinstance(model.unembedding.lm_heads[0], PackedLinear):
        raise DecodingError(
            "compiled steps need linear maps that the compiler can read",
            "bf16 on a CPU, where maps are packed for decoding already",
            f"Load the model in fp32 (--dtype fp32), or {eager}",
        )


def _step(decoding: Decoding, session: DecodeState, stopping: Stopping, num_drafts: int) -> Tensor:
    """Draft, verify, commit and cut: (B, K + depth + 5) drafts, block, then accepted, kept, was active, has ended."""
    is_active = ~session.is_finished
    drafts, result = decoding.step(num_drafts)
    kept, ends = stopping.cut_at_tokens(result.block, result.accepted + 1, session.is_finished)
    session.is_finished.copy_(ends)
    facts = torch.stack((result.accepted, kept, is_active.long(), ends.long()), 1)
    return torch.cat((drafts, result.block, facts), 1)


_compiled = torch.compile(_step, fullgraph=True, dynamic=False)


@final
class StaticStep:
    """Takes steps of one batch of texts."""

    def __init__(
        self, decoding: Decoding, session: DecodeState, stopping: Stopping, noise: DrawnNoise, num_drafts: int
    ) -> None:
        """Go on from a session whose heads have read the prompts, in a step that drew its random numbers from `noise`.

        Args:
            decoding: Takes the steps.
            session: What they read and write.
            stopping: Cuts the texts.
            noise: Where steps have their random numbers from.
            num_drafts: How many tokens each drafts, in a line; for a tree, its depth.
        """
        self.session, self.stopping, self.noise = session, stopping, noise
        self.num_drafts = num_drafts
        self.num_taken = 0
        session.fix_shapes(decoding.most_behind(num_drafts))

        def run() -> Tensor:
            return _compiled(decoding, session, stopping, num_drafts)

        self.run = CudaGraph(run) if session.device.type == "cuda" else run

    def take(self) -> Step:
        """Take a step; its tensors are the host's.

        Raises:
            DecodingError: It cannot be compiled.
        """
        session = self.session
        self.noise.refill()
        report = (self.run() if self.num_taken else self._compile()).cpu()
        self.num_taken += 1
        *_, accepted, kept, active, ends = report.unbind(1)
        tokens, width = report[:, :-4], self.num_drafts + 1
        drafts, block = tokens[:, :-width], tokens[:, -width:]
        if self.stopping.texts:
            kept, completes = self.stopping.cut_at_strings(block, kept)
            ends = ends | completes
            if completes.any():
                session.is_finished.copy_(ends)
        session.all_finished = bool(ends.all())
        return Step(drafts, accepted, block, kept, active.bool())

    def _compile(self) -> Tensor:
        """Take the first step, which is compiled unless one like it has been."""
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED, accumulated_recompile_limit=MOST_COMPILED):
                return self.run()
        except TorchDynamoException as error:
            reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
            raise DecodingError(
                "torch.compile must be able to compile a step of the decoder",
                f"{type(error).__name__}: {reason}",
                "Leave compile away; `mtp doctor` says whether there is a compiler",
            ) from error


@final
class CudaGraph:
    """A step that is captured once, and replayed from then on: all its kernels are launched by one call.

    What it reads and writes must lie where it lay when it was captured; so does its result.
    """

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # one cannot capture on the stream that everybody uses
        self.graph: torch.cuda.CUDAGraph | None = None
        self.num_warm_ups = 0
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        """Take a step: as it is until libraries are warm, by the graph afterwards."""
        if self.num_warm_ups < WARM_UPS:
            self.num_warm_ups += 1
            return self._beside()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.step()  # recorded, not run
        self.graph.replay()
        assert self.result is not None
        return self.result

    def _beside(self) -> Tensor:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.step()
        current.wait_stream(self.stream)
        return result

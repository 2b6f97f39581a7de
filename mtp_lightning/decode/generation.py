"""Generation: prefill, then draft, verify, accept, until every text has ended."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtp_lightning.decode.adaptive import AdaptiveLength, step_costs
from mtp_lightning.decode.sampling import DrawnNoise, Sampling
from mtp_lightning.decode.settings import (
    ADAPTIVE,
    Decoder,
    Settings,
    check_prompts,
    check_settings,
    resolve_decoder,
    resolve_draft_length,
)
from mtp_lightning.decode.state import DecodeState, prefill
from mtp_lightning.decode.static import StaticStep, check_compilable, fixed_capacity
from mtp_lightning.decode.statistics import Statistics
from mtp_lightning.decode.steps import ChainDecoding, Decoding, ForcedDrafts, Step, TreeDecoding
from mtp_lightning.decode.stopping import Stopping
from mtp_lightning.model.mtp_model import MtpModel

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention of decoding on a GPU, without cuDNN: torch 2.11 to 2.13 prefer it on Hopper, where it plans anew for every
length of the past (0.4 s, modelscope/FunASR#3704), and wrong with few key heads on Blackwell (pytorch#193893)."""


@final
@dataclass(frozen=True)
class Generation:
    """Finished texts."""

    tokens: list[list[int]]  # new tokens of every prompt
    statistics: Statistics
    decoder: Decoder
    prefill_s: float  # from the call to the first token of every row
    decode_s: float  # all that came after


def generate(
    model: MtpModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings | None = None,
    *,
    forced_drafts: ForcedDrafts | None = None,
    **options: Any,
) -> Generation:
    """Continue every prompt, all in one batch; prompts may differ in length.

    Greedy text does not depend on the decoder, up to ties within rounding; sampled text has one law under all
    decoders but `typical`.

    Args:
        model: The model, on the device and in the precision to use.
        prompts: Token ids of each prompt.
        settings: How to generate.
        forced_drafts: Drafts to use in place of the heads' own, to see what a given acceptance is worth; with
            `compile` their code is compiled, too.
        options: Fields of `Settings`, instead of `settings`.

    Raises:
        DecodingError: A prompt or setting does not fit the model.
    """
    settings = settings or Settings(**options)
    began_at = time.perf_counter()
    steps: list[Step] = []
    first_at = began_at
    for step in stream(model, prompts, settings, forced_drafts=forced_drafts):
        if not steps:
            first_at = time.perf_counter()
        steps.append(step)
    ended_at = time.perf_counter()
    return Generation(
        tokens=texts_of(steps),
        statistics=count(steps),
        decoder=resolve_decoder(model, settings.decoder),
        prefill_s=first_at - began_at,
        decode_s=ended_at - first_at,
    )


def stream(
    model: MtpModel, prompts: Sequence[Sequence[int]], settings: Settings, *, forced_drafts: ForcedDrafts | None = None
) -> Iterator[Step]:
    """Check the request, then yield a step for every forward, the prompts' own first. As `generate` otherwise."""
    decoder = resolve_decoder(model, settings.decoder)
    check_settings(model, decoder, settings)
    if settings.compile:
        check_compilable(model)
    longest = resolve_draft_length(model, decoder, settings)
    prompts = [list(prompt) for prompt in prompts]
    check_prompts(model, prompts, settings.max_new_tokens)
    if decoder != "tree" or settings.tree is None:
        remaining = _room(settings, prompts, settings.max_new_tokens + 2 * (longest + 1))
        session = DecodeState(model, prompts, max_drafts=longest, remaining=remaining, seed=settings.seed)
        return _steps(ChainDecoding(session, settings, decoder, forced_drafts), session, settings, prompts, longest)
    deepest = len(settings.tree.breadths)
    remaining = _room(settings, prompts, settings.max_new_tokens + deepest + settings.tree.num_drafts + 2)
    session = DecodeState(model, prompts, max_drafts=deepest, remaining=remaining, seed=settings.seed)
    return _steps(TreeDecoding(session, settings, settings.tree), session, settings, prompts, deepest)


def _room(settings: Settings, prompts: Sequence[Sequence[int]], remaining: int) -> int:
    """Positions to hold behind the longest prompt: with fixed shapes so many that other texts have as many in all."""
    longest = max(map(len, prompts))
    return fixed_capacity(longest + remaining + 1) - longest - 1 if settings.compile else remaining


@torch.inference_mode()
def _steps(
    decoding: Decoding, session: DecodeState, settings: Settings, prompts: Sequence[Sequence[int]], longest: int
) -> Iterator[Step]:
    """Prefill, then step until every text has ended."""
    stopping = Stopping(settings, prompts, session.device)
    is_adaptive = settings.draft_length == ADAPTIVE and longest > 0
    adaptive = AdaptiveLength(step_costs(session.model, longest, len(prompts))) if is_adaptive else None
    with sdpa_kernel(KERNELS):
        scores = prefill(session)
    first = _first_tokens(scores, settings.sampling, session.generator)
    session.tokens.scatter_(1, session.lengths[:, None], first)
    yield _end_step(session, stopping, first[:, :0], torch.zeros_like(session.lengths), first)[0]
    if settings.compile:
        yield from _static_steps(decoding, session, stopping, longest)
        return
    while not session.all_finished:
        num_drafts = adaptive.choose() if adaptive else longest
        with sdpa_kernel(KERNELS):
            drafts, result = decoding.step(num_drafts)
        step, accepted = _end_step(session, stopping, drafts, result.accepted, result.block)
        if adaptive is not None:
            adaptive.observe(num_drafts, accepted)
        yield step


def _static_steps(decoding: Decoding, session: DecodeState, stopping: Stopping, num_drafts: int) -> Iterator[Step]:
    """Take the first step as usual, in which heads read the prompts, and all others with fixed shapes."""
    noise = DrawnNoise(session.generator)
    decoding.generator = noise
    if not session.all_finished:
        with sdpa_kernel(KERNELS):
            drafts, result = decoding.step(num_drafts)
        yield _end_step(session, stopping, drafts, result.accepted, result.block)[0]
    if not session.all_finished:
        static = StaticStep(decoding, session, stopping, noise, num_drafts)
        while not session.all_finished:
            with sdpa_kernel(KERNELS):
                step = static.take()
            yield step


def _first_tokens(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose the token after every prompt: (B, V) -> (B, 1)."""
    if sampling.is_greedy:
        return scores.argmax(-1, keepdim=True)
    return sampling.draw(scores, generator)[:, None]


def _end_step(
    session: DecodeState, stopping: Stopping, drafts: Tensor, accepted: Tensor, block: Tensor
) -> tuple[Step, list[int]]:
    """Return the step, and how many drafts were kept in each row that had not ended, which the host knows now."""
    is_active = ~session.is_finished
    kept, session.is_finished = stopping.cut(block, accepted + 1, session.is_finished)
    counts, active = session.note_progress(accepted, is_active.long())
    judged = [count for count, is_on in zip(counts, active, strict=True) if is_on]
    return Step(drafts, accepted, block, kept, is_active), judged


def texts_of(steps: Sequence[Step]) -> list[list[int]]:
    """Join the tokens of every row's steps."""
    texts: list[list[int]] = [[] for _ in steps[0].kept]
    for step in steps:
        for text, tokens, kept in zip(texts, step.block.tolist(), step.kept.tolist(), strict=True):
            text += tokens[:kept]
    return texts


def count(steps: Sequence[Step]) -> Statistics:
    """Count what the steps of a generation, the prompts' own first, drafted, kept and emitted."""
    num_rows = len(steps[0].kept)
    statistics = Statistics([[] for _ in range(num_rows)], num_prompts=num_rows)
    statistics.num_emitted_tokens = num_rows
    for step in steps[1:]:
        active = step.is_active.tolist()
        rows = zip(statistics.accepted_by_row, step.accepted.tolist(), step.kept.tolist(), active, strict=True)
        statistics.drafted_by_step.append(step.block.shape[1] - 1)
        statistics.num_draft_tokens += step.drafts.shape[1] * sum(active)
        for accepted_of_row, accepted, kept, is_active in rows:
            if is_active:
                accepted_of_row.append(accepted)
                statistics.num_emitted_tokens += kept
                statistics.num_cut_tokens += accepted + 1 - kept
    return statistics

"""Samples are run against their tests and counted: pass@k, the chance that one of k passes [Chen et al. 2021]."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.evaluation.code.answers import program_of
from mtp_lightning.evaluation.code.problems import Problem
from mtp_lightning.evaluation.code.samples import Line, LineLog
from mtp_lightning.evaluation.code.sandbox import Sandbox, Verdict

Key = tuple[str, float, int]
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)


def key_of(line: Line) -> Key:
    """Say which sample a line is about."""
    return str(line["task_id"]), float(line["temperature"]), int(line["sample"])


def judge(
    problems: Mapping[str, Problem],
    samples: Sequence[Line],
    verdicts: LineLog,
    sandbox: Sandbox,
    *,
    is_chat: bool,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    """Run the samples that have no verdict yet; equal programs of a problem once."""
    known = set(map(key_of, verdicts.lines))
    waiting: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in samples:
        if key_of(line) not in known:
            name = str(line["task_id"])
            waiting[name, program_of(problems[name], line["completion"], is_chat=is_chat)].append(line)

    def run(job: tuple[str, str]) -> Verdict:
        name, program = job
        return sandbox.run(program, problems[name].tests)

    pool = ThreadPoolExecutor(workers)
    try:
        for lines, verdict in zip(waiting.values(), pool.map(run, waiting), strict=True):
            verdicts.append([_verdict_line(line, verdict) for line in lines])
            advance(len(lines))
    except BaseException:  # Ctrl-C, above all: not to be kept waiting for programs that take their time
        sandbox.end_all()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _verdict_line(line: Line, verdict: Verdict) -> Line:
    key = {name: line[name] for name in ("task_id", "temperature", "sample")}
    return {**key, "outcome": verdict.outcome, "why": verdict.why}


def passes(verdicts: Sequence[Line]) -> dict[float, list[list[bool]]]:
    """Gather whether each sample passed, by temperature and problem."""
    found: dict[float, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for line in sorted(verdicts, key=key_of):
        found[float(line["temperature"])][str(line["task_id"])].append(line["outcome"] == "passed")
    return {temperature: list(own.values()) for temperature, own in found.items()}


@final
@dataclass(frozen=True)
class PassAtK:
    """One figure of problems at a temperature."""

    k: int
    temperature: float
    value: float
    low: float  # of the 95 % interval of a bootstrap over problems
    high: float


def estimate(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate pass@k of one problem without bias: the share of all k of its n samples with one that passes.

    >>> estimate(4, 1, 1), estimate(4, 1, 2), estimate(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    failed = num_samples - num_passed
    if failed < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(failed + 1, num_samples + 1)))


def pass_at_k(passes: Sequence[Sequence[bool]], k: int, temperature: float) -> PassAtK:
    """Average over problems, each with whether its samples pass; resample the problems for an interval."""
    values = np.array([estimate(len(own), sum(own), k) for own in passes])
    low, high = np.percentile(_resampled(values), INTERVAL)
    return PassAtK(k, temperature, float(values.mean()), float(low), float(high))


def _resampled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means: NDArray[np.float64] = values[chosen].mean(1)
    return means


def figures(passes: Mapping[float, Sequence[Sequence[bool]]], ks: Sequence[int]) -> list[PassAtK]:
    """Compute all figures, by temperature, of those k that there are samples for."""
    return [
        pass_at_k(own, k, temperature)
        for temperature, own in sorted(passes.items())
        for k in ks
        if k <= min(map(len, own))
    ]


def best(found: Sequence[PassAtK]) -> list[PassAtK]:
    """Pick the best temperature for each k, as papers report it [Gloeckle et al. 2024]; the lowest of equal ones."""
    return [max((one for one in found if one.k == k), key=lambda one: one.value) for k in sorted({o.k for o in found})]

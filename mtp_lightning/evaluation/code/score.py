"""Runs samples against their tests, and counts."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mtp_lightning.evaluation.code.answers import program_of
from mtp_lightning.evaluation.code.problems import Problem
from mtp_lightning.evaluation.code.samples import Line, LineLog
from mtp_lightning.evaluation.code.sandbox import Sandbox, Verdict

Key = tuple[str, float, int]


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

"""Every row once per epoch in the golden order, whatever is killed and however many ranks, workers or micro-batches.

Real ranks train with `training.fit.train`; all of them get SIGKILL at random moments, and the run goes on with
another strategy, another number of ranks, of loader processes and of micro-batches. A callback writes down what each
completed step was trained on; compared is row by row, by position and content, with rows read one by one.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.format.folder import newest_complete
from mtp_lightning.checkpoint.format.state_tree import read_state
from mtp_lightning.data.loading.corpus import prepare_shards
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.sampling.order import permute
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.launch.rank_env import free_port, local_rank_info
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.schema.data import BatchSection, RampSection
from mtp_lightning.training import fit
from tests.support.runs import ROOT, figures

STEPS = 160  # of each of the three runs
KILLS, MORE_KILLS = 6, 11
RUNS = {"plain": (["single"], 1), "zero2": (["zero2"], 2), "any": (["single", "zero1", "zero2", "zero3"], 3)}
WINDOW_TOKENS = 128
BATCH = BatchSection(global_batch_size=16, micro_batch_size=1, ramp=RampSection(from_batch_size=4, over_samples=600))
FIELDS = (
    "model.hidden_size=16",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=2",
    "heads.num_offsets=2",
    f"data.seq_len={WINDOW_TOKENS}",
    f"batch.global_batch_size={BATCH.global_batch_size}",
    "batch.ramp={from_batch_size: 4, over_samples: 600}",
    f"run.steps={STEPS}",
    "checkpoint.every_steps=2",
    "checkpoint.keep=2",
    "run.validate_every_steps=1000",
    "logging.every_steps=50",
    "run.device=cpu",
    "run.seed=11",
)


class Recorder(Callback):
    """Write down the position and the rows of every completed step of this rank."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        share = len(batch["tokens"])
        step_began_at = trainer.datamodule.rows_consumed - share * trainer.world_size
        first = step_began_at + share * trainer.global_rank
        rows = zip(batch["tokens"].numpy(), batch["documents"].numpy(), strict=True)
        record = [first, *(fingerprint(tokens, documents) for tokens, documents in rows)]
        os.write(self._file, json.dumps(record).encode() + b"\n")


def fingerprint(tokens: Any, documents: Any) -> str:
    content = tokens.astype("<i8").tobytes() + documents.astype("<i8").tobytes()
    return sha256(content).hexdigest()[:16]


def train_rank(environment: dict[str, str], overrides: list[str], record: Path) -> None:
    """Be one rank: what `mtp train` is after it has started the ranks, and a callback more."""
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    log = os.open(record.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    build_callbacks = fit.build_callbacks
    fit.build_callbacks = lambda *args, **names: [*build_callbacks(*args, **names), Recorder(record)]
    code = fit.train(load_recipe(str(ROOT / "recipes/debug/parallel.yaml"), overrides))
    os._exit(code)


class Matrix:
    """A run that is started again and again, with what was drawn for each start."""

    def __init__(self, folder: Path, kinds: list[str], seed: int, kills: int) -> None:
        self.folder, self.kinds, self.kills = folder, kinds, kills
        self.draw = random.Random(seed)
        self.fields = [*FIELDS, f"run.dir={folder}/run", f"run.cache={folder}/cache"]
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.laws.test_kill_matrix", "deepspeed"])
        self.num_starts = 0
        self.drawn: set[tuple[str, int, int, int]] = set()

    def start(self) -> list[Any]:
        """Start the ranks of a drawn shape."""
        kind = self.draw.choice(self.kinds)
        ranks = 1 if kind == "single" else self.draw.choice([1, 2, 2, 4])
        micro_batch_size = self.draw.choice([size for size in (1, 2, 4) if 4 % (ranks * size) == 0])
        workers = self.draw.choice([0, 0, 0, 1, 2]) if ranks < 4 else 0
        self.drawn.add((kind, ranks, micro_batch_size, workers))
        shape = [f"strategy.kind={kind}", f"strategy.ranks_per_node={ranks}", f"data.workers={workers}"]
        overrides = [*self.fields, *shape, f"batch.micro_batch_size={micro_batch_size}"]
        port = free_port()
        processes = [
            self.context.Process(
                target=train_rank, args=(local_rank_info(rank, ranks, port).environment, overrides, self.record(rank))
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        self.num_starts += 1
        return processes

    def record(self, rank: int, start: int | None = None) -> Path:
        return self.folder / f"{self.num_starts if start is None else start:03d}-{rank}.jsonl"

    def kill_at_random(self) -> None:
        """Start, and kill all ranks: while they start, between two steps, within one, or within a save."""
        start, first = self.num_starts, self.committed()
        processes = self.start()
        if self.draw.random() < 0.2:
            time.sleep(self.draw.uniform(0, 3))
        else:
            wanted = self.draw.randint(1, max(1, (STEPS - 50 - len(first)) * 2 // (self.kills + 1 - start)))
            wait_for(lambda: count_lines(self.record(0, start)) >= wanted or not all_alive(processes))
            time.sleep(self.draw.uniform(0, 0.04))
        assert all_alive(processes), self.record(0, start).with_suffix(".log").read_text()[-3000:]
        for process in self.draw.sample(processes, len(processes)):
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()

    def finish(self) -> None:
        start = self.num_starts
        processes = self.start()
        for process in processes:
            process.join()
        log = self.record(0, start).with_suffix(".log").read_text()
        assert [process.exitcode for process in processes] == [0] * len(processes), log[-3000:]
        assert figures(self.folder / "run/metrics.csv")[-1]["tokens"] == str(BATCH.samples_after(STEPS) * WINDOW_TOKENS)

    def committed(self) -> range:
        """Steps of the newest checkpoint, which must say how many rows that is."""
        newest = newest_complete(self.folder / "run/checkpoints")
        if newest is None:
            return range(0)
        consumed = read_state(newest.path)[MtpDataModule.__qualname__]["rows_consumed"]
        assert consumed == BATCH.samples_after(newest.step)
        return range(newest.step)

    def records(self, start: int) -> Iterator[tuple[int, str]]:
        """Yield position and fingerprint of every row that a start has trained on."""
        for path in self.folder.glob(f"{start:03d}-*.jsonl"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else it was killed while it wrote it
                    first, *rows = json.loads(line)
                    yield from enumerate(rows, first)


def all_alive(processes: list[Any]) -> bool:
    return all(process.is_alive() for process in processes)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(happens: Any) -> None:
    until = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.002)


def golden_rows(matrix: Matrix) -> list[str]:
    """What each position holds: from the order's definition, and rows read one at a time."""
    recipe = load_recipe(str(ROOT / "recipes/debug/parallel.yaml"), matrix.fields).recipe
    rows = WindowDataset(prepare_shards(recipe), "train", seq_len=WINDOW_TOKENS, num_offsets=2)
    total = BATCH.samples_after(STEPS)
    epochs = range(total // len(rows) + 1)
    numbers = np.concatenate([permute(np.arange(len(rows)), seed=11, epoch=e, size=len(rows)) for e in epochs])
    golden = []
    for number in numbers[:total]:
        batch = rows.read(np.array([number]))
        golden.append(fingerprint(batch["tokens"][0], batch["documents"][0]))
    assert len(epochs) >= 3
    assert len(set(golden)) > 0.9 * len(rows)
    return golden


def compare(matrix: Matrix, committed: list[int], golden: list[str]) -> int:
    """Compare what was trained on; `committed` holds the rows of the newest checkpoint before and after each start.

    Return how many rows were trained on once more, because they were not committed when they were first.
    """
    trained: list[str | None] = [None] * len(golden)
    repeated = 0
    for start, (begin, end) in enumerate(itertools.pairwise(committed)):
        seen = dict(matrix.records(start))
        different = [position for position, found in seen.items() if found != golden[position]]
        assert different == [], f"start {start}"
        assert min(seen, default=begin) == begin, f"start {start} must begin where the checkpoint before it ends"
        for position in range(begin, end):
            assert trained[position] is None
            trained[position] = seen[position]
        repeated += sum(position >= end for position in seen)
    assert trained == golden
    return repeated


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("run", RUNS)
def test_every_row_is_trained_on_once_in_the_golden_order(tmp_path: Path, run: str) -> None:
    kill_and_compare(Matrix(tmp_path, *RUNS[run], KILLS))


@pytest.mark.matrix
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("run", RUNS)
def test_more_kills_change_nothing(tmp_path: Path, run: str) -> None:
    kill_and_compare(Matrix(tmp_path, *RUNS[run], MORE_KILLS))


def kill_and_compare(matrix: Matrix) -> None:
    golden = golden_rows(matrix)
    committed = [0]
    for _ in range(matrix.kills):
        matrix.kill_at_random()
        committed.append(BATCH.samples_after(len(matrix.committed())))
    matrix.finish()
    committed.append(BATCH.samples_after(len(matrix.committed())))
    assert committed[-1] == len(golden)
    repeated = compare(matrix, committed, golden)
    print(f"{matrix.num_starts - 1} kills, {len(matrix.drawn)} shapes, {len(golden)} rows, {repeated} read again")

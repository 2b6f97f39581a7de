"""`mtp bench data`: rows against a plain memory map, seeking, the first batch after a resume, and building."""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mtp_lightning.console.tables import build_table, console, write_json
from mtp_lightning.data.loading.dataset import RankSlices, SampleDataset, TrainingBatches, tensors_of
from mtp_lightning.data.sampling.order import ShuffledOrder, permute
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.build import BuildOptions, build_shards
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.recipe.schema.data import BatchSection

WINDOW_TOKENS, NUM_OFFSETS, BATCH_ROWS = 4096, 4, 8
WIDTH_TOKENS = WINDOW_TOKENS + NUM_OFFSETS
MEAN_LOG_LENGTH, STD_LOG_LENGTH = 6.0, 1.1  # of documents: median 403 bytes, mean about 740
FAR_ROW = 10**9
ALPHABET = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      \n", dtype=np.uint8)


def bench_data(*, text_mb: int, tokenizer: str | None, repeats: int, json_path: Path | None) -> dict[str, float]:
    """Measure the data path on text made up on the spot, print a table, and return the figures.

    Rates are per second of processor time of this one process, so other work on the machine weighs little.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-bench-data-") as name:
        folder = Path(name)
        texts = _write_text(folder / "text.jsonl", text_mb * 1_000_000)
        figures = {"build_bytes_mb_per_s": _build_rate(folder, "byte")}
        figures |= _row_figures(folder / "byte", repeats)
        figures |= {"seek_ms": _seek_ms(), "first_batch_s": _first_batch_s(folder / "byte")}
        if tokenizer:
            figures |= _tokenizer_figures(folder, tokenizer, texts)
    _show(figures)
    write_json(json_path, figures)
    return figures


def _write_text(path: Path, num_bytes: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    texts: list[bytes] = []
    while num_bytes > 0:
        length = int(rng.lognormal(MEAN_LOG_LENGTH, STD_LOG_LENGTH)) + 1
        texts.append(ALPHABET[rng.integers(0, ALPHABET.size, length)].tobytes())
        num_bytes -= length
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in texts))
    return texts


def _build_rate(folder: Path, tokenizer: str) -> float:
    source = folder / "text.jsonl"
    options = BuildOptions(tokenizer=tokenizer, validation_fraction=0.02)
    out = folder / Path(tokenizer).stem
    seconds = _seconds(lambda: build_shards([str(source)], out, options, processes=1, show_progress=False))
    return source.stat().st_size / 1e6 / seconds


def _row_figures(folder: Path, repeats: int) -> dict[str, float]:
    """Read all rows in a permuted order, from the shards and from one flat file, in turns."""
    rows = WindowDataset(folder, "train", seq_len=WINDOW_TOKENS, num_offsets=NUM_OFFSETS)
    flat = _write_flat(rows, folder / "flat.bin")
    numbers = permute(np.arange(len(rows) - 1), seed=0, epoch=0, size=len(rows) - 1)
    batches = [numbers[begin : begin + BATCH_ROWS] for begin in range(0, numbers.size, BATCH_ROWS)]
    readers: dict[str, Callable[[Any], Any]] = {
        "rows": rows.read,
        "row_tokens": lambda batch: rows.read_tokens(batch),
        "memmap": lambda batch: _memmap_rows(flat, batch),
        "batches": lambda batch: tensors_of(rows.read(batch)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _, (name, read) in itertools.product(range(repeats), readers.items()):
        seconds[name].append(_seconds(lambda read=read: _read_all(read, batches)))  # type: ignore[misc]
    rates = {name: numbers.size * WIDTH_TOKENS / median(own) for name, own in seconds.items()}
    figures = {f"{name}_mtokens_per_s": rate / 1e6 for name, rate in rates.items()}
    return {**figures, "row_tokens_to_memmap": rates["row_tokens"] / rates["memmap"]}


def _read_all(read: Callable[[Any], Any], batches: list[Any]) -> None:
    """Read, and keep nothing: as in training, the memory of one batch serves the next."""
    for batch in batches:
        read(batch)


def _memmap_rows(flat: Any, batch: Any) -> Any:
    """Read rows the usual way: one slice of `np.memmap` each."""
    out = np.empty((batch.size, WIDTH_TOKENS), dtype=flat.dtype)
    for line, row in enumerate(batch):
        out[line] = flat[row * WINDOW_TOKENS : row * WINDOW_TOKENS + WIDTH_TOKENS]
    return out


def _write_flat(rows: WindowDataset, path: Path) -> Any:
    with path.open("wb") as file:
        for begin in range(0, len(rows), 64):
            tokens = rows.read_tokens(np.arange(begin, min(begin + 64, len(rows))))
            file.write(tokens[:, :WINDOW_TOKENS].astype(np.uint16).tobytes())
        file.write(bytes(2 * NUM_OFFSETS))
    return np.memmap(path, dtype=np.uint16, mode="r")


def _seek_ms() -> float:
    """Time of finding the row of one sample among 10^9, far into the order."""
    order = ShuffledOrder(seed=0, num_rows=FAR_ROW)
    samples = [np.array([7 * FAR_ROW // 3 + number]) for number in range(100)]
    return _seconds(lambda: [order.rows(sample) for sample in samples]) * 1000 / len(samples)


def _first_batch_s(folder: Path) -> float:
    """Wall time from a folder to the first batch of a run that goes on, as a new process would need it."""
    began_at = time.perf_counter()
    rows = WindowDataset(folder, "train", seq_len=WINDOW_TOKENS, num_offsets=NUM_OFFSETS)
    slices = RankSlices(rows_consumed=10**7, batch=BatchSection(global_batch_size=BATCH_ROWS), rank=0, world_size=1)
    order = ShuffledOrder(seed=0, num_rows=len(rows))
    batches = TrainingBatches(dataset=SampleDataset(rows, order, 257), slices=lambda: slices)
    next(iter(batches))
    return time.perf_counter() - began_at


def _tokenizer_figures(folder: Path, tokenizer: str, texts: list[bytes]) -> dict[str, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # both on one core
    opened = open_tokenizer(tokenizer)
    opened.encode_many(texts[:10])
    num_mb = sum(map(len, texts)) / 1e6
    bare = num_mb / _seconds(lambda: opened.encode_many(texts))
    built = _build_rate(folder, tokenizer)
    return {"bare_tokenizer_mb_per_s": bare, "build_tokenizer_mb_per_s": built, "build_to_tokenizer": built / bare}


def _seconds(work: Callable[[], Any]) -> float:
    began_at = time.process_time()
    work()
    return time.process_time() - began_at


def _show(figures: dict[str, float]) -> None:
    names = {
        "build_bytes_mb_per_s": "building from JSONL, bytes (MB/s per core)",
        "rows_mtokens_per_s": "rows with their documents (M tokens/s per core)",
        "row_tokens_mtokens_per_s": "rows, tokens alone (M tokens/s per core)",
        "memmap_mtokens_per_s": "rows of np.memmap (M tokens/s per core)",
        "batches_mtokens_per_s": "rows with their documents as int64 tensors (M tokens/s per core)",
        "row_tokens_to_memmap": "rows, tokens alone / np.memmap",
        "seek_ms": "finding a row among 10^9 (ms)",
        "first_batch_s": "first batch after a resume (s)",
        "bare_tokenizer_mb_per_s": "the tokenizer alone (MB/s per core)",
        "build_tokenizer_mb_per_s": "building with it (MB/s per core)",
        "build_to_tokenizer": "building / the tokenizer alone",
    }
    table = build_table(["figure", "value"], left=0, gap=2)
    for name, value in figures.items():
        table.add_row(names[name], f"{value:,.3f}" if value < 10 else f"{value:,.0f}")
    console().print(table)

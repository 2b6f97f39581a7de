"""The README.md of an exported folder, as the hub of Hugging Face reads it: what it is, how good, how to serve it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtp_lightning import __version__
from mtp_lightning.checkpoint.convert.consolidate import REPORT_NAME
from mtp_lightning.checkpoint.export.contents import Source
from mtp_lightning.checkpoint.export.formats import Format, engines_for
from mtp_lightning.checkpoint.export.untrained import origin_of
from mtp_lightning.checkpoint.format.carried_files import license_of
from mtp_lightning.errors import visible
from mtp_lightning.files.untrusted import OddFileError, read_object

CARD = "README.md"
NOT_STATED = "not stated"
_HUB = re.compile(r"models--([\w.-]+)--([\w.-]+)")


def model_card(row: Format, source: Source, report: Mapping[str, Any], parity: Mapping[str, Any] | None) -> str:
    """Write the card; what nobody has measured is left out.

    Args:
        row: the format.
        source: the model.
        report: what became of every tensor.
        parity: what `--verify` found, if it was asked.
    """
    base, licence = _base_of(source)
    recipe, checkpoint = source.recipe, source.checkpoint
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"license: {licence}"] if licence != NOT_STATED else []
    front += [f"base_model: {base}"] if "/" in base else []
    front += ["tags:", "- multi-token-prediction", "- speculative-decoding", f"- {row.name}"]
    heads = f"{recipe.heads.num_offsets - 1} {recipe.heads.kind} heads beyond the next token"
    lines = ["---", *front, "---", "", f"# {_cell(recipe.name)}", ""]
    lines += [f"A language model with {heads}, trained with mtp_lightning {__version__}, as `{row.name}`.", ""]
    facts = {
        "base model": base or "none: trained from the beginning",
        "licence of the base model": licence,
        "training": f"step {checkpoint.step:,}, {checkpoint.manifest.tokens:,} tokens, recipe {_cell(recipe.name)}",
        "data": _data_of(source),
        "heads": f"{heads}; {_heads_in(report)}",
        "weights": source.dtype,
    }
    lines += [*_table(("", ""), [*facts.items()]), ""]
    for section in (_acceptance(source), _speed(source), _verified(parity)):
        lines += [*section, ""] if section else []
    lines += ["## How to serve it", ""]
    for engine in engines_for(row, source.recipe):
        command = engine.serve.format(folder=".")
        lines += [f"{engine.name} {engine.versions} (heads: {engine.heads}):", "", f"    {command}", ""]
    return visible("\n".join(lines))


def _base_of(source: Source) -> tuple[str, str]:
    """Name the model that was imported, if one was, and its licence."""
    origin = origin_of(source)
    told = _object(origin.path / REPORT_NAME) if origin else {}
    folder = told.get("source")
    if not isinstance(folder, str):
        return "", NOT_STATED
    hub = _HUB.search(folder)
    licence = told.get("license") or license_of(Path(folder))
    return f"{hub[1]}/{hub[2]}" if hub else _cell(Path(folder).name), licence or NOT_STATED


def _data_of(source: Source) -> str:
    data = source.recipe.data
    if source.checkpoint.step == 0:
        return "none: not trained here"
    if data.mixture:
        weights = data.weights_at_rows()
        totals = [sum(at_row) for at_row in zip(*weights.values(), strict=True)]
        shares = {
            name: " to ".join(f"{weight / total:.0%}" for weight, total in zip(own, totals, strict=True))
            for name, own in weights.items()
        }
        return ", ".join(f"{_cell(Path(name).name)} ({share})" for name, share in shares.items())
    if data.stream is not None:
        return "WebDataset tars"
    return _cell(Path(data.shards).name) if data.shards else ", ".join(_cell(Path(one).name) for one in data.corpus)


def _heads_in(report: Mapping[str, Any]) -> str:
    lost = sorted({name for name in report["left_out"] if name.startswith("heads.")})
    return (
        f"{len(lost)} of their tensors are left out, as this format has no place for them" if lost else "all are here"
    )


def _acceptance(source: Source) -> list[str]:
    """Lay out how often drafts are kept, by offset and by source, where the run has measured it."""
    run = source.checkpoint.path.parent.parent
    summary = _object(run / "summary.json")
    rows = [*_validated(source.checkpoint.metrics)]
    step: Any = source.checkpoint.step
    if not rows and isinstance(whole := summary.get("validation"), dict):
        step = whole.get("step")
        by_source = _dict(summary.get("validation_by_source"))
        rows = [(name, one) for name, one in {"all": whole, **by_source}.items() if isinstance(one, dict)]
    if not rows:
        return []
    offsets = [str(offset) for offset in range(2, source.recipe.heads.num_offsets + 1)]
    table = []
    for name, one in rows:
        rates = _dict(one.get("acceptance_rate"))
        kept = (_share(rates.get(offset), ".1%") for offset in offsets)
        table.append((_cell(Path(name).name), _share(one.get("mean_acceptance_length"), ".2f"), *kept))
    header = ("held-out text of", "tokens a step", *(f"offset {offset} kept" for offset in offsets))
    return [f"## How often drafts are kept (greedily, step {step})", "", *_table(header, table)]


def _validated(metrics: Mapping[str, float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sort the metrics of a checkpoint by the source of the text, as summary.json has them."""
    sources = dict.fromkeys(name.partition("@")[2] for name in metrics if "mean_acceptance_length" in name)
    for source in sources:
        end = f"@{source}" if source else ""
        rates = {
            found[1]: value
            for name, value in metrics.items()
            if (found := re.fullmatch(r"val/acceptance_rate_(\d+)" + re.escape(end), name))
        }
        length = metrics.get(f"val/mean_acceptance_length{end}")
        yield source or "all", {"mean_acceptance_length": length, "acceptance_rate": rates}


def _speed(source: Source) -> list[str]:
    """Lay out what `mtp bench decode --json` has measured, where its file lies in the run's folder."""
    rows = []
    for file in sorted(source.checkpoint.path.parent.parent.glob("*.json"))[:100]:
        told = _object(file)
        figures, machine = told.get("figures"), _dict(told.get("machine"))
        if told.get("benchmark") != "decode" or not isinstance(figures, list):
            continue
        for one in figures:
            if isinstance(one, dict) and one.get("decoder") != "greedy" and not one.get("is_ceiling"):
                cells = (one.get("decoder"), one.get("batch"), one.get("draft_length"), machine.get("name"))
                rows.append((*(_cell(str(cell)) for cell in cells), _share(one.get("speedup"), ".2f")))
    header = ("decoder", "batch", "drafts", "machine", "times plain greedy")
    return ["## Measured speed (mtp bench decode)", "", *_table(header, rows)] if rows else []


def _verified(parity: Mapping[str, Any] | None) -> list[str]:
    judges = ", ".join(one["judge"] for one in parity["judges"] if "judge" in one) if parity else ""
    return [f"Compared with the trained model by {judges}: the figures are in `parity.json`."] if judges else []


def _object(path: Path) -> dict[str, Any]:
    """Read a file of figures; {} where there is none, or another."""
    try:
        return read_object(path)
    except (OSError, OddFileError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _share(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _cell(text: str) -> str:
    return re.sub(r"[|<>\[\]`\n\r]", " ", text)[:120]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(one)} |" for one in (header, ("---",) * len(header), *rows)]

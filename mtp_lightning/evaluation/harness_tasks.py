"""Tasks of lm-evaluation-harness: found, looked at, and run with our model; ROUGE beside the metrics that it has."""

import difflib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mtp_lightning.errors import DataError, DecodingError, RunFolderError, refusal_of, remedy_of
from mtp_lightning.evaluation.harness import HarnessModel, lm_eval

try:
    from rouge_score.rouge_scorer import RougeScorer
except ValueError as error:  # of nltk, which it imports
    raise DataError(
        "tasks of lm-evaluation-harness need a folder for data of their libraries",
        f"none: {error}; HOME is not set, and this user has no entry with a home",
        "Set HOME to a folder that can be written to, e.g. HOME=/tmp",
    ) from error

TASKS_HINT = "See docs/howto/evaluate.md for task files and metrics that need no network"
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""F1 of ROUGE by Google's rouge-score, 0 to 1; `use_stemmer: true` beside one in a task's metric_list stems first."""


def rouge(kind: str, references: Sequence[str], predictions: Sequence[str], *, use_stemmer: bool = False) -> float:
    """Return the F1 of one kind of ROUGE of a text and its reference.

    >>> rouge("rougeL", ["the cat sat"], ["the cat sat down"])
    0.8571428571428571
    """
    scorer = RougeScorer([kind], use_stemmer=use_stemmer)
    return float(scorer.score(references[0], predictions[0])[kind].fmeasure)


for _kind in ROUGE:
    if _kind not in lm_eval.api.registry.metric_registry:
        _register = lm_eval.api.registry.register_metric(metric=_kind, higher_is_better=True, aggregation="mean")
        _register(partial(rouge, _kind))


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    out: Path | None = None,
    chat: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
    tell: Callable[[Mapping[str, Any]], object] = lambda results: None,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks with `lm_eval.simple_evaluate`, once all of them are known to be there and to be ours to run.

    Args:
        model: a loaded model.
        tasks: names or patterns of tasks, groups and tags, or task files.
        include_path: folder of task files; those of lm-evaluation-harness are looked at for what is not there.
        out: folder for lm-evaluation-harness's own files of results and samples.
        chat: whether contexts are turns of a chat.
        tell: called with the results before files of them are written.
        gen_kwargs: settings that go before the tasks' own generation_kwargs.
        options: further arguments of `simple_evaluate`: limit, num_fewshot, system_instruction, bootstrap_iters.

    Returns:
        What `simple_evaluate` returns.

    Raises:
        DataError: A task is not known, is wrong, needs data that are not there, or would run generated code.
        RunFolderError: The files cannot be written.
    """
    if chat:
        _ = model.text.template  # is there one?
    if out is not None:
        with _written(out):
            out.mkdir(parents=True, exist_ok=True)
    manager, loaded = load_tasks(tasks, include_path)
    tracker = lm_eval.loggers.EvaluationTracker(output_path=str(out)) if out is not None else None
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(model.path)},
        tasks=loaded,
        task_manager=manager,  # without one all of its own task files would be read
        batch_size=model.batch_size,
        device=str(model.device),
        apply_chat_template=chat,
        gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
        evaluation_tracker=tracker,
        log_samples=tracker is not None,
        **options,
    )
    samples = results.pop("samples", {})
    tell(results)
    if tracker is not None and out is not None:
        _save(tracker, results, samples, out)
    return results


def _save(tracker: Any, results: dict[str, Any], samples: Mapping[str, Any], out: Path) -> None:
    """Write lm-evaluation-harness's files, all of them or none: it goes on where one cannot be written.

    Raises:
        RunFolderError: One cannot be written.
    """
    with (
        _written(out),
        TemporaryDirectory(prefix=".partial-", dir=out) as staging,
        _written(out),  # told before what is there is removed: there is room again afterwards
        _raised(lm_eval.loggers.evaluation_tracker),
    ):
        tracker.output_path = staging
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, own in samples.items():
            tracker.save_results_samples(task_name=name, samples=own)
        for path in filter(Path.is_file, Path(staging).rglob("*")):
            target = out / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


@contextmanager
def _raised(module: Any) -> Iterator[None]:
    """Raise in the body what a module of lm-evaluation-harness (0.4) only warns of. Can go when it raises it itself."""

    def look(record: logging.LogRecord) -> bool:
        if (error := sys.exc_info()[1]) is not None:  # logged in its `except`
            raise error
        return True

    module.eval_logger.addFilter(look)
    try:
        yield
    finally:
        module.eval_logger.removeFilter(look)


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> tuple[Any, list[Any]]:
    """Load tasks with their data; return what finds tasks, and the tasks.

    Raises:
        DataError: As `evaluate_tasks`.
    """
    if include_path is not None and not include_path.is_dir():
        raise DataError("--include-path must be a folder of task files", str(include_path), "Correct the path")
    manager = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=False)
    if any(_matches(manager, name) == [] for name in names):
        manager = lm_eval.tasks.TaskManager(include_path=include_path)
    specs: list[str] = []
    for name in names:
        specs += _matches(manager, name) or _unknown(manager, name, include_path)
    tasks: list[Any] = []
    for spec in dict.fromkeys(specs):
        try:
            tasks += manager.load([spec])["tasks"].values()
        except Exception as error:  # a task file may hold anything, code included
            raise _not_loaded(spec, _unknown_metric(manager, spec) or error) from error
    for task in tasks:
        _check_task(task)
    return manager, tasks


def _matches(manager: Any, name: str) -> list[str]:
    matched: list[str] = manager.match_tasks([name])
    return matched or ([name] if Path(name).is_file() else [])


def _unknown(manager: Any, name: str, include_path: Path | None) -> list[str]:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"Did you mean: {', '.join(near)}?" if near else "Name a task of --include-path, or a task file"
    for path in sorted(include_path.rglob("*.yaml")) if include_path else ():
        try:
            lm_eval.tasks._index.TaskIndex.entry_from_path(path)
        except Exception as error:  # as above
            hint += f" Passed over: {path}, {_first_line(error)}"
    raise DataError("--tasks must name tasks that there are", repr(name), hint)


def _not_loaded(name: str, error: Exception) -> DataError:
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    away = ("huggingface_hub", "httpx", "requests", "datasets.exceptions")
    if any(isinstance(one, ConnectionError) or type(one).__module__.startswith(away) for one in chain):
        return DataError(
            f"the data of task {name} must be here, or on a hub that can be reached",
            f"{type(error).__name__}: {_first_line(error)}",
            "Without a network give a task file with dataset_path: json and its own data_files, and --include-path. "
            + TASKS_HINT,
        )
    found = f"{type(error).__name__}: {_first_line(error)}"
    return DataError(f"task {name} must be one that lm-evaluation-harness can load", found, TASKS_HINT)


def _unknown_metric(manager: Any, spec: str) -> KeyError | None:
    """Name a metric of a task that could not be loaded which lm-evaluation-harness does not have itself."""
    listed = (getattr(manager.task_index.get(spec), "cfg", None) or {}).get("metric_list") or []
    names = [one["metric"] for one in listed if isinstance(one, dict) and isinstance(one.get("metric"), str)]
    missing = [name for name in names if name not in lm_eval.api.registry.metric_registry]
    return KeyError(f"no metric {missing[0]} here, and none from a hub") if missing else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def _check_task(task: Any) -> None:
    name, metrics = task.config.task, getattr(task, "_metric_fn_list", {})
    own = getattr(task.config, "process_results", None) is not None
    missing = [metric for metric, function in metrics.items() if function is None and not own]
    if getattr(task, "UNSAFE_CODE", False):
        found, hint = f"{name}, which runs what the model writes", "Use `mtp eval code`, which has a sandbox for it"
    elif getattr(task, "MULTIMODAL", False):
        found, hint = f"{name}, which shows pictures", "Choose tasks of text"
    elif missing:
        found, hint = f"{name}, whose metric {missing[0]} is not here and needs a hub", TASKS_HINT
    elif getattr(task, "multiple_target", False) and any(metric in ROUGE for metric in metrics):
        found, hint = f"{name}, with ROUGE of several answers", "Give one reference text per document"
    else:
        return
    raise DataError("tasks must be texts, with metrics that can be computed here", found, hint)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found, hint = refusal_of(error, folder), remedy_of(error, "--out")
        raise RunFolderError("the folder for --out must be writable", found, hint) from error


def parse_gen_kwargs(text: str | None) -> dict[str, Any]:
    """Read `key=value,...` as lm-evaluation-harness does.

    Raises:
        DecodingError: A part has no value.
    """
    if text is not None and not all("=" in part for part in text.split(",")):
        raise DecodingError("--gen-kwargs must be key=value, with commas between", repr(text), "Correct it")
    settings: dict[str, Any] = lm_eval.utils.simple_parse_args_string(text)
    return settings


def tables_of(results: Mapping[str, Any]) -> str:
    """Return the tables of results, of tasks and of groups, as lm-evaluation-harness prints them."""
    columns = [name for name in ("results", "groups") if results.get(name)]
    return "\n".join(str(lm_eval.utils.make_table(results, name)) for name in columns)


def plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results in values that JSON has, as lm-evaluation-harness writes them."""
    written: dict[str, Any] = json.loads(json.dumps(results, default=lm_eval.utils.handle_non_serializable))
    return written

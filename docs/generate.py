"""Write docs/reference from the program itself: `python docs/generate.py`, from the root of the repository.

Fields come from the docstrings of the recipe's sections, commands from the command line, columns from the table of
metrics, errors from the exit codes and the recorded messages. `tests/docs/test_reference.py` fails on a stale page.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from inspect import cleandoc
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mtp_lightning import errors  # noqa: E402
from mtp_lightning.cli.app import app  # noqa: E402
from mtp_lightning.launch import signals  # noqa: E402
from mtp_lightning.recipe.schema.describe import allowed  # noqa: E402
from mtp_lightning.recipe.schema.field_types import ROOT as RECIPE  # noqa: E402
from mtp_lightning.recipe.schema.field_types import Option, Place, options_of  # noqa: E402
from mtp_lightning.recipe.yaml import one_line_yaml  # noqa: E402
from mtp_lightning.training.step.times import PARTS  # noqa: E402

FOLDER = ROOT / "docs/reference"
SERVE = ROOT / "docs/howto/serve.md"
FAULTS = ROOT / "tests/golden/recipe_faults"
NOTE = "<!-- Written by docs/generate.py: change the docstrings, then run it. -->"

FIGURES = {
    "step": "Optimizer steps done.",
    "tokens": "Tokens trained on so far, over all ranks: sequences times their length.",
    "lr": "Learning rate of this step, before the factors of `optimizer.lr_scale`.",
    "loss_<k>": "Cross-entropy of offset k in nats per valid target, unweighted.",
    "label_accuracy_<k>": "Share of valid targets that are offset k's first choice (top-1).",
    "agreement_<k>": "Share of positions at which offset k's first choice is the main head's for the same token.",
    "conditional_acceptance_rate_<k>": "Share at which offset k agrees among positions at which offsets 2 … k-1 agree.",
    "acceptance_rate_<k>": "Share of positions at which offsets 2 … k all agree: drafts that are kept greedily.",
    "mean_acceptance_length": "1 + the sum of cumulative acceptances: tokens per forward of greedy self-speculation.",
    "off_text_<k>": "Share of targets of offset k > 2 whose position is drawn by `objective.rollout` and has a draft "
    "before that is not the given token: these read another token, or are left out.",
    "divergence_<k>": "Mean divergence of offset k from its teacher, the main head (`objective.distill`).",
    "router_loss": "Mean load-balancing loss of a trunk with experts, without its coefficient.",
    "overlap_<k>": "Mean of the sum of min(p, q) over the vocabulary, p the main head's distribution and q offset k's.",
    "sampled_acceptance_rate_<k>": "Mean product of the overlaps of offsets 2 … k: drafts kept by lossless sampling.",
    "sampled_acceptance_length": "1 + the sum of sampled acceptances: tokens per forward under sampling.",
    "grad_norm/trunk": "L2 norm of the trunk's gradient before clipping.",
    "grad_norm/heads": "The same of all heads.",
    "grad_norm/unembedding": "The same of the final norm and the unembedding matrices.",
    "grad_norm/lora": "The same of low-rank updates.",
    "grad_norm/layer_mix": "The same of mixtures of layers.",
    "grad_norm/all": "The same of all parameters together; clipping looks at this one.",
    "tokens_per_s": "Tokens per second since the last row, over all ranks, without validation and saving.",
    "mfu": "Share of the peak of all GPUs (data sheet) that the model's operations come to, counted as by `mtp plan`; "
    "empty for a device that is not in the table.",
    "memory_gib": "Peak memory of the first rank: CUDA's allocator on a GPU, the resident set on a CPU.",
    "time/data_s": "Seconds per step, mean over the ranks, until a rank has its rows and their targets. All are taken "
    "by the clock on a CPU, and on a GPU by events in its stream, so that what it waits for counts; validations, saves "
    "and logging are in none.",
    "time/forward_s": "The same for forward passes, with losses and, but in the joint order, the gradients of logits.",
    "time/backward_s": "The same for backward passes, with the reductions inside them (ZeRO-2 and 3).",
    "time/reduce_s": "The same for what ranks wait in for each other outside of these: that all have come, and "
    "reductions after the last backward pass.",
    "time/step_s": "The same for norms, clipping, optimizer and average of the weights.",
    **{
        f"time/{part}_{of}_s": f"The {said} of a rank: a slow one has much here, and the others wait in `reduce`."
        for part in PARTS
        for of, said in (("min", "least"), ("max", "most"))
    },
    "skipped_steps": "Steps without effect so far, because a loss or gradient was not finite or no token had a target.",
    "rollbacks": "How often the run has gone back to its last good checkpoint.",
    "drift/nll_change": "Change of the main head's loss since the start, in nats, on the guard's held-out sequences.",
    "drift/nll_change_low": "Low end of its 95 % interval.",
    "drift/nll_change_high": "High end of its 95 % interval.",
    "drift/kl": "Mean KL divergence, in nats, of the starting model from the present one.",
    "drift/flips": "Share of positions at which the likeliest token has changed.",
}
"""What the columns of metrics.csv mean; <k> stands for an offset, and train/ and val/ are left out."""

CODES = {
    0: "The command did what it was asked for.",
    1: "A check or comparison has failed, as the output says, or an unforeseen error has a traceback.",
    signals.REQUEUE: "Stopped by a signal with a checkpoint: the same command goes on. Schedulers requeue such a job.",
    signals.HANG: "No progress for longer than `health.hang_after_s`: stacks of the ranks are in the run's logs.",
    129: "Ended by SIGHUP, as when a terminal is closed, where nothing is gone on with; `mtp train` ends with 85.",
    signals.INTERRUPTED: "Interrupted with Ctrl-C; a shell's loop ends with it.",
    141: "Nobody reads what a command prints any more; `mtp train` goes on instead.",
    143: "Ended by SIGTERM, where nothing is gone on with; `mtp train` ends with 85.",
}


def pages() -> dict[str, str]:
    """Return the text of every page by its name in docs/reference."""
    return {"recipe.md": recipe_page(), "cli.md": cli_page(), "metrics.md": metrics_page(), "errors.md": errors_page()}


def recipe_page() -> str:
    """Describe every field of a recipe."""
    sections = list(_sections(RECIPE))
    head = (
        "A recipe is a YAML file of these sections; a field that is left out has its default. It may extend another "
        "file (`extends: base.yaml`), and `key=value` on the command line changes a field by its dotted path, e.g. "
        "`run.steps=200`. `mtp recipe show RECIPE --docs --origin` prints a recipe with all of this."
    )
    lines = ["# Recipe fields", "", NOTE, "", head, "", *(f"- [{title}](#{slug(title)})" for title, _ in sections)]
    for title, place in sections:
        section = next(option.section for option in place.options if option.section)
        assert section is not None
        rows = [_field_row(place, name) for name in section.model_fields]
        docs = cleandoc(section.__doc__ or "")
        lines += ["", f"## {title}", "", docs, "", *table(("field", "value", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _sections(place: Place) -> Iterator[tuple[str, Place]]:
    """Yield a title and the place of every section below one, in order; one for each kind where there are several."""
    for option in place.options:
        if option.section is None:
            continue
        alone = Place(place.names, (option,), place.field)
        path = ".".join(place.names) or "top level"
        kind = next((name for name, section in place.kinds.items() if section is option.section), None)
        yield (f"{path}, kind {kind}" if kind else path), alone
        for name in option.keys:
            below = alone.below(name)
            assert below is not None
            entries = [Place((*below.names, "NAME"), options_of(o.entry)) for o in below.options if o.entry]
            for inner in (below, *(entry for entry in entries if any(o.section for o in entry.options))):
                yield from _sections(inner)


def _field_row(parent: Place, name: str) -> tuple[str, ...]:
    place = parent.below(name)
    assert place is not None
    assert place.field is not None
    default = (
        "" if place.field.is_required() else one_line_yaml(_plain(place.field.get_default(call_default_factory=True)))
    )
    is_section = any(option.section for option in place.options)
    meaning = " ".join((place.field.description or "Chooses among the kinds.").split())
    if is_section:
        path = ".".join(place.names)
        titles = [f"{path}, kind {kind}" for kind in place.kinds] or [path]
        links = ", ".join(f"[{title}](#{slug(title)})" for title in titles)
        return f"`{name}`", f"see {links}" + (" or null" if _may_be_null(place) else ""), "", meaning
    return f"`{name}`", _value(place), f"`{default}`" if default else "required", meaning


def _value(place: Place) -> str:
    entries = [option.entry for option in place.options if option.entry]
    if any(option.section for entry in entries for option in options_of(entry)):
        title = ".".join((*place.names, "NAME"))
        return f"a mapping from names to [{title}](#{slug(title)})"
    return allowed(place)


def _may_be_null(place: Place) -> bool:
    return Option(type(None)) in [Option(option.type) for option in place.options]


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def cli_page() -> str:
    """Describe every command."""
    commands = sorted(_commands(app, "mtp"))
    lines = ["# Commands", "", NOTE, "", *(f"- [{name}](#{slug(name)}): {_first(run)}" for name, run in commands)]
    for name, run in commands:
        parameters = list(_parameters(run))
        usage = " ".join([name, "[OPTIONS]", *(p.usage for p in parameters if p.is_argument)])
        rows = [(f"`{p.usage}`", p.meaning, f"`{p.default}`" if p.default else "") for p in parameters]
        lines += ["", f"## {name}", "", f"`{usage}`", "", cleandoc(run.__doc__ or ""), ""]
        lines += table(("argument or option", "meaning", "default"), rows) if rows else []
    return re.sub("\n\n\n+", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _commands(group: typer.Typer, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{name} {command.name or command.callback.__name__.replace('_', '-')}", command.callback
    for below in group.registered_groups:
        assert below.typer_instance is not None
        yield from _commands(below.typer_instance, f"{name} {below.name}")


class _Parameter(NamedTuple):
    """An argument or option, as it is written."""

    usage: str
    meaning: str
    default: str
    is_argument: bool


def _parameters(run: Callable[..., Any]) -> Iterator[_Parameter]:
    """Read the parameters of a command off its function: typer's own objects change with its version."""
    hints = get_type_hints(run, include_extras=True)
    for name, parameter in inspect.signature(run).parameters.items():
        if hints[name] is typer.Context:
            continue
        annotation, info = get_args(hints[name])[:2]
        types = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
        is_list = get_origin(types[0]) is list or get_origin(annotation) is list
        kind = get_args(types[0])[0] if get_origin(types[0]) is list else types[0]
        is_required = parameter.default is inspect.Parameter.empty
        value = info.metavar or _value_name(kind, name)
        if isinstance(info, ArgumentInfo):
            value += "..." if is_list else ""
            yield _Parameter(value if is_required else f"[{value}]", info.help or "", "", is_argument=True)
            continue
        option = ", ".join(info.param_decls or [f"--{name.replace('_', '-')}"])
        default = "required" if is_required else _shown(parameter.default, info)
        yield _Parameter(option if kind is bool else f"{option} {value}", info.help or "", default, is_argument=False)


def _value_name(kind: Any, name: str) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(choice.value) for choice in kind)
    return {int: "N", float: "X", Path: "PATH"}.get(kind, name.upper())


def _shown(default: Any, info: OptionInfo) -> str:
    if default in (None, False, ()) or info.show_default is False:
        return ""
    return str(default.value if isinstance(default, Enum) else default)


def _first(run: Callable[..., Any]) -> str:
    return " ".join(cleandoc(run.__doc__ or "").split("\n\n")[0].split())


def metrics_page() -> str:
    """Describe every column of metrics.csv."""
    from mtp_lightning.training.logging.columns import metric_columns

    found: dict[str, list[str]] = {}
    for column in metric_columns(3, ["SOURCE"]):
        figure = re.sub(r"_\d$", "_<k>", column.partition("@")[0].removeprefix("train/").removeprefix("val/"))
        found.setdefault(figure, []).append(re.sub(r"_\d(?=@|$)", "_<k>", column))
    rows = [(code(sorted(set(columns), key=columns.index)), FIGURES[figure]) for figure, columns in found.items()]
    head = (
        "A run writes one row per logged step into `metrics.csv`, and the same figures to its loggers. Figures of "
        "`train/` are means since the last row, figures of `val/` are of the held-out split; a figure that was not "
        "measured at a step is empty. Offset k predicts the token k places ahead, and offset 1 is the main head. With "
        "`data.mixture` validation is also given by SOURCE."
    )
    return "\n".join(["# Metrics", "", NOTE, "", head, "", *table(("column", "meaning"), rows)]) + "\n"


def errors_page() -> str:
    """List exit codes and every message about a recipe."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MtpError)]
    codes = CODES | {kind.exit_code: " ".join(cleandoc(kind.__doc__ or "").split()) for kind in kinds[1:]}
    rows = [(str(number), codes[number]) for number in sorted(codes)]
    faults = sorted({fault.message: fault for path in sorted(FAULTS.glob("*.txt")) for fault in _faults(path)}.items())
    head = (
        "Every error says what must hold, what was found, and what to do; faults of a recipe are reported all at once, "
        "with file and line. `MTP_TRACEBACK=1` also shows the traceback."
    )
    fault_rows = [(fault.message, fault.found, fault.hint) for _, fault in faults]
    lines = ["# Errors", "", NOTE, "", head, "", "## Exit codes", "", *table(("code", "meaning"), rows), ""]
    lines += ["## Faults of a recipe", "", "Each with an example of what is found.", ""]
    return "\n".join([*lines, *table(("what must hold", "found, for example", "what to do"), fault_rows)]) + "\n"


def serve_page() -> str:
    """Fill in the tables of docs/howto/serve.md: formats and their readers, and head kinds in each."""
    from mtp_lightning.checkpoint.export.formats import FORMATS

    rows = [(f"`{row.name}`", row.holds, row.lost) for row in FORMATS.values()]
    engines = [
        (f"`{row.name}`", f"{one.name} {one.versions}", one.heads, f"`{one.serve.format(folder='out')}`")
        for row in FORMATS.values()
        for one in row.engines
    ]
    lines = [*table(("format", "holds", "what is lost"), rows), "", *table(_ENGINES, engines), "", *_matrix(), ""]
    before, _, rest = SERVE.read_text(encoding="utf-8").partition(" -->\n")
    return f"{before} -->\n\n" + "\n".join(lines) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]


_ENGINES = ("format", "engine", "heads", "started by")


def _matrix() -> list[str]:
    """Tell for every head kind which engines draft with it in which format; settings may say otherwise."""
    from mtp_lightning.checkpoint.export.formats import FORMATS
    from mtp_lightning.recipe import Recipe
    from mtp_lightning.recipe.head_kinds import BUILT_IN

    formats = [row for row in FORMATS.values() if row.lost != "all heads beyond the main one"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 24}
    trunks = [{**sizes, "qk_norm": has_norms} for has_norms in (False, True)]
    rows = []
    for kind in BUILT_IN:
        variants = [
            Recipe.model_validate(
                {"model": trunk, "heads": {"kind": kind, "num_offsets": 3, "hidden": hidden, **order}}
            )
            for trunk in trunks
            for hidden in ("post_norm", "pre_norm")
            for order in ([{"order": "causal"}, {"order": "anticausal"}] if kind == "chained" else [{}])
        ]
        cells = []
        for row in formats:
            held = {
                one.name: [row.refuses(recipe) is None and one.drafts(recipe) for recipe in variants]
                for one in row.engines
                if one.heads != "none"
            }
            names = [name + ("" if all(held[name]) else " (some)") for name in held if any(held[name])]
            cells.append(", ".join(names) or "refused")
        rows.append((kind, *cells))
    return table(("heads", *(f"`{row.name}`" for row in formats)), rows)


class _Fault(NamedTuple):
    message: str
    found: str
    hint: str


def _faults(path: Path) -> Iterator[_Fault]:
    """Read the faults of a recorded message."""
    for block in path.read_text(encoding="utf-8").split("\n\n")[1:]:
        parts, last = {"": ""}, ""
        for line in block.rstrip().splitlines():
            label = re.match(r"    (found|where|nearest|hint) +", line)
            last = label[1] if label else last
            parts[last] = f"{parts.get(last, '')} {line[label.end() :] if label else line.strip()}".strip()
        yield _Fault(parts[""], parts["found"], parts["hint"])


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Write a Markdown table; pipes, angle brackets and line breaks inside a cell are escaped.

    >>> table(("a",), [("x|y <z>",), ("`x|y`",)])[2:]
    ['| x\\\\|y &lt;z> |', '| `x\\\\|y` |']
    """
    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
    ]


def cell(text: str) -> str:
    """Escape what would end a cell or be taken for HTML; code keeps its angle brackets."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(
        part if number % 2 else part.replace("<", "&lt;").replace("*", "\\*") for number, part in enumerate(parts)
    )


def code(names: Iterable[str]) -> str:
    """Write names as code, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)


def slug(title: str) -> str:
    """Return the anchor that GitHub gives a heading.

    >>> slug("objective.weights, kind decay")
    'objectiveweights-kind-decay'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    SERVE.write_text(serve_page(), encoding="utf-8")
    print(SERVE)
    for page, text in pages().items():
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / page).write_text(text, encoding="utf-8")
        print(FOLDER / page)

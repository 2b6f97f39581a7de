"""Every verb, as the command line lists them: stdout full, gone or closed, no stderr, ASCII only; targets that fail."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from shutil import disk_usage

import pytest
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.console.errors import BROKEN_PIPE
from mtp_lightning.errors import RunFolderError
from tests.cli.verbs import commands
from tests.support import warm
from tests.support.fatal import small_file_system
from tests.support.runs import ROOT, mtp

VERBS = sorted(commands())
OUTPUTS = {
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "gone": "r, w = os.pipe(); os.close(r); os.dup2(w, 1)",
    "closed": "os.close(1); sys.stdout = None",
    "no stderr": "os.close(2); sys.stderr = None",
    "ascii": "sys.stdout.reconfigure(encoding='ascii'); "
    "sys.stderr.reconfigure(encoding='ascii', errors='backslashreplace')",
}
"""What the process finds instead of the streams it is given; the codes are those of a verb run for what it prints."""
ENDS = {"full": 1, "gone": BROKEN_PIPE, "closed": 1, "no stderr": 0, "ascii": 0}

RECIPE = f"{ROOT}/recipes/debug/parallel.yaml"
SMALL = "run.dir=RUN run.cache=CACHE run.steps=2 run.validation_samples=4 run.validate_every_steps=2"
SINGLE = "run.dir=NEW run.cache=CACHE run.steps=2 run.validation_samples=4"
WORDS = {
    "train": f"{RECIPE} {SINGLE}",
    "doctor": "",
    "plan": f"{RECIPE} --json NEW",
    "preflight": f"{RECIPE} {SINGLE}",
    "submit": f"{RECIPE} --site local --dry-run {SINGLE}",
    "sweep": f"{RECIPE} --out NEW --seeds 0,1 --site local --dry-run run.cache=CACHE",
    "status": "RUN --html NEW.html",
    "import": "HF --out NEW",
    "export": "RUN --out NEW --format trunk",
    "extend": "LONG --to 5 --out NEW",
    "generate": "RUN --prompt träume --max-new-tokens 8",
    "data generate": "RUN --out NEW --prompts PROMPTS --num-documents 20 --max-new-tokens 4 --validation-fraction 0.5",
    "data build": "TEXT --out NEW",
    "data adopt": "TOKENS --out NEW --tokenizer byte",
    "data peek": f"{RECIPE} {SMALL}",
    "data probe induction": "NEW --documents 4 --test 2",
    "data probe polynomial": "NEW --documents 4 --test 2",
    "data verify": "SHARDS",
    "data stats": "SHARDS --picture NEW.png",
    "recipe show": f"{RECIPE} --docs",
    "recipe check": RECIPE,
    "recipe diff": f"{RECIPE} {ROOT}/recipes/debug/sequential.yaml",
    "bench memory": f"{RECIPE} --offsets 1 --backward-orders joint --json NEW {SMALL}",
    "bench train": f"{RECIPE} --offsets 1 --backward-orders joint --json NEW {SMALL}",
    "bench plain": f"{RECIPE} --pairs 1 --json NEW {SMALL}",
    "bench overhead": f"{RECIPE} --pairs 2 --round-steps 2 --json NEW run.cache=CACHE",
    "bench decode": "RUN --batches 1 --prompt-tokens 4 --new-tokens 4 --rounds 1 --json NEW --png NEW.png",
    "bench tree": "RUN --out NEW --drafts 2",
    "bench data": "--text-mb 1 --repeats 1 --json NEW",
    "eval code": "RUN --tasks humaneval --data PROBLEMS --out NEW --max-new-tokens 4 --json NEW.json",
    "eval harness": "RUN --tasks last_words --include-path TASKS --out NEW --json NEW.json",
    "eval acceptance": "RUN --rows 4 --json NEW",
    "eval marginal": "RUN --samples 2 --last 4 --json NEW",
    "eval induction": "RUN --data TRIALS --json NEW",
    "eval polynomial": "RUN --data TRIALS --json NEW --plot NEW.png",
    "eval lens": "RUN --samples 2 --json NEW --plot NEW.png",
    "report page": "RUN --html NEW.html --prompt a --max-new-tokens 4",
    "report compare": "RUN --json NEW --plot NEW.png --html NEW.html",
    "report mixture": "MIXED --plot NEW.png",
}
"""A command line of every verb that prints and ends well; NEW is a path that does not exist yet."""
GO_ON = ("train", "sweep")
"""What is not run for what it prints."""


def test_every_verb_is_in_the_table() -> None:
    assert sorted(WORDS) == VERBS


def run(output: str, *words: str, cwd: Path) -> tuple[int, str]:
    """Run a verb with a spoilt stream; return exit code and all that was still printed."""
    code = f"import os, sys; {OUTPUTS[output]}\n{warm.MTP}"
    done = warm.run(*words, cwd=cwd, code=code, timeout=300)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "Error:" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("verb", "output"), [*zip(VERBS[:: len(VERBS) // len(OUTPUTS)], OUTPUTS, strict=False)])
def test_help_of_a_verb_without_an_output(verb: str, output: str, tmp_path: Path) -> None:
    """One of each; all pairs below."""
    assert run(output, *verb.split(), "--help", cwd=tmp_path)[0] == ENDS[output]


@pytest.mark.parametrize("verb", ["plan", "recipe show", "recipe check"])
def test_what_ascii_lacks_is_written_as_escapes(verb: str, tmp_path: Path) -> None:
    (tmp_path / "träume.yaml").write_text("name: 梦 ± träume\n", encoding="utf-8")
    code, said = run("ascii", *verb.split(), "träume.yaml", cwd=tmp_path)
    assert code == 0
    assert r"tr\xe4ume" in said
    assert said.isascii()


def in_turn(output: str, turn: int) -> list[str]:
    """Every other verb: pairs of verb, output, and of help or work are all met, the three of them in turn."""
    return VERBS[([*OUTPUTS].index(output) + turn) % 2 :: 2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("output", OUTPUTS)
def test_help_of_all_verbs_without_an_output(output: str, tmp_path: Path) -> None:
    for verb in in_turn(output, 0):
        assert run(output, *verb.split(), "--help", cwd=tmp_path)[0] == ENDS[output], verb


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run with layer mixes, its shards, an export and texts."""
    base = tmp_path_factory.mktemp("verbs")
    (base / "text").mkdir()
    problem = {"task_id": "1", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
    (base / "problems").write_text(json.dumps(problem))
    trial = {"text": "Qz, Qz", "names": ["Qz"], "prompt": "-31000=", "completion": "46000", "operations": 1}
    (base / "trials").write_text(json.dumps(trial))
    (base / "tasks").mkdir()
    (base / "tasks/data.jsonl").write_text(json.dumps({"text": "träume", "word": "süß"}) + "\n")
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(base / "tasks/data.jsonl")}}}
    asked = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{word}}"}
    (base / "tasks/last_words.yaml").write_text(
        json.dumps({"task": "last_words", **files, "test_split": "test", **asked, "metric_list": [{"metric": "acc"}]})
    )
    (base / "prompts").write_text("".join(f"prompt {number}\n" for number in range(20)))
    (base / "tokens.npy").write_bytes(bytes([1, 0, 2, 0, 0, 1]) * 40)
    for number in range(40):
        (base / f"text/{number}.txt").write_text(f"träume {number} " * 40)
    found = {
        "RUN": "run",
        "MIXED": "mixed",
        "CACHE": "cache",
        "SHARDS": "shards",
        "HF": "hf",
        "TEXT": "text",
        "TOKENS": "tokens.npy",
        "PROMPTS": "prompts",
        "PROBLEMS": "problems",
        "TRIALS": "trials",
        "TASKS": "tasks",
        "LONG": "long",
    }
    places = {name: str(base / path) for name, path in found.items()}
    long = f"train {ROOT}/recipes/debug/sequential.yaml {SMALL}".replace("RUN", "LONG")
    mixed = f"train {RECIPE} {SMALL} adapt.layer_mix={{}}".replace("RUN", "MIXED")
    for line in (
        f"train {RECIPE} {SMALL}",
        mixed,
        long,
        "data build TEXT --out SHARDS",
        "export RUN --out HF --format trunk",
    ):
        done = mtp(*filled(line, places), cwd=base)
        assert done.returncode == 0, done.stderr
    return places


def filled(line: str, places: dict[str, str]) -> list[str]:
    for name, path in places.items():
        line = line.replace(name, path)
    return shlex.split(line)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_verb_at_work_without_an_output(output: str, places: dict[str, str], tmp_path: Path) -> None:
    wrong = {}
    for verb in in_turn(output, 1):
        words = filled(f"{verb} {WORDS[verb]}", {**places, "NEW": str(tmp_path / verb.replace(" ", "_"))})
        code, said = run(output, *words, cwd=tmp_path)
        if code != (0 if verb in GO_ON else ENDS[output]):
            wrong[verb] = (code, said[-1000:])
    assert not wrong


FILES = re.compile(r"(?:--(?:json|png|plot|picture|html)|bench tree .* --out) (NEW\S*)")
"""What a command line of the table writes that is one file."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("turn", "limit"),
    [  # each verb at one of the two
        pytest.param(0, "size=64k", marks=pytest.mark.slow),
        pytest.param(1, "nr_inodes", marks=pytest.mark.slow),
        pytest.param(1, "size=64k", marks=pytest.mark.matrix),
        pytest.param(0, "nr_inodes", marks=pytest.mark.matrix),
    ],
)
def test_every_verb_at_work_on_a_full_disk(turn: int, limit: str, places: dict[str, str], tmp_path: Path) -> None:
    """It says what is full, in three parts, leaves nothing of its own, and old files as they are."""
    wrong = {}
    for number, verb in enumerate(VERBS[turn::2]):
        line = f"{verb} {WORDS[verb]}"
        with small_file_system(tmp_path / str(number), "64k") as disk:
            for name in FILES.findall(line):
                (disk / name).write_bytes(b"old")
            (disk / "filler").write_bytes(bytes(disk_usage(disk).free) if limit == "size=64k" else b"")
            before = {path: path.read_bytes() for path in disk.iterdir()}
            if limit == "nr_inodes":
                subprocess.run(["mount", "-o", f"remount,nr_inodes={len(before) + 1}", disk], check=True)
            done = mtp(*filled(line, {**places, "NEW": str(disk / "NEW")}), cwd=tmp_path, timeout=300)
            heads = [row.split()[0] for row in done.stderr.splitlines() if row.strip()]
            told = done.stdout if verb == "preflight" else done.stderr
            is_whole = all(path.read_bytes() == content for path, content in before.items())
            left = [path for path in disk.rglob("*") if path.is_file() and path not in before and path.stat().st_size]
        is_told = "free there" in told and "Traceback" not in done.stderr
        is_told &= verb == "preflight" or (heads.count("error:"), heads[-2:]) == (1, ["found", "hint"])
        writes = "NEW" in line and "--dry-run" not in line
        if (not is_whole) or left or (is_told, done.returncode != 0) != (writes, writes):
            wrong[verb] = (done.returncode, is_whole, left, done.stderr[-1000:])
    assert not wrong


READ = {
    ("generate", "--prompts"),
    ("generate", "--tree"),
    ("bench decode", "--prompts"),
    ("eval code", "--data"),
    ("eval induction", "--data"),
    ("eval polynomial", "--data"),
    ("report page", "--sample-text"),
}
OPTIONS = [
    (verb, option.opts[-1])
    for verb, command in commands().items()
    for option in command.params
    if option.metavar in ("FILE", "PNG") and (verb, option.opts[-1]) not in READ
]
"""Options that name a file to be written; a new one is in the table by itself."""


def test_the_table_has_the_options_for_files() -> None:
    assert len(OPTIONS) >= 15
    assert {option for _, option in OPTIONS} == {"--json", "--png", "--plot", "--picture", "--out", "--html"}


@pytest.mark.parametrize(("verb", "option"), OPTIONS)
def test_targets_that_cannot_be_written_are_refused_at_once(verb: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    picture = option in ("--png", "--plot", "--picture", "--html")
    targets = {
        "folder.png": "a folder",
        "file/x.png": "beneath the file",
        "x" * 300 + ".png": "name too long",
        **({} if verb == "plan" else {"-": "-"}),  # where it is stdout
    }
    targets |= {"a.xyz": "a.xyz", "a": "a"} if picture else {}
    for target, found in targets.items():
        path = target if target == "-" else str(tmp_path / target)
        dummy = [] if verb == "bench data" else ["no-such-thing"]
        result = CliRunner().invoke(app, [*verb.split(), *dummy, option, path])
        assert result.exit_code == RunFolderError.exit_code, (target, result.output, result.exception)
        assert [line.split()[0] for line in result.stderr.splitlines()] == ["error:", "found", "hint"]
        assert option in result.stderr.splitlines()[0]
        assert found in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]

"""`mtp eval code` on a tiny model: whole, killed and taken up, scored later, refused."""

import json
import shutil
import time

import pytest
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.errors import SandboxError
from mtp_lightning.evaluation.code.sandbox import Sandbox
from tests.checkpoint.runs import save_run
from tests.evaluation.code import problem_files as files
from tests.evaluation.code.test_sandbox import is_empty
from tests.support import warm
from tests.support.tiny import tiny_model, tiny_recipe

pytestmark = pytest.mark.xdist_group("sandbox")
SAMPLING = (
    "--samples",
    "2",
    "--temperatures",
    "0,1",
    "--k",
    "1,2",
    "--max-new-tokens",
    "24",
    "--rows",
    "2",
    "--execute",
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    recipe = tiny_recipe(
        model={"vocab_size": 257, "initializer_range": 0.5, "max_position_embeddings": 1200}, heads={"num_offsets": 3}
    )
    save_run(folder / "run", recipe, 1, model=tiny_model(recipe).float())
    files.write(folder / "he.jsonl", files.HUMANEVAL)
    files.write(folder / "mbpp.jsonl", files.MBPP)
    return folder


@pytest.fixture
def needs_sandbox():
    try:
        Sandbox()
    except SandboxError as refused:
        pytest.skip(f"this kernel permits no sandbox: {refused.found}")


def words(here, out, *options, tasks="humaneval", data=("he.jsonl",)):
    named = [word for name in data for word in ("--data", str(here / name))]
    return ["eval", "code", str(here / "run"), "--tasks", tasks, *named, "--out", str(out), *options]


def called(*arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_those_without_drafts_and_are_scored_later(here, tmp_path, needs_sandbox):
    out = tmp_path / "out"
    both = {"tasks": "humaneval,mbpp", "data": ("he.jsonl", "mbpp.jsonl")}
    done = called(*words(here, out, "--max-new-tokens", "16", **both))
    assert done.exit_code == 0
    assert done.output.startswith("Without --execute samples are written, and no program is run")
    assert "--execute runs and counts them" in done.output.replace("\n", " ")
    assert "as fast as without drafts, the same texts" in done.output
    assert (
        called(*words(here, tmp_path / "plain", "--max-new-tokens", "16", "--decoder", "greedy", **both)).exit_code == 0
    )
    for task in ("humaneval", "mbpp"):
        assert lines(out / task / "samples.jsonl") == lines(tmp_path / "plain" / task / "samples.jsonl")
        assert not (out / task / "verdicts.jsonl").exists()
    samples = lines(out / "humaneval/samples.jsonl")
    for sample in samples[:4]:
        sample["completion"] = f"    return x + {sample['task_id'][-1]}\n"
    files.write(out / "humaneval/samples.jsonl", samples)
    scored = called(*words(here, out, "--max-new-tokens", "16", "--execute", "--json", str(tmp_path / "json"), **both))
    assert "tokens/s" not in scored.output
    found = json.loads((out / "results.json").read_text())
    assert found == json.loads((tmp_path / "json").read_text())
    (figure,) = found["humaneval"]["pass_at_k"]
    assert (figure["value"], found["humaneval"]["passed"], found["mbpp"]["failed"]) == (4 / 6, 4, 2)
    assert figure["low"] < 4 / 6 < figure["high"]
    assert "66.7%" in scored.output


@pytest.mark.slow
def test_a_killed_evaluation_that_is_taken_up_gives_the_same(here, tmp_path, needs_sandbox):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert called(*words(here, whole, *SAMPLING)).exit_code == 0
    expected = lines(whole / "humaneval/verdicts.jsonl")
    assert len(expected) == 6 + 6 * 2
    for name, at_least in (("samples", 4), ("verdicts", 4)):
        process = warm.start(*words(here, killed, *SAMPLING), cwd=tmp_path)
        path = killed / f"humaneval/{name}.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= at_least):
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert is_empty()
        assert not (killed / "results.json").exists()
        with path.open("ab") as file:
            file.write(b'{"task_id": "Own/')  # half a line, as of a machine that died
    assert called(*words(here, killed, *SAMPLING)).exit_code == 0
    assert (killed / "humaneval/samples.jsonl").read_bytes() == (whole / "humaneval/samples.jsonl").read_bytes()
    assert lines(killed / "humaneval/verdicts.jsonl") == expected
    results = [json.loads((folder / "results.json").read_text())["humaneval"] for folder in (whole, killed)]
    assert results[0]["pass_at_k"] == results[1]["pass_at_k"]


REFUSED = {
    "another seed": (("--seed", "1"), "--seed 1, there 0"),
    "other temperatures": (("--temperatures", "0.3"), "--temperatures 0.3, there 0"),
    "longest answer": (("--max-new-tokens", "1190"), "prompts and answers together must fit the model's context"),
    "unknown task": (("--tasks", "humaneval,sums"), "must be among humaneval, mbpp, apps, codecontests"),
    "a file too many": (("--data", "x"), "must name one file for each"),
    "samples of the likeliest": (("--samples", "5"), "above 1 needs --temperatures above 0"),
    "k above all": (("--k", "10"), "must not all be above --samples 1"),
    "cold": (("--temperatures", "-1"), "must be numbers from 0 on"),
    "hot": (("--temperatures", "0,inf"), "must be numbers from 0 on"),
    "weak, not run": (("--weak-sandbox",), "needs --execute"),
    "no template": (("--data", "x", "--tasks", "mbpp"), "must name one file"),
}


SPOILT = {
    "no JSON": ("{", "samples.jsonl must be as it was written"),
    "no sample": ("{}", "line 3: {}"),
    "another": (
        '{"task_id": "x", "temperature": 0, "sample": 0, "completion": ""}',
        "sample 0 of x at temperature 0 in line 3",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_samples_that_somebody_has_spoilt_are_refused_and_kept(here, tmp_path, begun, name):
    line, found = SPOILT[name]
    out = shutil.copytree(begun, tmp_path / "out")
    path = out / "humaneval/samples.jsonl"
    texts = path.read_text().splitlines()
    path.write_text("\n".join([*texts[:2], line, *texts[2:]]) + "\n")
    before = path.read_bytes()
    done = called(*words(here, out, "--max-new-tokens", "4"))
    assert done.exit_code == 87
    assert found in " ".join(done.output.split())
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def begun(here):
    out = here / "begun"
    assert called(*words(here, out, "--max-new-tokens", "4")).exit_code == 0
    return out


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(here, begun, name):
    options, found = REFUSED[name]
    before = (begun / "humaneval/samples.jsonl").read_bytes()
    done = called(*words(here, begun, "--max-new-tokens", "4", *options))
    assert done.exit_code not in (0, 1)
    said = " ".join(done.output.replace("│", " ").split())
    assert found in said
    assert (begun / "humaneval/samples.jsonl").read_bytes() == before


def test_without_a_tokenizer_there_is_nothing_to_write(here, tmp_path):
    recipe = tiny_recipe(
        model={"vocab_size": 257}, heads={"num_offsets": 2}, data={"tokenizer": str(tmp_path / "gone")}
    )
    save_run(tmp_path / "run", recipe, 1, model=tiny_model(recipe).float())
    done = called("eval", "code", str(tmp_path / "run"), *words(here, tmp_path / "out")[3:])
    assert done.exit_code == 87
    assert "tokenizer" in done.output
    assert not (tmp_path / "out").exists()


NO_NAMESPACES = f"""
import ctypes, os, pathlib
own = os.geteuid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
pathlib.Path("/proc/self/uid_map").write_text(f"0 {{own}} 1")
pathlib.Path("/proc/sys/user/max_user_namespaces").write_text("0")
{warm.MTP}
"""


def test_a_sandbox_that_the_kernel_refuses_is_said_before_anything_is_written(here, tmp_path, needs_sandbox):
    command = words(here, tmp_path / "out", "--max-new-tokens", "4", "--limit", "2", "--execute")
    done = warm.run(*command, cwd=tmp_path, code=NO_NAMESPACES)
    assert done.returncode == SandboxError.exit_code, done.stderr
    said = " ".join(done.stderr.split())
    assert "the kernel must permit the sandbox that generated code runs in" in said
    assert "unshare: No space left on device" in said
    assert "--weak-sandbox" in said
    assert not (tmp_path / "out").exists()
    done = warm.run(*command, "--weak-sandbox", cwd=tmp_path, code=NO_NAMESPACES)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "out/humaneval/verdicts.jsonl")) == 2

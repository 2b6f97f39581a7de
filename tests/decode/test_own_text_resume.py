"""A model that writes documents may be killed at any moment: the same command goes on, to the same bytes."""

import random
import re
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.cli.app import app
from mtp_lightning.data.generated import shards as token_shards
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.decode import self_generated as own_text
from tests.data.test_build import contents
from tests.decode.own_text_builds import PROMPTS, arguments, begin_command, build_in_a_process, save_writer

OPTIONS = (
    "--max-new-tokens",
    12,
    "--validation-fraction",
    0.3,
    "--temperature",
    1.5,
    "--rows",
    3,
    "--num-documents",
    40,
)
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model, prompts of which some are there twice, and shards of a build that was never ended."""
    folder = tmp_path_factory.mktemp("own")
    save_writer(folder)
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, *PROMPTS[:3]]))
    assert build_in_a_process(arguments(folder, "whole", *OPTIONS)) == 0
    assert len(verify_shards(folder / "whole").shards) > 4
    return folder


def build(run: Path, out: str, *options: object) -> Result:
    return CliRunner().invoke(app, arguments(run, out, *(options or OPTIONS)))


def half_written(run: Path, out: str) -> Path:
    return run / f"{out}.partial-texts"


def num_texts(run: Path, out: str) -> int:
    log = half_written(run, out) / "texts.jsonl"
    return max(0, log.read_bytes().count(b"\n") - 1) if log.exists() else 0


def interrupted(run: Path, out: str, monkeypatch: pytest.MonkeyPatch, *options: object, after: int) -> Result:
    """Build until a batch is asked for that is one too many."""
    calls = iter(range(after))

    def generate(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = own_text.generate
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "generate", generate)
        return build(run, out, *options)


def counted(run: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, int]:
    """Build; return also how many batches were written."""
    calls = []

    def generate(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    original = own_text.generate
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "generate", generate)
        return build(run, out), len(calls)


def test_killed_again_and_again_it_ends_with_the_same_bytes(run: Path) -> None:
    fatal_call, num_kills, texts = 3, 0, []
    while (code := build_in_a_process(arguments(run, "killed", *OPTIONS), fatal_call=fatal_call)) != 0:
        assert code == KILLED
        num_kills, fatal_call = num_kills + 1, fatal_call + 7
        if not (run / "killed").exists():  # once the shards have their name, the texts go
            texts.append(num_texts(run, "killed"))
    assert num_kills > 5
    assert texts == sorted(texts)
    assert len(set(texts)) > 3
    assert contents(run / "killed") == contents(run / "whole")
    assert not list(run.glob("killed.partial*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whatever_touch_of_the_disk_is_the_last_the_bytes_are_the_same(run: Path) -> None:
    """At every third here; the test above dies at others."""
    assert_any_touch_may_be_the_last(run, every=3)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_whatever_touch_at_all_is_the_last_the_bytes_are_the_same(run: Path) -> None:
    assert_any_touch_may_be_the_last(run, every=1)


def assert_any_touch_may_be_the_last(run: Path, every: int) -> None:
    options, fatal_call = (*OPTIONS[:-1], 14), 0
    assert build_in_a_process(arguments(run, "few", *options)) == 0
    while True:
        fatal_call += every
        command = arguments(run, f"last_{fatal_call}", *options)
        if build_in_a_process(command, fatal_call=fatal_call) == 0:
            break
        assert build_in_a_process(command) == 0
        assert contents(run / f"last_{fatal_call}") == contents(run / "few"), fatal_call
        assert not list(run.glob(f"last_{fatal_call}.partial*")), fatal_call
    assert fatal_call > 30


@pytest.mark.slow
def test_the_command_killed_at_random_moments_goes_on(run: Path) -> None:
    rng = random.Random(3)
    options = (*OPTIONS[:-1], 400)
    assert build(run, "many", *options).exit_code == 0
    log = half_written(run, "shot") / "texts.jsonl"
    for _ in range(4):
        before = log.stat().st_size if log.exists() else 0
        process = begin_command(arguments(run, "shot", *options))
        while process.poll() is None and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() == KILLED
    done = build(run, "shot", *options)
    assert done.exit_code == 0, done.output
    assert "going on after" in done.output
    assert contents(run / "shot") == contents(run / "many")


def test_texts_that_are_there_are_not_written_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, num_whole = counted(run, "counted", monkeypatch)
    assert whole.exit_code == 0
    done = interrupted(run, "resumed", monkeypatch, after=5)
    assert done.exit_code != 0
    assert num_texts(run, "resumed") == 14  # of 11 prompts: 3 + 3 + 3 + 2, and 3 of the next round
    assert "14 texts are kept" in done.output
    done, num_rest = counted(run, "resumed", monkeypatch)
    assert done.exit_code == 0, done.output
    assert "going on after 14 texts" in done.output
    assert num_rest == num_whole - 5 > 0
    assert contents(run / "resumed") == contents(run / "counted")


def test_a_half_batch_at_the_end_is_written_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(run, "straight").exit_code == 0
    interrupted(run, "torn", monkeypatch, after=4)
    log = half_written(run, "torn") / "texts.jsonl"
    log.write_bytes(log.read_bytes()[:-3])
    done = build(run, "torn")
    assert "going on after 10 texts" in done.output  # of the last batch one is left, and written again
    assert contents(run / "torn") == contents(run / "straight")


def test_what_was_written_before_a_kill_is_not_let_in_twice_after_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*OPTIONS, "--max-new-tokens", 2, "--top-k", 2, "--num-documents", 25)
    whole = build(run, "repeating", *options)
    assert re.search(r"\b[1-9]\d* duplicates left out", whole.output)
    interrupted(run, "repeated", monkeypatch, *options, after=6)
    done = build(run, "repeated", *options)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-2] == whole.output.splitlines()[-2]  # so many duplicates
    assert contents(run / "repeated") == contents(run / "repeating")


def test_texts_outlive_a_build_that_ends_when_its_shards_get_their_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "commit", commit)
        assert build(run, "nameless").exit_code != 0
    done, num_batches = counted(run, "nameless", monkeypatch)
    assert done.exit_code == 0, done.output
    assert num_batches == 0
    assert verify_shards(run / "nameless").num_documents("train") > 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--temperature", 1.25), "--temperature 1.25, begun with 1.5"),
        (("--seed", 9), "--seed 9, begun with 0"),
        (("--rows", 4), "--rows 4, begun with 3"),
        (("--num-documents", 41), "--num-documents 41, begun with 40"),
        (("--max-new-tokens", 13), "--max-new-tokens 13, begun with 12"),
        (("--validation-fraction", 0.4), "--validation-fraction 0.4, begun with 0.3"),
        (("--top-k", 7), "--top-k 7, begun with 20"),
        (("--top-p", 0.5), "--top-p 0.5, begun with 0.95"),
        (("--learn-prompts",), "--learn-prompts True, begun with False"),
    ],
)
def test_another_request_is_refused_by_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, changed: tuple[object, ...], named: str
) -> None:
    if not half_written(run, "begun").exists():
        interrupted(run, "begun", monkeypatch, after=3)
    before = contents(half_written(run, "begun"))
    done = build(run, "begun", *OPTIONS, *changed)
    assert done.exit_code == 87
    words = " ".join(done.output.split())
    assert named in words
    assert words.count("begun with") == 2  # what must hold, and nothing but this setting
    assert "hint" in words
    assert contents(half_written(run, "begun")) == before
    assert not (run / "begun").exists()


def test_another_model_or_other_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_writer(tmp_path)
    interrupted(tmp_path, "begun", monkeypatch, after=2)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "more"]))
    words = " ".join(build(tmp_path, "begun").output.split())
    assert "--prompts 9 of sha256" in words
    assert "MODEL step" not in words
    save_writer(tmp_path, step=2)  # the run has gone on
    words = " ".join(build(tmp_path, "begun").output.split())
    assert "MODEL step-00000002 of sha256" in words
    assert "begun with step-00000001 of sha256" in words
    assert "--prompts 8 of sha256" not in words


def test_a_finished_folder_is_reported_to_its_own_command_and_refused_to_others(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "whole").rglob("*")}
    half_written(run, "whole").mkdir()  # as a kill leaves it that comes when the shards have their name
    done = build(run, "whole")
    assert done.exit_code == 0, done.output
    assert "has been built from this model" in done.output
    assert not half_written(run, "whole").exists()
    done = build(run, "whole", *OPTIONS, "--seed", 4)
    assert done.exit_code == 87
    assert "must be new or empty" in " ".join(done.output.split())
    assert {path: path.stat().st_mtime_ns for path in (run / "whole").rglob("*")} == before
    assert not half_written(run, "whole").exists()


def test_a_build_that_fails_before_its_first_text_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert interrupted(run, "nothing", monkeypatch, after=0).exit_code != 0
    assert not list(run.glob("nothing*"))

"""`mtp eval induction` and `mtp eval polynomial`: counted as plain loops count; what is no such task is refused."""

import json

import pytest
import scipy.stats
import torch
from typer.testing import CliRunner

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.cli.app import app
from mtp_lightning.data.probes.polynomials import problems
from mtp_lightning.data.probes.stories import stories, tokenizer_json
from mtp_lightning.data.probes.write import write_probe
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.errors import DataError, DecodingError, MtpError
from mtp_lightning.evaluation.kept_reports import OF_PROBES
from mtp_lightning.evaluation.probes import PROBES, Problem, accuracy, measure_probe, predict
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT, mtp

SMALL = (
    *("model.hidden_size=16", "model.num_hidden_layers=3", "model.num_attention_heads=2", "model.intermediate_size=32"),
    *("heads.num_offsets=2", "data.seq_len=64", "batch.global_batch_size=4", "batch.micro_batch_size=4"),
    *("run.steps=8", "run.validate_every_steps=8", "checkpoint.every_steps=8", "run.validation_samples=4"),
    *("optimizer.warmup_steps=2", "optimizer.lr=1e-2", "data.validation_fraction=0.2"),
)


def trained(folder, probe):
    """Write a task and train a model on it for a few steps; return the run and the file of problems."""
    rows, tested = {
        "polynomial": (problems(60, 0, is_test=False), problems(1, 0, is_test=True)),
        "induction": (stories(60, 0, is_test=False), stories(6, 0, is_test=True)),
    }[probe]
    write_probe(folder / "task", train=(60, rows), test=(10, tested), tokenizer=tokenizer_json())
    own = [f"run.dir={folder}/run", f"run.cache={folder}/cache", f"data.corpus=[{folder}/task/train.jsonl]"]
    own += [f"data.tokenizer={folder}/task/tokenizer.json"] if probe == "induction" else []
    assert train(load_recipe(ROOT / f"recipes/probes/{probe}/short/1m.yaml", [*SMALL, *own])) == 0
    return folder / "run", folder / "task/test.jsonl"


@pytest.fixture(scope="module")
def polynomial(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("polynomial"), "polynomial")


@pytest.fixture(scope="module")
def induction(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("induction"), "induction")


@torch.no_grad()
def likeliest(model, tokens):
    """Return what the main head says after a text, by itself and unpadded."""
    given = torch.tensor([tokens + [0] * model.num_offsets])
    states = model.hidden_states(given, torch.zeros_like(given))
    return int(model.unembedding.logits(1, states[1])[0, -1].argmax())


def test_a_trial_is_right_when_greedy_decoding_gives_all_of_it(polynomial):
    _, model = load_model(polynomial[0])
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # what has been learnt says the same at all places
        parameter.data.normal_(std=0.5, generator=draw)
    asked, expected = [], []
    for number, row in enumerate(problems(2, 7, is_test=True)):
        tokens = list(row["prompt"].encode())
        begin = len(tokens)
        for _ in range(5):
            tokens.append(likeliest(model, tokens))
        if number % 3 == 1:  # at any place, the last one included; what follows is right or wrong as it happens
            tokens[begin + number % 5] = 7
        asked.append(Problem(tokens, [list(range(begin, begin + 5)), [begin]], "x"))
        expected.append([number % 3 != 1, number % 3 != 1 or number % 5 > 0])
    assert len({len(problem.tokens) for problem in asked}) > 5
    assert all(len(set(problem.tokens[-5:])) > 1 for problem in asked)
    assert predict(model, asked) == expected


def test_repeated_names_count_as_plain_loops_count(induction):
    run, file = induction
    recipe, model = load_model(run)
    tokenizer = open_tokenizer(recipe.data.tokenizer)
    right = trials = 0
    for row in map(json.loads, file.read_text().splitlines()):
        tokens = tokenizer.encode(row["text"].encode()).tolist()
        for name in row["names"]:
            own = tokenizer.encode(name.encode()).tolist()
            mentions = [place for place in range(len(tokens) - 1) if tokens[place : place + 2] == own]
            for place in mentions[1:]:
                right += likeliest(model, tokens[: place + 1]) == own[1]
                trials += 1
    (found,) = measure_probe("induction", run, file).accuracies
    assert (found.num_right, found.num_trials) == (right, trials)
    assert trials > 60


def test_names_are_found_in_bytes_and_where_letters_take_several():
    row = {"text": "Où? Qz, Qzar et éQz, Qz. é (Qz)", "names": ["Qz"]}
    for prefix in ("", "é"):
        text = prefix + row["text"]
        problem = PROBES["induction"](row | {"text": text}, "line 1", open_tokenizer("byte"))
        places = [place for (place,) in problem.trials]
        assert [bytes(problem.tokens[place - 1 : place + 1]) for place in places] == [b"Qz", b"Qz"]
        assert places[0] == text.encode().index(b"Qz.") + 1


def test_the_interval_is_that_of_wilson_and_wider_when_rows_differ():
    own = accuracy("x", [(1, 1)] * 30 + [(0, 1)] * 10)
    wilson = scipy.stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert (own.low, own.high) == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    alike, apart = accuracy("x", [(3, 4)] * 9 + [(2, 4)]), accuracy("x", [(4, 4)] * 7 + [(1, 4), (0, 4), (0, 4)])
    assert (alike.num_right, apart.num_right) == (29, 29)
    assert alike.high - alike.low < apart.high - apart.low
    none, one = accuracy("x", [(0, 4)] * 10), accuracy("x", [(0, 1)])
    assert none.low == 0 < none.high < one.high < 1


def test_what_is_measured_of_a_run_is_kept(polynomial, capsys):
    run, file = polynomial
    calls = []
    keeper, report = OF_PROBES["polynomial"], measure_probe("polynomial", run, file)
    for settings in ({"data": "a"}, {"data": "a"}, {"data": "b"}):
        assert keeper.measured(run, settings, lambda: calls.append(1) or report) == report
    assert len(calls) == 2
    assert keeper.read(run) == report
    (run / "polynomial.json.tmp").mkdir()  # as where the disk is full
    assert keeper.measured(run, {"data": "c"}, lambda: report) == report
    assert "report compare will not show these figures: " in capsys.readouterr().err
    (run / "polynomial.json.tmp").rmdir()


WRONG = {
    "a story of bytes": ("polynomial", "induction", None, "two tokens of the model's tokenizer"),
    "polynomials of words": ("induction", "polynomial", None, "must know all of a problem"),
    "another task": ("polynomial", "polynomial", {"text": "a"}, "must have `prompt` and `completion`"),
    "no operations": ("polynomial", "polynomial", {"prompt": "1=", "completion": "1"}, "`operations`"),
    "no answer": ("polynomial", "polynomial", {"prompt": "1=", "completion": "", "operations": 1}, "`completion`"),
    "no names": ("induction", "induction", {"text": "The hat."}, "must have `text` and `names`"),
    "an empty name": ("induction", "induction", {"text": "The hat.", "names": [""]}, "`names`"),
    "names once": ("induction", "induction", {"text": "Bafa had a hat.", "names": ["Bafa"]}, "something to predict"),
    "a long story": ("induction", "induction", {"text": "Bafa " * 2000, "names": ["Bafa"]}, "fit the model's context"),
    "a long problem": (
        *("polynomial", "polynomial", {"prompt": "1" * 1100, "completion": "1", "operations": 0}),
        "fit the model's context of 1,024 tokens",
    ),
    "a list": ("polynomial", "polynomial", [1], "must be a JSON object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_such_task_is_refused(case, polynomial, induction, tmp_path):
    model, probe, row, expected = WRONG[case]
    runs = {"polynomial": polynomial, "induction": induction}
    file = runs[probe][1]
    if row is not None:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
    with pytest.raises((DataError, DecodingError), match=expected) as caught:
        measure_probe(probe, runs[model][0], file)
    assert caught.value.found
    assert caught.value.hint


def test_a_file_that_is_empty_or_missing_is_refused(polynomial, tmp_path):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(MtpError, match="something to predict"):
        measure_probe("polynomial", polynomial[0], tmp_path / "none.jsonl")
    done = CliRunner().invoke(app, ["eval", "polynomial", str(polynomial[0]), "--data", str(tmp_path / "away.jsonl")])
    assert done.exit_code
    assert "must be readable" in done.output


@pytest.mark.slow
def test_an_experiment_from_its_data_to_its_table(tmp_path):
    for probe, values, seeds in (("induction", "1,2", [0, 1]), ("polynomial", "1,4", [0])):
        spelled, amounts = str(len(seeds)), ("--documents", "80", "--test", "2")
        recipe = ROOT / f"recipes/probes/{probe}/short/1m.yaml"
        small = (*SMALL[:1], "model.num_hidden_layers=5", *SMALL[2:4], *SMALL[5:])
        steps = [
            ("data", "probe", probe, f"probes/{probe}", *amounts),
            (
                "sweep",
                str(recipe),
                "--vary",
                f"heads.num_offsets={values}",
                "--seeds",
                spelled,
                "--out",
                f"runs/{probe}",
            ),
            ("eval", probe, f"runs/{probe}", "--data", f"probes/{probe}/test.jsonl", "--json", f"{probe}.json"),
            ("report", "compare", f"runs/{probe}", "--json", f"compared-{probe}.json"),
        ]
        steps[1] = (*steps[1], *small, "run.steps=4", "run.validate_every_steps=4", "checkpoint.every_steps=4")
        if probe == "polynomial":
            steps[2] = (*steps[2], "--plot", "p.png")
        for arguments in steps:
            done = mtp(*arguments, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        measured = json.loads((tmp_path / f"{probe}.json").read_text())
        compared = json.loads((tmp_path / f"compared-{probe}.json").read_text())
        assert len(measured) == 2 * len(seeds)
        assert [group["seeds"] for group in compared] == [seeds, seeds]
        assert f"{probe}, accuracy" in done.stdout
        group = measured[0]["accuracies"][0]["group"]
        own = [one["accuracies"][0]["value"] for one in measured if one["recipe"] == compared[0]["recipe"]]
        assert compared[0]["figures"][f"{probe}_{group}"]["mean"] == pytest.approx(sum(own) / len(seeds))
    assert (tmp_path / "p.png").stat().st_size > 10_000

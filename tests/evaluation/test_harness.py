"""Figures of tasks are those of lm-evaluation-harness's own class for transformers, on the folder that we export."""

import json
import subprocess

import pytest
import torch

from mtp_lightning.errors import DataError, DecodingError, RunFolderError

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'mtp_lightning[eval]'")
transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
pytest.importorskip("accelerate", reason="needs accelerate, which lm-evaluation-harness's own class imports")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from mtp_lightning.evaluation.harness import HarnessModel, lm_eval  # noqa: E402
from mtp_lightning.evaluation.harness_tasks import evaluate_tasks, load_tasks  # noqa: E402
from mtp_lightning.evaluation.harness_text import HarnessText  # noqa: E402
from tests.evaluation.harness_models import (  # noqa: E402
    CONTEXT,
    TASKS,
    WORDS,
    documents,
    write_byte_model,
    write_model,
    write_tasks,
)
from tests.support.fatal import small_file_system  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning"
)
TOKENIZERS = (
    pytest.param("byte level, ChatML", marks=pytest.mark.slow),
    pytest.param("a begin of sequence, Llama 3", marks=pytest.mark.slow),
    "metaspace",
    pytest.param("bytes", marks=pytest.mark.slow),
    pytest.param("unigram", marks=pytest.mark.slow),
    pytest.param("tokens that strip", marks=pytest.mark.slow),
)
PAIRS = (
    ("", "the"),
    ("", " the quick brown fox"),
    ("", "\n"),
    ("the quick", " brown"),
    ("the quick ", "brown"),
    ("the quick   ", " brown fox"),
    ("the quick\n", "brown"),
    ("地图 🦊", " naïve café"),
    ("the quick", " 🦊🦊"),
    ("a", " b"),
    ("a", " c"),
    ("a", " b c"),
    (" ".join(["quick fox"] * 90), " jumped over"),
    ("said", " " + " ".join(["fox"] * 20)),
    ("<s>the quick", " brown"),
    ("</s>", " the"),
    ("the<|im_end|>", " quick"),
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def both(request, tmp_path_factory):
    """Our model, and the judge on its export."""
    base = tmp_path_factory.mktemp("model")
    is_bytes = request.param == "bytes"
    folder = write_byte_model(transformers, base) if is_bytes else write_model(transformers, base, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_RANK", raising=False)  # left by a fit: the judge would wait for others
        judge = HFLM(pretrained=str(folder / "exported"), device="cpu", batch_size=4)
    return HarnessModel(folder / "ours"), judge


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(transformers, tmp_path_factory.mktemp("model"), "byte level, ChatML")
    return HarnessModel(folder / "ours")


def asked(kind, *arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_continuations_score_as_in_transformers(both):
    ours, judge = both
    found = ours.loglikelihood(asked("loglikelihood", *PAIRS))
    expected = judge.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    for pair, own, other in zip(PAIRS, found, expected, strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-4), pair
        assert own[1] == other[1], pair
    assert len({score for score, _ in found}) > 12


def test_whole_texts_score_as_in_transformers(both, monkeypatch):
    """Without the judge's cache, which takes scores of other places for windows that differ in their split alone."""
    ours, judge = both
    monkeypatch.setattr(judge, "logits_cache", False)
    texts = [("",), ("the",), (" the quick\n",), ("地图 🦊 " * 70,), ("the quick brown fox " * 55,), ("<s>fox",)]
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    assert found == pytest.approx(
        judge.loglikelihood_rolling(asked("r", *texts), disable_tqdm=True), abs=1e-3, rel=1e-6
    )
    assert ours.text.tokenizer.opening or found[0] == 0
    assert found[3] < -500


def test_generated_texts_are_those_of_transformers(both, monkeypatch):
    """A row at a time: in a batch the judge goes on behind a stop that is a special token until all rows have ended."""
    ours, judge = both
    monkeypatch.setattr(judge, "batch_size_per_gpu", 1)
    until = [["\n"], ["q", "e", "1"], [" the"], "fox", ["<|im_end|>", "</s>", "<s>"], []]
    contexts = ["the quick", "the quick ", "地图", "<s>the", "the quick brown fox " * 50]
    requests = [
        (context, {"until": stops, "max_gen_toks": length})
        for context in contexts
        for stops in until
        for length in ((1, 24, CONTEXT - 5) if stops == ["\n"] else (24,))
    ]
    assert ours.generate_until(asked("generate_until", *requests)) == judge.generate_until(
        asked("generate_until", *requests), disable_tqdm=True
    )


def test_texts_are_drafted(model):
    model.generate_until(asked("generate_until", *((word, {"max_gen_toks": 60}) for word in WORDS)))
    assert model.drafting() > 1


@pytest.mark.parametrize("num_fewshot", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_tasks_have_the_figures_of_transformers(both, num_fewshot, tmp_path):
    ours, judge = both
    docs = documents()
    written = judge.generate_until(
        asked("g", *((f"Q: {doc['question']}\nA:", TASKS["answers"]["generation_kwargs"]) for doc in docs[:6])),
        disable_tqdm=True,
    )
    for doc, text in zip(docs, written, strict=False):
        doc["answer"] = text  # so that some answers match
    folder = write_tasks(tmp_path / "tasks", docs)
    found = evaluate_tasks(ours, ["*"], include_path=folder, num_fewshot=num_fewshot, bootstrap_iters=0)
    manager, tasks = load_tasks(["*"], folder)
    expected = simple_evaluate(
        model=judge, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, bootstrap_iters=0
    )
    assert found["results"].keys() == TASKS.keys()
    if num_fewshot == 0:  # else what a random model of a tokenizer trained by threads writes is chance
        assert found["results"]["answers"]["rougeL,none"] > 0
        assert found["results"]["answers"]["exact_match,none"] >= 0.5
    for name, figures in expected["results"].items():
        own = {key: value for key, value in figures.items() if not isinstance(value, str)}
        assert {key: found["results"][name][key] for key in own} == pytest.approx(own, abs=1e-4, rel=1e-4), name
    assert found["n-shot"] == expected["n-shot"]


def test_files_of_results_are_all_written_or_none_and_figures_are_told_before(model, tmp_path):
    """The harness itself goes on where one cannot be written."""
    tasks, told = write_tasks(tmp_path / "tasks", documents()[:2]), []
    options = {"include_path": tasks, "bootstrap_iters": 0, "tell": told.append}
    with small_file_system(tmp_path / "disk", "8k") as disk:
        with pytest.raises(RunFolderError, match=r"No space left on device \(0.0 MiB free"):
            evaluate_tasks(model, ["*"], out=disk / "out", **options)
        assert list((disk / "out").iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        evaluate_tasks(model, ["*"], out=disk / "out", **options)
        kinds = {path.name.partition("_")[0] for path in (disk / "out").rglob("*") if path.is_file()}
        assert kinds == {"results", "samples"}
        assert len(list((disk / "out").glob("*/samples_*.jsonl"))) == len(told[1]["results"])
    assert told[0]["results"] == told[1]["results"]


def test_chats_are_written_as_by_transformers(both):
    ours, judge = both
    if ours.recipe.data.tokenizer == "byte":
        pytest.skip("bytes have the plain layout, which transformers does not know")
    chats = [
        [{"role": "user", "content": "Hi 🦊"}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes "},
            {"role": "user", "content": "So"},
        ],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
    ]
    for chat in chats:
        assert ours.apply_chat_template(chat) == judge.apply_chat_template(chat)
    for said in ("It is", "It is "):
        opened = [*chats[0], {"role": "assistant", "content": said}]
        assert ours.apply_chat_template(opened, add_generation_prompt=False) == judge.apply_chat_template(opened, False)
    assert ours.chat_template(True) == judge.chat_template(True)


def test_a_batch_too_large_for_memory_is_halved(model, monkeypatch):
    requests = asked("loglikelihood", *((f"{number} quick", " brown") for number in range(30)))
    expected, sizes, score = model.loglikelihood(requests), [], model._score

    def short_of_memory(self, rows):
        sizes.append(len(rows))
        if len(rows) > 4:
            raise torch.OutOfMemoryError
        return score(rows)

    monkeypatch.setattr(HarnessModel, "_score", short_of_memory)
    found = model.loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert max(sizes) > 4
    assert sum(size for size in sizes if size <= 4) == 30


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_scores_do_not_depend_on_the_batch(model, batch_size, monkeypatch):
    expected = model.loglikelihood(asked("loglikelihood", *PAIRS))
    monkeypatch.setattr(model, "batch_size", batch_size)
    found = model.loglikelihood(asked("loglikelihood", *PAIRS))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_texts_are_drawn_as_a_task_says(model):
    def drawn(**told):
        return model.generate_until(asked("g", *[("the quick", {"until": [], "max_gen_toks": 8, **told})] * 6))

    assert len(set(drawn())) == 1
    assert len(set(drawn(do_sample=True, temperature=1.0))) > 1
    assert len(set(drawn(temperature=0.9, top_p=0.99, top_k=500))) > 1
    assert set(drawn(do_sample=True, temperature=1.0, top_k=1)) == set(drawn(do_sample=False, temperature=0.7))
    assert set(drawn(num_beams=1)) == set(drawn())


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"num_beams": 4}, "num_beams: 4"),
        ({"repetition_penalty": 1.3}, "repetition_penalty"),
        ({"max_gen_toks": CONTEXT}, "below the context"),
        ({}, "max_gen_toks"),  # the default is longer than this context
        ({"max_gen_toks": 0}, "at least 1"),
        ({"max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "top_p": 2.0}, "top-p"),
    ],
)
def test_settings_that_no_decoder_has_are_refused(model, told, said):
    with pytest.raises(DecodingError, match=said):
        model.generate_until(asked("g", ("the", told)))


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("", ""), "tokens of its own"),
        (("the quick", ""), "tokens of its own"),
        (("the", " " + "fox 37 " * 200), "must fit the context"),
        (("the \ud800", " x"), "UTF-8"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(model, pair, said):
    with pytest.raises((DataError, DecodingError), match=said):
        model.loglikelihood(asked("loglikelihood", pair))


WRONG_TASKS = {
    "unknown": ("choises", {}, "Did you mean: choices"),
    "not YAML": ("broken", "task: [", "Passed over: .*broken.yaml"),
    "no data file": ("choices", {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl"),
    "no such split": ("choices", {"test_split": "tests"}, "tests"),
    "a metric from a hub": ("choices", {"metric_list": [{"metric": "cider"}]}, "cider"),
    "runs code": ("choices", {"unsafe_code": True}, "mtp eval code"),
    "data of a hub": ("choices", {"dataset_path": "org/some_data", "dataset_kwargs": {}}, "dataset_path: json"),
}


@pytest.mark.parametrize("case", WRONG_TASKS)
def test_tasks_that_cannot_be_run_are_refused(model, case, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    manager = lm_eval.tasks.TaskManager  # without its 14,000 stock tasks, which take seconds to look at
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **how: manager(**how | {"include_defaults": False}))
    name, change, said = WRONG_TASKS[case]
    folder = write_tasks(tmp_path, documents())
    path = folder / f"{name}.yaml"
    if isinstance(change, str):
        path.write_text(change)
    elif change:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        evaluate_tasks(model, [name], include_path=folder)


def test_a_model_without_a_tokenizer_is_refused(model):
    recipe = model.recipe
    bare = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": "byte"})})
    with pytest.raises(DataError, match="must have its tokenizer"):
        HarnessText(bare)

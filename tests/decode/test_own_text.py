"""Shards of a model's own text: its words after the prompts, none twice, prompts read only."""

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.cli.app import app
from mtp_lightning.data.shards.build import BuildOptions, build_shards
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.mapped import ShardMaps
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.decode import generate
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.checkpoint.runs import flip_a_byte
from tests.decode.own_text_builds import PROMPTS, arguments, save_writer
from tests.support.runs import ROOT

END = 256


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of a tiny model, and prompts."""
    folder = tmp_path_factory.mktemp("own")
    save_writer(folder)
    return folder


def build(run, out, *options, prompts="prompts.txt") -> Result:
    return CliRunner().invoke(app, arguments(run, out, *options, prompts=prompts))


def documents_in(folder, split):
    """Tokens and mask of every document."""
    maps = ShardMaps(folder, split)
    for place in range(len(maps.shards)):
        for start, length in zip(*maps[place].document_places(), strict=True):
            tokens, mask = (read([start], length)[0].tolist() for read in _readers(maps[place]))
            yield tokens, mask


def _readers(shard):
    import numpy as np

    return (
        lambda starts, width: shard.tokens(np.array(starts), width),
        lambda starts, width: shard.loss_mask(np.array(starts), width),
    )


def all_documents(folder):
    return [document for split in ("train", "validation") for document in documents_in(folder, split)]


OPTIONS = ("--max-new-tokens", 20, "--validation-fraction", 0.3)


def test_greedy_documents_are_what_generate_says(run):
    done = build(run, "greedy", "--temperature", 0, "--num-documents", 50, *OPTIONS)
    assert done.exit_code == 0, done.output
    model = load_model(run / "run")[1]
    prompts = [list(prompt.encode()) for prompt in PROMPTS]
    texts = generate(model, prompts, max_new_tokens=20, stop_tokens=[END]).tokens
    expected = {}
    for prompt, text in zip(prompts, texts, strict=True):
        cut = [] if text[-1] == END else [END]
        mask = [False] * len(prompt) + [True] * len(text) + [False] * len(cut)
        expected[tuple(prompt + text + cut)] = mask
    assert {tuple(tokens): mask for tokens, mask in all_documents(run / "greedy")} == expected
    assert "50 documents were asked for" in done.output
    verify_shards(run / "greedy")


def test_sampled_documents_are_as_many_as_wanted_and_none_is_there_twice(run):
    done = build(run, "sampled", "--temperature", 1.5, "--num-documents", 30, "--rows", 3, *OPTIONS)
    assert done.exit_code == 0, done.output
    documents = all_documents(run / "sampled")
    assert len(documents) == 30 == len({tuple(tokens) for tokens, _ in documents})
    beginnings = [bytes(t for t, is_learnt in zip(*document, strict=True) if not is_learnt and t < END).decode()
                  for document in documents]  # fmt: skip
    assert {text.rstrip("\0") for text in beginnings} == set(PROMPTS)
    again = build(run, "again", "--temperature", 1.5, "--num-documents", 30, "--rows", 3, *OPTIONS)
    assert again.exit_code == 0
    assert all_documents(run / "again") == documents
    other = build(run, "other", "--temperature", 1.5, "--num-documents", 30, "--seed", 99, *OPTIONS)
    assert other.exit_code == 0
    assert all_documents(run / "other") != documents


def test_repeated_prompts_give_one_document(run):
    (run / "twice.txt").write_text("\n".join([*PROMPTS, *PROMPTS]))
    done = build(run, "twice", "--temperature", 0, "--num-documents", 50, *OPTIONS, prompts="twice.txt")
    assert done.exit_code == 0, done.output
    assert len(all_documents(run / "twice")) == len(PROMPTS)
    assert f"{len(PROMPTS)} duplicates left out" in done.output


def test_documents_of_a_prompt_are_held_out_together(run):
    build(run, "split", "--temperature", 1.5, "--num-documents", 40, *OPTIONS)
    heads = [
        {bytes(t for t, learnt in zip(*document, strict=True) if not learnt and t < END) for document in part}
        for part in (documents_in(run / "split", "train"), documents_in(run / "split", "validation"))
    ]
    assert heads[0]
    assert heads[1]
    assert not heads[0] & heads[1]


def test_prompts_may_be_targets_and_come_from_shards(run):
    (run / "texts").mkdir()
    for number, prompt in enumerate(PROMPTS):
        (run / "texts" / f"{number}.txt").write_text(prompt * 3)
    build_shards([str(run / "texts")], run / "shards", BuildOptions(validation_fraction=0.3), show_progress=False)
    options = ("--prompt-tokens", 5, "--learn-prompts", "--temperature", 0, *OPTIONS)
    done = build(run, "learnt", *options, prompts="shards")
    assert done.exit_code == 0, done.output
    train_texts = {bytes(tokens[:5]) for tokens, _ in documents_in(run / "shards", "train")}
    found = all_documents(run / "learnt")
    assert {bytes(tokens[:5]) for tokens, _ in found} == train_texts
    assert all(all(mask[:-1]) for _, mask in found)


def test_a_run_trains_on_them(run):
    assert build(run, "for_training", "--temperature", 1.5, "--num-documents", 60, *OPTIONS).exit_code == 0
    assert load_manifest(run / "for_training").is_masked("train")
    options = ["run.steps=2", f"run.dir={run}/trained", f"data.shards={run}/for_training", "run.validation_samples=2"]
    options += [
        "data.seq_len=16",
        "batch.global_batch_size=4",
        "batch.micro_batch_size=2",
        "run.threads=1",
        f"run.cache={run}/c",
    ]
    assert train(load_recipe(ROOT / "recipes/debug/parallel.yaml", options)) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-new-tokens", 5000), "max_position_embeddings"),
        (("--validation-fraction", 1e-9, "--max-new-tokens", 3), "8 prompts that all fall into one split"),
        (
            ("--num-documents", 2, "--validation-fraction", 0.2, "--max-new-tokens", 3),
            "fraction 0.388, which holds out one",
        ),
        (("--num-documents", 1, *OPTIONS), "both splits must get at least one document"),
    ],
)
def test_what_cannot_be_is_refused(run, options, words):
    done = build(run, "refused", *options)
    assert done.exit_code != 0
    assert words in " ".join(f"{done.output} {done.exception}".split())
    assert not (run / "refused").exists()
    assert not list(run.glob("refused.partial*"))


def test_a_damaged_model_writes_nothing(tmp_path):
    save_writer(tmp_path)
    flip_a_byte(next((tmp_path / "run/checkpoints").glob("*/model-*")))
    done = build(tmp_path, "refused", *OPTIONS)
    assert done.exit_code == 3
    assert "sha256" in done.output
    assert not list(tmp_path.glob("refused*"))


def test_a_folder_with_something_in_it_is_left_alone(run):
    (run / "taken").mkdir()
    (run / "taken/note").write_text("mine")
    done = build(run, "taken")
    assert done.exit_code != 0
    assert "must be new or empty" in " ".join(done.output.split())
    assert (run / "taken/note").read_text() == "mine"

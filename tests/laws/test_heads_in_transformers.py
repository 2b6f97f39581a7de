"""Law 18 in stock transformers: heads of every kind draft there as they do here, by the code in the exported folder."""

import ast
import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export import folder_code
from mtp_lightning.checkpoint.export.hf_mtp import CODE
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.decode import generate
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.recipe.draft_vocabulary import packed_ids
from tests.checkpoint.runs import is_same_model, save_run
from tests.checkpoint.stock import (
    FAMILIES,
    NEW_TOKENS,
    PROMPTS,
    assert_drafts_as_ours,
    exported,
    first_right,
    loaded,
    said_by,
    tiny,
)
from tests.support.architectures import architecture_recipe
from tests.support.tiny import HEAD_KINDS

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers with MTP: pip install 'mtp_lightning[judge]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
KINDS = HEAD_KINDS | {
    "sequential_two_layers": {"kind": "sequential", "layers_per_head": 2, "layers_from_trunk": False},
}
DRAFTED = {"draft_vocabulary": 7, "draft_token_ids": packed_ids([0, 1, 3, 5, 7, 9, 11])}


DAILY = {("parallel_two_layers", "mistral"), ("sequential", "qwen2")}
"""What is tested every day beside `test_export.py`, which has every kind on a trunk of Llama's kind."""


def over_all():
    """Pairs of kind, family and number: every kind on every family with one of two numbers in turn, and the rest."""
    for (row, kind), (column, family), num in product(enumerate(KINDS), enumerate(FAMILIES), (3, 1)):
        in_turn = pytest.mark.slow if (row + column) % 2 == (num == 1) else pytest.mark.matrix
        yield pytest.param(kind, family, num, marks=() if (kind, family) in DAILY and num == 3 else in_turn)


@pytest.fixture(autouse=True)
def _modules_of_folders(tmp_path, monkeypatch):
    """Keep copies of the code, which transformers makes, away from the user's."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    transformers.logging.disable_progress_bar()
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]  # kept, the next test's copy would name this one's file as its source


@pytest.mark.parametrize(("kind", "family", "num_drafts"), [*over_all()])
def test_a_folder_drafts_as_its_model_and_comes_back_bit_for_bit(kind, family, num_drafts, tmp_path):
    recipe, model = tiny(family, KINDS[kind] | {"num_offsets": num_drafts + 1})
    folder = exported(recipe, model, tmp_path)
    theirs = loaded(folder)
    assert isinstance(
        theirs, getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    )
    assert_drafts_as_ours(theirs, model)
    import_folder(folder, tmp_path / "back", Wanted())
    read, back = load_model(tmp_path / "back", dtype=torch.float32)[:2]
    assert is_same_model(back, model)
    told = {"kind", "num_offsets", "order", "layers_per_head", "unembedding", "hidden", "concatenation"}
    assert read.heads.model_dump(include=told) == recipe.heads.model_dump(include=told)


@pytest.mark.parametrize(
    ("kind", "family", "model"),
    [
        pytest.param("sequential", "qwen2", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("parallel", "llama", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("linear", "qwen3", {"rope_scaling": {"original_positions": 8}}, marks=pytest.mark.slow),
        pytest.param("sequential", "llama", {"rope_scaling": {"original_positions": 8}}, marks=pytest.mark.slow),
        pytest.param("recursive", "qwen3", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("medusa", "qwen2", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
    ],
)
def test_trunks_that_are_tied_or_turn_otherwise(kind, family, model, tmp_path):
    recipe, built = tiny(family, KINDS[kind], **model)
    assert_drafts_as_ours(loaded(exported(recipe, built, tmp_path)), built)


@pytest.mark.parametrize(
    "kind", ["parallel", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sequential", "medusa_replicated"))]
)
def test_a_draft_vocabulary_goes_along(kind, tmp_path):
    recipe, model = tiny("llama", KINDS[kind] | DRAFTED)
    folder = exported(recipe, model, tmp_path)
    assert_drafts_as_ours(loaded(folder), model)
    theirs, ids = loaded(folder), {0, 1, 3, 5, 7, 9, 11}
    seen = drafts_of(theirs)
    assert seen
    assert {*seen} <= ids
    import_folder(folder, tmp_path / "back", Wanted())
    assert load_model(tmp_path / "back")[0].heads.draft_token_ids == DRAFTED["draft_token_ids"]


def drafts_of(theirs):
    """List the tokens that are drafted for a text."""
    seen, choose = [], theirs._get_candidate_generator

    def watched(**inputs):
        generator = choose(**inputs)
        candidates = generator.get_candidates
        generator.get_candidates = lambda ids, **more: noted(ids, candidates(ids, **more))
        return generator

    def noted(ids, found):
        seen.extend(found[0][0, ids.shape[1] :].tolist())
        return found

    theirs._get_candidate_generator = watched
    theirs.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=NEW_TOKENS, do_sample=False, use_mtp=True)
    return seen


@pytest.mark.parametrize(
    "kind", ["sequential", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal", "recursive"))]
)
def test_half_precision_in_several_files(kind, tmp_path):
    """Texts of bf16 may part from ours where two scores tie; drafting changes none, and steps are ours in fp32."""
    recipe, model = tiny("llama", KINDS[kind])
    folder = exported(recipe, model, tmp_path, dtype="bf16")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = [*tensors], {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names[part::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    rounded = model.bfloat16().float()
    assert_drafts_as_ours(loaded(folder), rounded)
    theirs = loaded(folder, dtype=torch.bfloat16)
    assert {one.dtype for one in theirs.parameters()} == {torch.bfloat16}
    plain, drafted = said_by(theirs), said_by(theirs, use_mtp=True)
    assert drafted.texts == plain.texts
    assert sum(drafted.steps) < sum(plain.steps)


@pytest.mark.parametrize("kind", ["parallel", pytest.param("sequential", marks=pytest.mark.slow)])
def test_without_its_code_a_folder_is_the_next_token_model(kind, tmp_path, caplog):
    recipe, model = tiny("llama", KINDS[kind])
    folder = exported(recipe, model, tmp_path)
    plain, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(plain) is transformers.LlamaForCausalLM
    assert not told["missing_keys"]
    heads = "extra_heads." if kind == "parallel" else "model.layers."
    assert told["unexpected_keys"]
    assert all(name.startswith(heads) for name in told["unexpected_keys"])
    plain.generation_config.eos_token_id = None
    assert said_by(plain.eval()).texts == said_by(loaded(folder)).texts
    with pytest.raises((ValueError, TypeError)):
        said_by(plain, use_mtp=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parallel", "recursive"])
def test_a_model_that_transformers_saves_again_drafts_still(kind, tmp_path):
    recipe, model = tiny("qwen2", KINDS[kind])
    loaded(exported(recipe, model, tmp_path)).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE).read_text() == (tmp_path / "out" / CODE).read_text()
    assert_drafts_as_ours(loaded(tmp_path / "again"), model)


def test_a_text_ends_inside_of_drafts_as_it_does_without(tmp_path):
    recipe, model = tiny("llama", KINDS["parallel"])
    theirs = loaded(exported(recipe, model, tmp_path))
    text = said_by(theirs, [[5, 6, 7]]).texts[0]
    for end in {*text}:
        options = {"eos_token_id": end, "pad_token_id": 0}
        assert (
            said_by(theirs, [[5, 6, 7]], **options).texts == said_by(theirs, [[5, 6, 7]], use_mtp=True, **options).texts
        )
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]]), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    prompt = torch.tensor([[0, 0, 5, 6, 7]])
    assert theirs.generate(prompt, use_mtp=True, **padded)[0, 5:].tolist() == text


def test_what_cannot_be_drafted_is_refused(tmp_path):
    recipe, model = tiny("llama", KINDS["parallel"])
    theirs = loaded(exported(recipe, model, tmp_path))
    with pytest.raises(ValueError, match="batch_size = 1"):
        theirs.generate(torch.tensor([[1, 2], [3, 4]]), max_new_tokens=4, use_mtp=True)
    past = theirs(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must begin with an empty cache"):
        theirs.generate(torch.tensor([[1, 2, 3]]), past_key_values=past, max_new_tokens=4, use_mtp=True)
    with pytest.raises(ValueError, match="assistant_ensemble_weight"):
        theirs.generate(torch.tensor([[1, 2]]), max_new_tokens=4, use_mtp=True, assistant_ensemble_weight=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parallel", "recursive", "sequential"])
def test_sampled_texts_have_the_law_of_plain_sampling(kind, tmp_path):
    """The exact law of three tokens, by enumeration, against draws; the same draws are far from another law."""
    recipe, model = tiny("llama", KINDS[kind], prompts=[[1, 2, 3]], vocab_size=5)
    theirs = loaded(exported(recipe, model, tmp_path))
    law = torch.zeros(5, 5, 5)
    with torch.no_grad():
        for pair in range(25):
            first, second = divmod(pair, 5)
            probs = theirs(torch.tensor([[1, 2, 3, first, second]])).logits[0].softmax(-1)
            law[first, second] = probs[2, first] * probs[3, second] * probs[4]
    torch.manual_seed(0)
    counts = torch.zeros(5, 5, 5)
    num_draws = 800
    for _ in range(num_draws):
        drawn = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=True, top_k=0, use_mtp=True)
        counts[tuple(drawn[0, 3:].tolist())] += 1
    expected = law.flatten() * num_draws
    is_common = expected >= 5
    observed = torch.cat([counts.flatten()[is_common], counts.flatten()[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None].clamp(min=1e-9)])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert float(((observed.roll(1) - expected) ** 2 / expected).sum()) > freedom + 10 * (2 * freedom) ** 0.5


FOREIGN = {
    ("olmo2", "parallel"): [],
    ("cohere2", "chained"): [pytest.mark.slow],
    ("granite", "sequential"): [pytest.mark.slow],
    ("gpt2", "medusa"): [pytest.mark.slow],
    ("mixtral", "medusa"): [pytest.mark.slow],
    ("qwen3_moe", "linear"): [pytest.mark.slow],
    ("gpt_neox", "parallel"): [pytest.mark.slow],
    ("olmo2", "recursive"): [pytest.mark.slow],
    ("stablelm", "sequential"): [pytest.mark.slow],
    ("olmo3", "chained"): [pytest.mark.slow],
    ("phi3", "parallel"): [pytest.mark.slow],
    ("falcon", "parallel"): [pytest.mark.slow],
    ("opt", "chained"): [pytest.mark.slow],
    ("bloom", "linear"): [pytest.mark.slow],
    ("gemma2", "parallel"): [pytest.mark.slow],
    ("gpt_oss", "chained"): [pytest.mark.slow],
    ("starcoder2", "linear"): [pytest.mark.slow],
}


def noised(recipe, dtype):
    model, generator = build_model(recipe).to(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("name", "kind"), [pytest.param(*row, marks=marks) for row, marks in FOREIGN.items()])
def test_trunks_of_their_own_classes(name, kind, tmp_path):
    heads = {"kind": kind, "num_offsets": 3, "layers_from_trunk": False}
    told = {"heads": heads, "data": {"document_mask": False}}
    prompts = [[1, 4, 3, 4, 5, 6, 7, 8], [12]]
    recipe, model = first_right(lambda seed: architecture_recipe(name, run={"seed": seed}, **told), noised, prompts)
    folder = exported(recipe, model, tmp_path)
    assert_drafts_as_ours(loaded(folder), model, prompts)
    import_folder(folder, tmp_path / "back", Wanted(family="transformers"))
    assert is_same_model(load_model(tmp_path / "back", dtype=torch.float32)[1], model)


HEADS = {"num_offsets": 4}
REFUSED = {
    "family mimo": ({"family": "mimo", "qkv_bias": True}, HEADS | {"kind": "parallel"}, {}),
    "one offset": ({}, {"num_offsets": 1}, {}),
    "mixtures of layers": ({}, HEADS, {"layer_mix": {"main_head": False}}),
}


@pytest.mark.parametrize("found", REFUSED)
def test_what_the_format_cannot_hold_is_refused_with_the_formats_that_can(found, tmp_path):
    from tests.support.tiny import tiny_recipe

    model, heads, adapt = REFUSED[found]
    save_run(tmp_path / "run", tiny_recipe(model=model, heads=heads, adapt=adapt), 1)
    with pytest.raises(CheckpointError, match=f"hf_mtp cannot hold this model.*{found}.*consolidated"):
        export_model(tmp_path / "run", tmp_path / "out", "hf_mtp")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind", "order", "found"),
    [
        ("gpt2", "sequential", "causal", "GPT2LMHeadModel"),
        ("gemma2", "recursive", "causal", "windows"),
        ("gemma", "chained", "anticausal", "anticausal heads"),
        ("qwen3_next", "medusa", "causal", "carry a state"),
        ("mixtral", "parallel", "causal", "experts"),
    ],
)
def test_heads_that_foreign_trunks_cannot_have_are_refused(name, kind, order, found, tmp_path):
    heads = {"kind": kind, "order": order, "num_offsets": 3, "layers_from_trunk": False}
    save_run(tmp_path / "run", architecture_recipe(name, heads=heads, data={"document_mask": False}), 1)
    with pytest.raises(CheckpointError, match=f"hf_mtp cannot hold this model.*{found}"):
        export_model(tmp_path / "run", tmp_path / "out", "hf_mtp")


ODD_SETTINGS = [
    ("head_type", "mamba", "must be one of"),
    ("head_type", None, "must be one of"),
    ("head_type", "medusa", "num_modules|hidden_source"),
    ("num_drafts", 10**9, "num_drafts"),
    ("num_drafts", "3", "num_drafts"),
    ("num_drafts", 2, "num_modules"),
    ("layers_per_head", -1, "layers_per_head"),
    ("layers", "model.norm", "layers"),
    ("final_norm", "__class__", "final_norm"),
    ("unembedding", None, "must be one of"),
    ("draft_token_ids", "////", "set of ids"),
    ("draft_token_ids", [1, 2], "set of ids"),
    ("draft_token_ids", "not base64", "set of ids"),
]


@pytest.fixture(scope="module")
def folder_of_parallel(tmp_path_factory):
    recipe, model = tiny("llama", KINDS["parallel"])
    return exported(recipe, model, tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize(("name", "value", "told"), ODD_SETTINGS)
def test_settings_of_heads_that_no_export_wrote_are_refused(name, value, told, folder_of_parallel, tmp_path):
    folder = shutil.copytree(folder_of_parallel, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["mtp_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        import_folder(folder, tmp_path / "ours", Wanted())


@pytest.mark.parametrize("odd", [[], {"head": "parallel"}])
def test_heads_without_a_word_of_them_are_refused(odd, folder_of_parallel, tmp_path):
    folder = shutil.copytree(folder_of_parallel, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | {"mtp_config": odd}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="unexpected: extra_heads"):
        import_folder(folder, tmp_path / "ours", Wanted())


@pytest.mark.parametrize("kind", ["parallel", pytest.param("sequential_pre_norm", marks=pytest.mark.slow)])
def test_steps_notice_a_head_that_is_another_one(kind, tmp_path):
    """The text is right whatever is drafted: only the number of steps tells whether the heads are the trained ones."""
    recipe, model = tiny("llama", KINDS[kind])
    folder = exported(recipe, model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if kind == "parallel":
        tensors["extra_heads.0.layers.0.mlp.up_proj.weight"] *= -1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        config["mtp_config"]["concatenation"] = "embedding_first"
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        assert_drafts_as_ours(loaded(folder), model)


@pytest.mark.parametrize(
    "path", sorted(Path(folder_code.__file__).parent.glob("with_*.py")), ids=lambda path: path.name
)
def test_the_code_is_short_and_needs_nothing_of_this_package(path):
    text = path.read_text()
    assert text.startswith("# Copyright the mtp_lightning authors. Licensed under the Apache License, Version 2.0")
    assert len(text.splitlines()) <= 200
    nodes = [*ast.walk(ast.parse(text))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"base64", "copy", "functools", "torch", "transformers"}
    called = {getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)}
    assert not called & {"eval", "exec", "compile", "open", "__import__", "getattr", "setattr"}


ALONE = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mtp_lightning":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch, transformers
found = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    forwards = []
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    said = model.generate(torch.tensor([json.loads(sys.argv[1])]), max_new_tokens=31, do_sample=False, use_mtp=True)
    found[folder] = [said[0].tolist(), len(forwards) - 1]
assert not [name for name in sys.modules if name.startswith("mtp_lightning")]
print("FOUND", json.dumps(found))
"""


def folders_for_strangers(tmp_path, kinds):
    """Export models whose texts have no end; say of each folder what text it must give, in how many steps."""
    wanted = {}
    for kind in kinds:
        recipe, model = tiny("llama", KINDS[kind])
        folder = exported(recipe, model, tmp_path / kind)
        config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
        (folder / "config.json").write_text(json.dumps(config))
        made = generate(model, [PROMPTS[0]], max_new_tokens=31)
        wanted[str(folder)] = [[*PROMPTS[0], *made.tokens[0]], made.statistics.num_drafts]
    return wanted


def found_by(python, wanted, tmp_path):
    """Run ALONE in an interpreter that sees nothing of this process."""
    command = [python, "-I", "-c", ALONE, json.dumps(PROMPTS[0]), *wanted]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "alone"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.partition("FOUND ")[2])


@pytest.mark.slow
def test_folders_draft_in_a_process_that_cannot_import_this_package(tmp_path):
    wanted = folders_for_strangers(tmp_path, ["parallel", "sequential", "recursive"])
    assert found_by(sys.executable, wanted, tmp_path) == wanted


@pytest.mark.slow
def test_folders_draft_in_an_environment_without_this_package(tmp_path):
    """A new environment that has only torch, transformers and what they need, by links to their folders here."""
    import site

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    target = next((environment / "lib").glob("python*/site-packages"))
    for folder in map(Path, site.getsitepackages()):
        for entry in folder.iterdir():
            if "mtp_lightning" not in entry.name.lower() and not entry.name.endswith(".pth"):
                (target / entry.name).symlink_to(entry)
    wanted = folders_for_strangers(tmp_path, KINDS)
    assert found_by(str(environment / "bin" / "python"), wanted, tmp_path) == wanted

"""The CUDA law: a run trains, validates, saves and loads on a device that is not the host's, as any of its ranks.

Real trainer, strategies and engines, on CUDA tensors without memory (`tests/support/fake_cuda`). No tensors of two
devices meet; all ranks enter the same collectives, in one order and on one kind of device; products are of the type
that the recipe names; nothing of a fit is left when it ends; the peak at true size is what `mtp plan` says.
"""

import pytest

from mtp_lightning.errors import RecipeError
from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.recipe import load_recipe
from tests.support.covering import drawn_array, some_of
from tests.support.fake_cuda.client import FakeCudaError
from tests.support.fake_cuda.guard import missing
from tests.support.runs import ROOT, mtp

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

RANKS = (0, 3, 7)  # of 8: the first, one in the middle, the last
LOGGED = 2  # steps at most, each with a product in fp32 by which slow ranks are found
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SMALL = [
    "model.num_hidden_layers=5",
    "heads.num_offsets=3",
    "objective.weights.kind=curriculum",  # heads switch on one after the other: few ranks hold anything of the next
    "batch.global_batch_size=16",
    "batch.micro_batch_size=1",
    "run.steps=4",
    "run.precision=bf16",
    "logging.every_steps=2",
    "run.validate_every_steps=3",
    "checkpoint.every_steps=3",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One of two steps, trained for real on the CPU."""
    folder = tmp_path_factory.mktemp("run")
    path, run = ROOT / "recipes/debug/parallel.yaml", folder / "run"
    fields = ["run.precision=fp32", "run.steps=2", "run.validate_every_steps=2", "checkpoint.every_steps=2"]
    done = mtp("train", str(path), *SMALL, *fields, f"run.dir={run}", f"run.cache={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return str(run / "checkpoints/step-00000002")


def fields_of(kind, *overrides):
    ranks = () if kind == "single" else ("strategy.ranks_per_node=8",)
    micro = "batch.micro_batch_size=8" if "strategy.ranks_per_node=1" in (*ranks, *overrides) or not ranks else ""
    return [own for own in (*SMALL, f"strategy.kind={kind}", *ranks, micro, *overrides) if own]


def fit(gpu, kind, *overrides, recipe="debug/parallel", **options):
    path = str(ROOT / f"recipes/{recipe}.yaml")
    return gpu("fit", path=path, overrides=fields_of(kind, *overrides), **options)


def check(books, kind, precision, rank=0):
    assert books["device"] == f"cuda:{rank}"
    assert books["left_bytes"] == 0 < books["state_bytes"]
    others = books["products"].copy()
    assert others.pop(TYPES[precision]) > 100
    assert sum(others.values()) <= LOGGED, others
    assert (books["loss_scale"] > 1) == (precision == "fp16" and kind != "single")


def collectives_of(books):
    """Names, kinds of device, shapes and types, in their order."""
    own = [(name, device.split(":")[0], shape, dtype) for name, device, shape, dtype in books["collectives"]]
    return [collective for collective in own if not collective[0].startswith("join")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks"), [("single", (0,)), *((kind, RANKS) for kind in ("zero1", "zero2", "zero3"))]
)
def test_all_ranks_load_train_validate_and_save_together(gpu, checkpoint, kind, ranks):
    of_ranks = [fit(gpu, kind, rank=rank, checkpoint=checkpoint, saves=True) for rank in ranks]
    for rank, books in zip(ranks, of_ranks, strict=True):
        check(books, kind, "bf16", rank)
        assert collectives_of(books) == collectives_of(of_ranks[0])
    if kind != "single":
        names = {name for name, *_ in of_ranks[0]["collectives"]}
        assert {"gather", "gather of metrics", "allreduce_"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "overrides"),
    [
        ("zero2", "fp16", []),
        ("zero3", "fp16", []),
        ("zero2", "bf16", ["strategy.offload_optimizer=cpu"]),
        ("zero3", "bf16", ["strategy.offload_optimizer=cpu", "strategy.offload_parameters=cpu"]),
    ],
    ids=["zero2-fp16", "zero3-fp16", "zero2-offloaded", "zero3-offloaded"],
)
def test_low_precision_and_offloading_compute_in_the_type_of_the_recipe(gpu, checkpoint, kind, precision, overrides):
    fields = [f"run.precision={precision}", *overrides]
    check(fit(gpu, kind, *fields, rank=3, checkpoint=checkpoint, saves=True), kind, precision, 3)


@pytest.mark.slow
def test_one_rank_saves_a_whole_checkpoint(gpu):
    check(fit(gpu, "zero3", "strategy.ranks_per_node=1", saves=True), "zero3", "bf16")


@pytest.mark.slow
def test_a_rank_that_sees_one_gpu_takes_it(gpu):
    for kind in ("zero1", "zero3"):
        assert fit(gpu, kind, rank=3, visible_gpus=1)["device"] == "cuda:0"
    assert fit(gpu, "zero1", "strategy.num_nodes=2", "strategy.ranks_per_node=4", rank=6)["device"] == "cuda:2"


def test_ranks_are_told_apart_before_they_meet(gpu):
    found = gpu("preflight", path=str(ROOT / "recipes/debug/parallel.yaml"), overrides=fields_of("zero2"), rank=5)
    assert found == {"joined": "join with GPU 5", "reduced on": ["cuda:5"] * 3, "named": "fake H100"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "zero3"])
def test_documents_need_no_mask_of_the_window(gpu, kind):
    window = ["data.seq_len=4096", "run.steps=2", "objective.weights.kind=constant"]
    peaks = {
        (masks, precision): max(
            fit(
                gpu, kind, *window, f"data.document_mask={masks}", f"run.precision={precision}", checks_first_step=False
            )["peaks_bytes"]
        )
        for masks, precision in (("true", "bf16"), ("false", "bf16"), ("true", "fp32"), ("false", "fp32"))
    }
    mask_bytes = 4096**2
    assert peaks["true", "bf16"] - peaks["false", "bf16"] < mask_bytes / 4
    assert peaks["true", "fp32"] - peaks["false", "fp32"] > mask_bytes  # the fallback, which has one


OUR_WAITS = {
    "copy to cpu training/step/vote.py agree_on_step": "is there anything to learn, does a rank stop?",
    "copy to cpu training/strategies/param_shards.py gradient_norms": "is the step taken?",
}
DEEPSPEED_WAITS = {
    "_local_scalar_dense training/strategies/zero.py optimizer_step": "overflow and norm, its own",
    "copy to cuda training/strategies/zero.py optimizer_step": "the same",
    "synchronize training/strategies/zero.py optimizer_step": "ZeRO-3, after gathering",
}


@pytest.mark.parametrize("kind", some_of(["zero2", "single", "zero1", "zero3"], one_in=4))
def test_the_host_waits_for_what_decides_the_step_and_for_nothing_else(gpu, kind):
    plain = ["run.steps=3", "logging.every_steps=3", "objective.weights.kind=constant", "run.validate_every_steps=9"]
    plain.append("data.document_mask=true")
    waits = fit(gpu, kind, *plain, checks_first_step=False)["waits"][1]
    allowed = OUR_WAITS | ({} if kind == "single" else DEEPSPEED_WAITS)
    assert OUR_WAITS.keys() <= waits.keys() <= allowed.keys()


@pytest.mark.parametrize(
    ("mend", "kind", "overrides", "found"),
    [
        pytest.param("metrics_on_the_cpu", "zero3", [], "different devices", marks=pytest.mark.slow),
        pytest.param(
            "types_by_lightning",
            "zero3",
            ["run.precision=fp16"],
            "DeepSpeed must compute in the type of run.precision",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_without_a_mend_no_step_is_taken(gpu, mend, kind, overrides, found):
    with pytest.raises(FakeCudaError, match=found):
        fit(gpu, kind, *overrides, without=mend)


def test_without_the_choice_of_a_gpu_all_ranks_would_join_with_the_first(gpu):
    arguments = {"path": str(ROOT / "recipes/debug/parallel.yaml"), "overrides": fields_of("zero2"), "rank": 5}
    assert gpu("preflight", **arguments, without="gpus_by_rank")["joined"] == "join with GPU 0"


@pytest.mark.slow
def test_without_one_device_for_collectives_ranks_would_wait_for_each_other(gpu):
    of_ranks = [fit(gpu, "zero2", rank=rank, without="collectives_where_shards_are") for rank in RANKS]
    first, *others = (collectives_of(own) for own in of_ranks)
    assert any(own != first for own in others)


@pytest.mark.slow
def test_without_the_other_mends_a_law_fails(gpu):
    for kind in ("zero1", "zero2", "zero3"):
        assert fit(gpu, kind, without="engines_as_they_end")["left_bytes"] > 0
    assert fit(gpu, "zero3", "run.precision=fp16", without="types_unchecked")["loss_scale"] == 1
    places = ["strategy.offload_optimizer=cpu", "strategy.offload_parameters=cpu"]
    assert fit(gpu, "zero3", *places, without="types_unchecked")["products"].get("bfloat16", 0) == 0


KINDS = ("zero3", "zero2", "zero1", "single")
CHANGES = {
    "precision": {name: [f"run.precision={name}"] for name in TYPES},
    "heads": {
        "parallel": [],
        "linear": ["heads.kind=linear"],
        "medusa": ["heads.kind=medusa"],
        "causal": ["heads.kind=chained", "heads.order=causal"],
        "anticausal": ["heads.kind=chained", "heads.order=anticausal"],
        "sequential": ["heads.kind=sequential"],
        "recursive": ["heads.kind=recursive"],
    },
    "backward_order": {name: [f"objective.backward_order={name}"] for name in ("sequential", "bridged", "joint")},
    "objective": {
        "cross-entropy": [],
        "distilled": ["objective.distill={}"],
        "distilled, main head learns": ["objective.distill={detach_teacher: false}"],
        "rollout": ["objective.rollout={}"],
        "token order": ["objective.token_order={}"],
        "balanced": ["objective.balance=rms"],
        "z-loss": ["objective.z_loss=1e-4"],
    },
    "adaptation": {
        "none": [],
        "updates": ["adapt.lora={rank: 2}"],
        "mixtures": ["adapt.layer_mix={}"],
        "mixtures, updates": ["adapt.layer_mix={}", "adapt.lora={rank: 2}"],
        "frozen trunk": ["freeze=[trunk]"],
        "heads alone": ["freeze=[trunk,unembedding]"],
        "later offsets alone": ["freeze=[offsets_below_2]"],
    },
    "model": {
        "plain": [],
        "grouped queries, normed": ["model.num_key_value_heads=2", "model.qk_norm=true"],
        "tied": ["model.tie_word_embeddings=true"],
    },
    "draft vocabulary": {"whole": [], "part": ["heads.draft_vocabulary=100"]},
    "unembedding": {name: [f"heads.unembedding={name}"] for name in ("shared", "replicated")},
    "attention": {"window": [], "documents": ["data.document_mask=true"]},
    "memory": {"kept": [], "recomputed": ["memory.recompute_trunk=true", "memory.recompute_heads=true"]},
}


def is_recipe(*, kind, precision, heads, objective, adaptation, model, unembedding, **_):
    """What the schema of recipes does not refuse."""
    reads_tokens = heads in ("sequential", "recursive")
    one_unembedding = reads_tokens or model == "tied"
    all_heads_learn = heads == "anticausal" or objective == "token order"
    return not (
        (kind == "single" and precision == "fp16")
        or (unembedding == "replicated" and one_unembedding)
        or (adaptation == "later offsets alone" and all_heads_learn)
        or (objective == "rollout" and not reads_tokens)
    )


CELLS = drawn_array(is_recipe, number=2500, kind=KINDS, **CHANGES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_in_every_two_changes_of_a_recipe_a_step_is_taken(gpu, kind):
    faults = {}
    for own, *names in CELLS:
        if own == kind:
            changes = [field for name, fields in zip(names, CHANGES.values(), strict=True) for field in fields[name]]
            changes += ["run.steps=2", "run.validate_every_steps=2", "objective.weights.kind=constant"]
            changes.append("batch.global_batch_size=8")  # a micro-batch each
            try:
                check(fit(gpu, kind, *changes), kind, names[0])
            except (FakeCudaError, AssertionError) as error:
                faults[tuple(names)] = str(error)[-400:]
    assert not faults


def test_what_a_law_does_not_compute_is_refused_by_name():
    with pytest.raises(RecipeError, match="must be fp32 or bf16 for strategy.kind single"):
        load_recipe(ROOT / "recipes/debug/parallel.yaml", fields_of("single", "run.precision=fp16"))


@pytest.mark.slow
def test_13b_needs_the_memory_that_is_planned(gpu):
    """Its second step, of one micro-batch each: the first has no moments yet."""
    path, fields = ROOT / "recipes/paper/13b_n4.yaml", ["data.shards=none", "run.steps=2", "logging.every_steps=2"]
    fields.append("batch.global_batch_size=1024")
    recipe = load_recipe(path, fields).recipe
    planned = memory(shape_of(recipe), layout_of(recipe))
    books = gpu("fit", path=str(path), overrides=fields, checks_first_step=False)
    assert books["peaks_bytes"][1] == pytest.approx(planned.total - planned.overhead, rel=0.10)
    assert books["left_bytes"] == 0


@pytest.mark.slow
def test_inputs_of_recomputed_layers_leave_the_gpu(gpu):
    window = ["data.seq_len=4096", "model.num_hidden_layers=9", "run.steps=2", "objective.weights.kind=constant"]
    window += ["memory.recompute_trunk=true", "heads.num_offsets=2", "memory.mlp_tile=256"]
    here, there = (
        fit(gpu, "single", *window, f"memory.offload_activations={moved}", checks_first_step=False)
        for moved in ("false", "true")
    )
    recipe = load_recipe(ROOT / "recipes/debug/parallel.yaml", fields_of("single", *window)).recipe
    one_input_bytes = 4 * recipe.batch.micro_batch_size * 4096 * recipe.model.hidden_size
    assert max(here["peaks_bytes"]) - max(there["peaks_bytes"]) > 4 * one_input_bytes
    new = there["waits"][1].keys() - here["waits"][1].keys()
    assert not [name for name in new if "recompute.py" in name and "copy to cuda" not in name]

"""Sites: what is read, and what is refused with what would have been right."""

import os
from pathlib import Path

import pytest

from mtp_lightning.errors import LaunchError, SiteError
from mtp_lightning.launch.site import Site, known_sites, load_site
from mtp_lightning.launch.submission import check_fits_site
from mtp_lightning.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_site_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_site("local") == load_site(str(ROOT / "cluster/sites/local.yaml"))
    assert {"local", "generic-a100", "generic-h100"} <= set(known_sites())
    (tmp_path / "cluster/sites").mkdir(parents=True)
    (tmp_path / "cluster/sites/local.yaml").write_text("partition: mine\n")
    assert load_site("local").partition == "mine"


def test_sites_are_known_to_users_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run as any user, who has no entry, and where HOME is not set."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)
    assert "local" in known_sites()


def test_values_are_read_as_meant(tmp_path: Path) -> None:
    site = load_site(written(tmp_path, "memory: 0\ntime: 1-02:03:04\ninterconnect: {NCCL_IB_TC: 106}\n"))
    assert (site.memory, site.time_s, site.interconnect) == ("0", 93_784, {"NCCL_IB_TC": "106"})
    assert load_site(written(tmp_path, "time: 30\n")).time_s == 1800
    assert load_site("local", ["time=00:20:00", "partition=urgent"]).time_s == 1200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: gpu\n", ["partitoin", "Did you mean partition?", "gpus_per_node", "signal_lead_s"]),
        ("gpus_per_node: many\n", ["gpus_per_node", "integer"]),
        ("environment: {'A; rm': x}\n", ["A; rm", "letters, digits"]),
        ("time: soon\n", ["'soon'", "HH:MM:SS"]),
        ("time: 5\nsignal_lead_s: 600\n", ["600 s and 300 s"]),
        ("- a\n", ["a mapping"]),
        ("a: [\n", ["YAML"]),
        ("cpus_per_task: 99999999999999999999\n", ["cpus_per_task", "Did you mean cpus_per_rank?"]),
        ("cpus_per_rank: 99999999999999999999\n", ["cpus_per_rank", "65536"]),
        ("cpus_per_rank: 0\n", ["cpus_per_rank", "greater than"]),
        ("gpus_per_node: -1\n", ["gpus_per_node", "greater than"]),
        ("gpus_per_node: 100000\n", ["gpus_per_node", "1024"]),
        ("gpus_per_node: 0\ngpu: H100\n", ["gpus_per_node: 0 and gpu: H100", "remove gpu"]),
        ("wait_s: -3\n", ["wait_s"]),
        ("max_restarts: 99999999999999999999\n", ["max_restarts"]),
        ("time: -5\n", ["'-5'", "HH:MM:SS"]),
        ("time: 9999999-00:00:00\n", ["ten years"]),
        (f"time: {'9' * 5000}\n", ["a number of 5000 characters"]),
        (f"memory: 0x{'f' * 5000}\n", ["a number of 5002 characters"]),
        ("time: ٣٠\n", ["HH:MM:SS"]),
        ("memory: -1\n", ["'-1'", "900G"]),
        ("memory: 1G --wrap=x\n", ["'1G --wrap=x'"]),
        ('partition: "a\\nb"\n', [r"partition: 'a\nb'", "one line"]),
        ('mtp: [mtp, "\\e[2J"]\n', [r"mtp.1: '\x1b[2J'"]),
        ('container: {image: "a\\0"}\n', [r"container.image: 'a\x00'"]),
        ('environment: {A: "x\\ry"}\n', [r"environment.A: 'x\ry'"]),
        ('description: "\\e]0;gone\\a"\n', ["description", r"\x1b"]),
        ("environment: {1: x}\n", ["name variables by letters"]),
        ("[" * 50_000, ["nested without end"]),
        ("qos: !!int x\n", ["the tag !!int"]),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:30],
)
def test_wrong_sites_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(SiteError) as caught:
        load_site(written(tmp_path, text))
    assert not [word for word in words if word not in str(caught.value)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("time=[", ["site.time=[", "no YAML"]),
        ("time", ["site.KEY=VALUE"]),
        ("gpus_per_node=-1", ["gpus_per_node"]),
        ("=5", ["known keys"]),
        ("account=a\x1b[2J", [r"\x1b"]),
        (f"cpus_per_rank={'9' * 5000}", ["a number of 5000 characters"]),
    ],
)
def test_wrong_changes_are_refused(override: str, words: list[str]) -> None:
    with pytest.raises(SiteError) as caught:
        load_site("local", [override])
    assert not [word for word in words if word not in str(caught.value)]
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("content", [b"time: 5\xff\n", "time: 5\n".encode("utf-16")])
def test_a_site_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(SiteError, match="bytes that are not UTF-8"):
        load_site(str(tmp_path / "mine.yaml"))


def test_odd_names_of_sites_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for name in ("x" * 300, f"{'x' * 300}.yaml", str(tmp_path / "fifo.yaml"), ""):
        with pytest.raises(SiteError, match="the name of a site or the path"):
            load_site(name)


def test_large_and_wordy_sites_are_read(tmp_path: Path) -> None:
    text = "description: |\n  Two lines,\n  and a tab.\ncpus_per_rank: 288\nmemory: 1500gb\ntime: 30-00:00:00\n"
    site = load_site(written(tmp_path, text))
    assert (site.cpus_per_rank, site.memory, site.time_s) == (288, "1500gb", 30 * 86_400)


def test_an_unknown_site_names_the_nearest() -> None:
    with pytest.raises(SiteError, match="Did you mean generic-h100"):
        load_site("generic-h10")
    with pytest.raises(SiteError, match="nowhere.yaml"):
        load_site("nowhere.yaml")


def recipe(**strategy: object) -> Recipe:
    return Recipe.model_validate({"strategy": {"kind": "zero1", **strategy}, "run": {"dir": "/root-of-all/x"}})


@pytest.mark.parametrize(
    ("ranks", "hint"), [(16, "strategy.num_nodes=4 strategy.ranks_per_node=8"), (6, "a multiple of 8"), (3, "")]
)
def test_ranks_must_fit_the_gpus_of_a_node(ranks: int, hint: str) -> None:
    with pytest.raises(LaunchError, match="8 GPUs of a node") as caught:
        check_fits_site(recipe(num_nodes=2, ranks_per_node=ranks), Site(gpus_per_node=8))
    assert hint in caught.value.hint


def test_what_cannot_fit_is_refused_unless_forced(tmp_path: Path) -> None:
    big = load_recipe(
        ROOT / "recipes/paper/13b_n4.yaml",
        [f"run.dir={tmp_path}", "strategy.num_nodes=1", "strategy.ranks_per_node=1", "strategy.kind=zero1"],
    ).recipe
    with pytest.raises(LaunchError, match=r"79 GiB of an H100"):
        check_fits_site(big, Site(gpu="H100", node_local=[]))
    check_fits_site(big, Site(gpu="H100", node_local=[]), force=True)
    check_fits_site(big, Site(gpu=None, node_local=[]))


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    here = Recipe.model_validate(
        {"strategy": {"kind": "zero1", "num_nodes": 2, "ranks_per_node": 8}, "run": {"dir": f"{tmp_path}/run"}}
    )
    with pytest.raises(LaunchError, match="which every node has its own of"):
        check_fits_site(here, Site(node_local=[str(tmp_path)]))
    check_fits_site(here, Site(node_local=[str(tmp_path / "other")]))


def test_a_run_that_would_start_over_is_refused(tmp_path: Path) -> None:
    fresh = Recipe.model_validate({"run": {"dir": str(tmp_path), "restart": True}})
    with pytest.raises(LaunchError, match="start it over"):
        check_fits_site(fresh, Site(node_local=[]))


def test_a_file_as_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="a file"):
        check_fits_site(Recipe.model_validate({"run": {"dir": f"{tmp_path}/file/x"}}), Site())

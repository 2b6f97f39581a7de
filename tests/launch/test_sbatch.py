"""Job scripts: the text that every site gets, and that nothing in it is ever run that should not be."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mtp_lightning.errors import LaunchError, MtpError
from mtp_lightning.launch.sbatch import Job, Task, render
from mtp_lightning.launch.site import Container, Site, load_site
from tests.recipe.golden import assert_golden

ROOT = Path(__file__).parents[2]
SITES = sorted((ROOT / "cluster/sites").glob("*.yaml"))
EVERYTHING = Site(
    partition="gpu,long",
    account="proj-1",
    qos="high",
    constraint="[a|b]",
    reservation="r1",
    exclusive=True,
    cpus_per_rank=12,
    memory="900G",
    time="2-00:00:00",
    options=["--switches=1"],
    srun_options=["--cpu-bind=cores"],
    modules=["cuda/12.4", "gcc"],
    activate="/project/env/bin/activate",
    container=Container(image="/images/torch.sqsh", mounts=["/data:/data", "/project:/project"]),
    mtp=["python", "-m", "mtp_lightning"],
    environment={"HF_HOME": "/data/hf cache"},
    interconnect={"NCCL_IB_HCA": "=mlx5_0,mlx5_1"},
    scratch="/local/disk",
    signal="USR2",
)


def job(num_tasks: int = 1, name: str = "paper-13b-n4", folder: str = "/shared/runs/13b") -> Job:
    base = Path(folder)
    names = [""] if num_tasks == 1 else [f"optimizer.lr={k}e-4" for k in range(1, num_tasks + 1)]
    tasks = [Task(recipe=base / f"logs/submit_1/recipe_{k}.yaml", run=base / own) for k, own in enumerate(names)]
    return Job(name=name, num_nodes=2, ranks_per_node=4, tasks=tasks, logs=base / "logs/submit_1", cwd=Path("/home/me"))


def test_there_are_sites() -> None:
    assert {path.stem for path in SITES} >= {"generic-a100", "generic-h100", "local"}


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_script_of_a_site(path: Path) -> None:
    assert_golden(f"sbatch/{path.stem}.sh", render(job(), load_site(str(path)), path.stem))


def test_script_with_everything_as_an_array() -> None:
    assert_golden("sbatch/everything_array.sh", render(job(3), EVERYTHING, "everything"))


def following(*commands: list[str], num_tasks: int = 1, folder: str = "/shared/runs/13b") -> Job:
    return replace(job(num_tasks, folder=folder), num_nodes=1, ranks_per_node=1, commands=commands)


def test_script_of_what_comes_after_an_array() -> None:
    commands = (["bench", "decode"], ["export", "{run}", "--out", "{run}/my export", "--format", "consolidated"])
    assert_golden("sbatch/follow_array.sh", render(following(*commands, num_tasks=3), EVERYTHING, "everything"))


@pytest.mark.parametrize("path", sorted((ROOT / "tests/golden/sbatch").glob("*.sh")), ids=lambda path: path.stem)
def test_recorded_scripts_are_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False).stderr == ""


def run_head(script: str, cwd: Path) -> list[str]:
    """Run a script's own part, up to what is the same for every job, and return the words of its commands."""
    head = (
        script.partition("# From here on")[0] + 'printf "%s\\n" "${recipes[@]}" "${runs[@]}" "${mtp[@]}" "${srun[@]}"'
    )
    done = subprocess.run(["bash", "-c", head + ' "$X"'], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


EVIL = [
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "' ; touch pwned ; '",
    '"; touch pwned; "',
    "a\\",
    "* ? [a]",
]


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_that_is_given_is_run(evil: str, tmp_path: Path) -> None:
    site = Site(mtp=["mtp", evil], srun_options=[evil], environment={"X": evil}, partition=evil, options=[evil])
    given = job(name=evil, folder=f"{tmp_path}/{evil}")
    given = Job(**{**vars(given), "cwd": tmp_path})
    words = run_head(render(given, site, evil), tmp_path)
    task = given.tasks[0]
    assert words[:4] == [str(task.recipe), str(task.run), "mtp", evil]
    assert words[-2:] == [evil, evil]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evil", EVIL)
def test_words_of_commands_are_one_word_each(evil: str, tmp_path: Path) -> None:
    run = f"{tmp_path}/{evil}"
    given = replace(following(["do", evil, f"--out={{run}}{evil}", "{run}"]), cwd=tmp_path)
    given = replace(given, tasks=[replace(given.tasks[0], run=Path(run))])
    script = render(given, Site(mtp=["mtp", evil]), evil)
    srun = """srun() { shift 4; printf '%s\\n' "$@"; return 3; }"""
    done = subprocess.run(
        ["bash", "-c", script.replace("# From here on", f"{srun}\n# From here on")],
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    words = [line for line in done.stdout.splitlines() if " job 7: " not in line]
    assert words == ["mtp", evil, "do", evil, f"--out={Path(run)}{evil}", str(Path(run))]
    assert (done.returncode, done.stderr) == (3, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evil", EVIL)
def test_options_of_sbatch_are_one_word_each(evil: str) -> None:
    script = render(job(name=evil), Site(), "x")
    line = next(line for line in script.splitlines() if "--job-name" in line)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line.removeprefix('#SBATCH ')}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == [f"--job-name={evil}"]


@pytest.mark.parametrize("evil", ["a\nrm -rf /", "a\rb", "a\x00b", "\x1b[31m", "a\u2028b"])
def test_line_breaks_and_control_characters_are_refused(evil: str) -> None:
    for script in (
        lambda: render(job(name=evil), Site(), "x"),
        lambda: render(job(folder=f"/a/{evil}"), Site(), "x"),
        lambda: render(job(), Site(account=evil), "x"),
        lambda: render(job(), Site(environment={"A": evil}), "x"),
        lambda: render(job(), Site(), evil),
    ):
        with pytest.raises(LaunchError, match="printable text on one line"):
            script()


def test_percent_signs_of_a_path_are_not_slurms() -> None:
    assert "--output=/runs/100%%j/logs/submit_1/slurm-%j.out" in render(job(folder="/runs/100%j"), Site(), "x")


def test_a_job_without_gpus_asks_for_none() -> None:
    assert "gpu" not in render(job(), Site(gpus_per_node=0), "x").partition("# From here on")[0]


def subclasses(error: type[MtpError]) -> list[type[MtpError]]:
    return [error, *(below for own in error.__subclasses__() for below in subclasses(own))]


@pytest.mark.parametrize("code", sorted({error.exit_code for error in subclasses(MtpError)}))
def test_a_failure_that_a_user_can_cure_is_not_tried_again(code: int) -> None:
    """Except the general one, which a dead node can cause too, storage, a killed loader, and a node's own."""
    _, _, case = render(job(), Site(), "x").partition("case $code in")
    stand_ins = "stop() { echo stop; }; again() { echo again; }; say() { echo ok; }"
    done = subprocess.run(
        ["bash", "-c", f"run=x; {stand_ins}; code={code}; case $code in {case}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ("again" if code in (1, 10, 11, 86) else "stop")

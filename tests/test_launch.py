"""The scripts of launch/: the commands they print, the arguments they refuse, and what they do when
a training ends, against stand-ins for gcloud and for the trainer."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_jax.command_line import Invocation, parse_train_command
from laser_jax.config import Config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PROGRAMS = (
    *("gcloud", "xpk", "kubectl", "docker", "git", "sbatch", "srun", "scontrol"),
    *("sudo", "gcsfuse", "python", "python3", "tail", "setsid"),
)
TRAINING = ("--", "--config", "configs/paper.yaml", "--output", "/bucket/runs/a")


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def launch(
    script: str, *arguments: str, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def alarmed(tmp_path: Path) -> dict[str, str]:
    """A PATH on which every program that a script may start leaves a trace in `started`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        executable(programs / name, f"#!/bin/sh\necho {name} >> {tmp_path}/started\n")
    return {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


def training_of(output: str) -> tuple[Config, Invocation]:
    """What the trainer makes of the arguments in printed commands."""
    words = shlex.split(output, comments=True)
    for_another_shell = [word for word in words if " -- " in word]
    if for_another_shell:
        words = shlex.split(for_another_shell[0])
    arguments = words[len(words) - words[::-1].index("--") :]
    return parse_train_command([*arguments, "--model.path", "model", "--data.train", "rows"])


# --- the text of the scripts -------------------------------------------------------------------


def test_the_scripts_pass_shellcheck() -> None:
    beside_python = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    shellcheck = beside_python or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is absent: pip install laser-jax[dev]")
    done = subprocess.run(
        [shellcheck, "--external-sources", *map(str, SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "script", ["train.sh", "tpu.sh", "tpu_worker.sh", "gke.sh", "slurm.sh", "gpu.sh"]
)
def test_help_names_every_option(script: str) -> None:
    done = launch(script, "--help")
    assert done.returncode == 0
    assert "usage: " in done.stdout
    text = (LAUNCH / script).read_text()
    known = set(re.findall(r"given\[([a-z-]+)\]", text))
    assert {f"--{name}" for name in known} <= set(re.findall(r"--[a-z-]+", done.stdout))


# --- what --dry-run prints ---------------------------------------------------------------------


def documented() -> list[list[str]]:
    """The commands of docs/scale.md that start a script."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_a_documented_command_prints_commands_and_starts_nothing(
    words: list[str], alarmed: dict[str, str], tmp_path: Path
) -> None:
    end = words.index("--") if "--" in words else len(words)
    script = Path(words[0])
    done = launch(script.name, *words[1:end], "--dry-run", *words[end:], **alarmed)
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout)
    assert not (tmp_path / "started").exists()
    if end < len(words):  # and the trainer takes what it would be given
        config, invocation = training_of(done.stdout)
        assert config.train.batch_size == 64
        assert invocation.distributed == (script.name != "gpu.sh")


def test_the_documentation_runs_every_command_of_the_cloud_scripts() -> None:
    ran = {(words[0], words[1]) for words in documented()}
    for script, names in {
        "tpu.sh": ("create", "install", "run", "logs", "stop", "delete", "spot"),
        "gke.sh": ("cluster", "storage", "image", "run", "logs", "delete"),
        "gpu.sh": ("install", "run"),
    }.items():
        assert {(f"launch/{script}", name) for name in names} <= ran


def test_a_slice_is_asked_for_as_the_manual_says(alarmed: dict[str, str]) -> None:
    slice_ = ("demo", "--zone", "us-a1-a", "--project", "p", "--type", "v5litepod-16")
    done = launch("tpu.sh", "create", *slice_, "--spot", "--dry-run", **alarmed)
    assert commands(done.stdout) == [
        shlex.split(
            "gcloud compute tpus tpu-vm create demo --zone=us-a1-a --project=p "
            "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot"
        )
    ]
    done = launch("tpu.sh", "create", *slice_, "--queued", "--dry-run", **alarmed)
    create, describe = commands(done.stdout)
    assert create == shlex.split(
        "gcloud compute tpus queued-resources create demo --zone=us-a1-a --project=p "
        "--node-id=demo --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
    )
    assert describe[-1] == "--format=value(state.state)"


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_software_version_is_that_of_the_generation(kind: str, version: str) -> None:
    done = launch("tpu.sh", "create", "demo", "--zone", "z", "--type", kind, "--dry-run")
    assert f"--version={version}" in commands(done.stdout)[0]


def test_slurm_starts_one_process_a_gpu_that_sees_all_gpus(alarmed: dict[str, str]) -> None:
    shape = ("--nodes", "2", "--gpus-per-node", "4", "--time", "1-00:00:00")
    done = launch("slurm.sh", *shape, "--interface", "ib0", "--dry-run", *TRAINING, **alarmed)
    submit, job = commands(done.stdout)
    assert submit[0] == "sbatch"
    assert {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4"} <= set(submit)
    assert {"srun", "--gpu-bind=none", "NCCL_SOCKET_IFNAME=ib0", "--cpus-per-task=8"} <= set(job)
    assert not any(word.startswith("--gpus-per-task") for word in job)


def test_words_with_blanks_and_quotes_reach_the_training_unchanged() -> None:
    template = 'Frage: {query}\n"it\'s" $HOME'
    odd = ("--prompt.query_template", template, "--output", "/bucket/a b")
    done = launch("tpu.sh", "run", "demo", "--zone", "z", "--dry-run", "--", *odd)
    config, _ = training_of(done.stdout)
    assert (config.prompt.query_template, config.output) == (template, "/bucket/a b")


# --- what is refused ---------------------------------------------------------------------------

TPU = ("--zone", "z")
GKE = ("--cluster", "c", "--zone", "z-a", "--project", "p")
GKE_RUN = (*GKE, "--type", "v6e-8", "--bucket", "b", "--image", "i:1", "--workload", "w")
SLURM = ("--nodes", "2", "--gpus-per-node", "8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tpu.sh",), "is wanted first, got ''"),
        (("tpu.sh", "fly"), "is wanted first, got 'fly'"),
        (("tpu.sh", "create", "Demo", *TPU), "the slice's name .* got 'Demo'"),
        (("tpu.sh", "create", "demo"), "--zone is missing"),
        (("tpu.sh", "create", "demo", *TPU), "--type is missing"),
        (("tpu.sh", "create", "demo", "--zone"), "--zone wants a value"),
        (("tpu.sh", "create", "demo", "--zone", "--spot"), "--zone wants a value"),
        (("tpu.sh", "create", "demo", *TPU, "--type", "v9-8"), "version of v9-8 .* --version"),
        (("tpu.sh", "stop", "demo", *TPU, "--bucket", "b"), "unknown option --bucket"),
        (("tpu.sh", "run", "demo", *TPU), "arguments of the training are missing"),
        (("tpu.sh", "run", "demo", *TPU, "--", "--seed", "1"), "--output DIR is missing"),
        (("tpu.sh", "run", "demo", *TPU, "x", *TRAINING), "unexpected argument x"),
        (("tpu.sh", "run", "demo", *TPU, *TRAINING, "--distributed"), "--distributed is set"),
        (("tpu.sh", "logs", "demo", *TPU, "--worker", "all"), "--worker .* got all"),
        (("tpu.sh", "spot", "demo", *TPU, "--type", "v6e-8", *TRAINING), "--bucket is missing"),
        (
            *(("tpu.sh", "spot", "demo", *TPU, "--type", "v6e-8", "--bucket", "b"),),
            "arguments of the training are missing",
        ),
        (
            (
                "tpu.sh",
                "spot",
                "demo",
                *TPU,
                "--type",
                "v6e-8",
                "--bucket",
                "b",
                "--",
                "--output=a",
            ),
            "--output a would go with the slice",
        ),
        (("tpu_worker.sh", "pause"), "is wanted first, got 'pause'"),
        (("tpu_worker.sh", "start"), "arguments of the training are missing"),
        (("gke.sh", "run", *GKE, *TRAINING), "--type is missing"),
        (("gke.sh", "cluster", "--cluster", "c", "--type", "v6e-8"), "--zone is missing"),
        (("gke.sh", "cluster", *GKE, "--bucket", "b"), "unknown option --bucket"),
        (("gke.sh", "run", *GKE_RUN, "--restarts", "0", *TRAINING), "--restarts .* got 0"),
        (("gke.sh", "run", *GKE_RUN, "--", "--output", "runs/a"), "would go with the container"),
        (("slurm.sh", *TRAINING), "--nodes is missing"),
        (("slurm.sh", "--nodes", "two", *SLURM[2:], "--time", "1:00:00"), "--nodes .* got two"),
        (("slurm.sh", *SLURM, "--time", "soon", *TRAINING), "--time wants .* got soon"),
        (("gpu.sh", "install", "--cuda", "11"), "--cuda is 12 or 13, got 11"),
        (("gpu.sh", "run", "--gpus", "a,b", *TRAINING), "--gpus wants numbers .* got a,b"),
        (("gpu.sh", "run", *TRAINING, "--distributed", "0/2@a:1"), "--distributed is set"),
        (("train.sh", "--config", "a.yaml"), "unknown option --config"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_started(
    words: tuple[str, ...], message: str, alarmed: dict[str, str], tmp_path: Path
) -> None:
    done = launch(*words, **alarmed)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert not (tmp_path / "started").exists()


def test_the_job_refuses_to_run_outside_a_clone(tmp_path: Path) -> None:
    done = launch("slurm.sbatch", *TRAINING, cwd=tmp_path)
    assert done.returncode == 2
    assert "is not the root of a laser_jax clone" in done.stderr


# --- how a training ends -----------------------------------------------------------------------


def trainer(tmp_path: Path, body: str) -> str:
    """An interpreter that stands in for `python -m laser_jax.train --output DIR`; DIR is $4."""
    text = f'#!/bin/bash\n[ "$1 $2 $3" = "-m laser_jax.train --output" ] || exit 99\n{body}\n'
    return str(executable(tmp_path / "trainer", text))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('touch "$4/results.json"', 0),
        ("exit 0", 75),
        ("exit 3", 3),
        ("kill -TERM $$", 75),  # pre-empted before Python could heed it
        ("kill -KILL $$", 137),
    ],
)
def test_the_exit_status_tells_the_ends_apart(tmp_path: Path, body: str, status: int) -> None:
    python = trainer(tmp_path, body)
    done = launch("train.sh", "--", "--output", str(tmp_path), PYTHON=python, RESULTS_WAIT="0")
    assert done.returncode == status
    assert ("the same command goes on" in done.stdout) == (status == 75)


def test_results_that_appear_late_are_waited_for(tmp_path: Path) -> None:
    python = trainer(tmp_path, '(sleep 0.5; touch "$4/results.json") & exit 0')
    done = launch("train.sh", "--", "--output", str(tmp_path), PYTHON=python)
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_reaches_the_training_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As Slurm and a terminal send it."""
    python = executable(
        tmp_path / "trainer",
        f"""#!{sys.executable}
import pathlib, signal, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
pathlib.Path("{tmp_path}/ready").touch()
while not got:
    time.sleep(0.02)
time.sleep(0.5)  # for a second one
pathlib.Path("{tmp_path}/signals").write_text(" ".join(signal.Signals(n).name for n in got))
""",
    )
    # a shell's background job, as the tests may be, ignores SIGINT, and bash cannot trap what it
    # ignores from its start
    heeding = ("env", "--default-signal")
    process = subprocess.Popen(
        [*heeding, "bash", str(LAUNCH / "train.sh"), "--", "--output", str(tmp_path)],
        env=os.environ | {"PYTHON": str(python), "RESULTS_WAIT": "0"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert process.wait() == 75
    assert (tmp_path / "signals").read_text() == number.name


def test_a_worker_trains_on_without_a_connection_and_is_followed(tmp_path: Path) -> None:
    python = trainer(
        tmp_path,
        f'trap "echo saved; exit 0" TERM; echo step 1; touch {tmp_path}/ready\n'
        "while true; do sleep 0.05; done",
    )
    output = tmp_path / "run"
    output.mkdir()
    variables = {"HOME": str(tmp_path), "PYTHON": python, "RESULTS_WAIT": "0"}
    training = ("--", "--output", str(output))
    assert launch("tpu_worker.sh", "start", *training, **variables).returncode == 0
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    again = launch("tpu_worker.sh", "start", *training, **variables)
    assert again.returncode == 0
    assert "trains this already" in again.stdout
    other = launch("tpu_worker.sh", "start", *training, "--train.steps", "9", **variables)
    assert other.returncode == 2
    assert "still trains something else here" in other.stderr
    assert launch("tpu_worker.sh", "stop", **variables).returncode == 0
    followed = launch("tpu_worker.sh", "follow", **variables)
    assert followed.returncode == 75
    assert "step 1\nsaved\n" in followed.stdout
    assert "nothing trains" in launch("tpu_worker.sh", "stop", **variables).stdout


def test_following_nothing_is_an_error(tmp_path: Path) -> None:
    done = launch("tpu_worker.sh", "follow", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "no training was started" in done.stderr


# --- pre-emption -------------------------------------------------------------------------------

SPOT = ("spot", "demo", "--zone", "z", "--type", "v6e-8", "--bucket", "b")


def spot(
    tmp_path: Path, follows: list[int], states: list[str], lost: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs the loop against a gcloud whose trainings end with the statuses `follows`, which is
    asked for the slice's state after each end that is none, and whose connection is lost once, in
    what `lost` names. Returns also what gcloud was asked."""
    programs = tmp_path / "programs"
    programs.mkdir()
    executable(programs / "git", "#!/bin/sh\n")
    (tmp_path / "follows").write_text("".join(f"{status}\n" for status in follows))
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    executable(
        programs / "gcloud",
        f"""#!/bin/bash
cd {tmp_path}
pop() {{ head -n 1 "$1"; sed -i 1d "$1"; }}
echo "$*" >> asked
case "$*" in
  *"queued-resources describe"*) echo ACTIVE ;;
  *"tpu-vm describe"*) pop states ;;
  *"tpu_worker.sh follow"*) exit "$(pop follows)" ;;
  *"{lost}"*) if mkdir lost 2>/dev/null; then exit 255; fi ;;
esac
""",
    )
    path = f"{programs}:{os.environ['PATH']}"
    done = launch("tpu.sh", *SPOT, *TRAINING, PATH=path, POLL_SECONDS="0")
    assert not (tmp_path / "follows").read_text()
    assert not (tmp_path / "states").read_text()
    return done, (tmp_path / "asked").read_text().splitlines()


def asked_for(asked: list[str], part: str) -> list[str]:
    return [line for line in asked if part in line]


def test_after_a_preemption_another_slice_gets_the_same_training(tmp_path: Path) -> None:
    # stopped and saved; stopped at its start; vanished; finished
    done, asked = spot(tmp_path, [75, 143, 255, 0], ["PREEMPTED"] * 4)
    assert done.returncode == 0, done.stderr
    starts = asked_for(asked, "tpu_worker.sh start")
    assert len(starts) == 4
    assert len(set(starts)) == 1
    assert len(asked_for(asked, "queued-resources create")) == 4
    assert len(asked_for(asked, "queued-resources delete")) == 4
    assert "queued-resources delete" in asked[-1]


def test_a_lost_connection_is_taken_up_again(tmp_path: Path) -> None:
    done, asked = spot(tmp_path, [255, 255, 0], ["READY", "READY"])
    assert done.returncode == 0, done.stderr
    assert len(asked_for(asked, "tpu_worker.sh start")) == 1
    assert len(asked_for(asked, "tpu_worker.sh follow")) == 3


@pytest.mark.parametrize("lost", ["tpu-vm scp", "tpu_worker.sh install", "tpu_worker.sh start"])
def test_a_connection_that_is_lost_before_the_training_is_too(tmp_path: Path, lost: str) -> None:
    done, asked = spot(tmp_path, [0], ["READY"], lost)
    assert done.returncode == 0, done.stderr
    assert len(asked_for(asked, lost)) == 2
    assert len(asked_for(asked, "tpu_worker.sh follow")) == 1
    assert len(asked_for(asked, "queued-resources create")) == 1


@pytest.mark.parametrize("status", [1, 75])
def test_an_error_or_a_stop_on_a_slice_that_is_there_ends_the_loop(
    tmp_path: Path, status: int
) -> None:
    done, asked = spot(tmp_path, [status], ["READY"])
    assert done.returncode == 2
    assert f"status {status} on a slice that is there" in done.stderr
    assert not asked_for(asked, "delete")

"""docs/slurm.sh as it is, under torchrun with two processes. Two programs that pass things on stand in for Slurm's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SRUN = '#!/bin/bash\nexec "$@"\n'
BROKEN = "#!/bin/bash\ntrap 'exit 3' USR1\ntouch \"$RUNS/started\"\nwhile true; do sleep 0.1; done\n"
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$RUNS/told"; fi\n'
FLAGS = "dmd2.py --steps 100000 --batch-size 1 --gan-weight 0 --preview-every 0 --keep 0"


def job(folder, srun, started):
    """Start the job, its time is over when started() is true; returns its exit code and what it said."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    own = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n", "GPUS": "2", "RUNS": str(folder)}
    env = {**os.environ, **own, "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["bash", str(ROOT / "docs" / "slurm.sh"), *FLAGS.split()]
    run = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not started() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(signal.SIGUSR1)
    out, _ = run.communicate(timeout=120)
    return run.returncode, out[-3000:]


@pytest.mark.slow
def test_a_job_saves_in_time_is_queued_again_and_goes_on(tmp_path):
    last, told = [0], tmp_path / "told"
    for number in (1, 2):
        before = set(tmp_path.glob("7/*/events*"))
        trains = lambda: any(p not in before and p.stat().st_size > 2000 for p in tmp_path.glob("7/*/events*"))  # noqa: B023
        code, out = job(tmp_path, SRUN, trains)
        assert code == 0 and told.read_text() == number * "requeue 7\n", out
        (folder,) = tmp_path.glob("7/dmd2__tiny__0__*")
        last.append(int(max((folder / "checkpoints").glob("step_*")).name[5:]))
        assert last[-1] > last[-2]


def test_a_job_that_saves_nothing_after_the_signal_has_failed(tmp_path):
    assert job(tmp_path, BROKEN, (tmp_path / "started").exists)[0] == 3 and not (tmp_path / "told").exists()


@pytest.mark.slow
def test_the_whole_way_on_the_tiny_teacher(tmp_path):
    """run_wan.sh with its smoke run's few steps and smaller previews, and again: one script is finished, the other one
    is resumed.
    """
    small = "--preview-prompts 1 --preview-seeds 2 --teacher-steps 2 --batch-size 2"
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@" {small}\n')
    (tmp_path / "torchrun").chmod(0o755)
    own = {"TEACHER": "tiny", "STEPS": "2", "RUNS": str(tmp_path / "runs")}
    env = {**os.environ, **own, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for finished in (0, 1):
        run = subprocess.run(["bash", "run_wan.sh"], cwd=ROOT, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)
        assert run.returncode == 0, run.stdout[-3000:]
        (dfd,) = tmp_path.glob("runs/dfd__*")
        assert len(list(tmp_path.glob("runs/dmd2__*"))) == 1 and (dfd / "samples" / "sheet.png").is_file()
        assert (tmp_path / "runs" / "eval" / "results.md").is_file()
        assert (tmp_path / "runs" / "exported" / "model_index.json").is_file()
        assert run.stdout.count(" is finished") == finished
        (tmp_path / "runs" / "dfd.py.done").unlink()

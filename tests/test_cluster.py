"""docs/slurm.sh as it is, under torchrun with two processes. Two programs that pass things on stand in for Slurm's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

SRUN = '#!/bin/bash\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$TOLD"; fi\n'


def test_a_job_saves_in_time_is_queued_again_and_goes_on(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "fails").mkdir()  # with an srun whose run fails at the signal
    (tmp_path / "fails" / "srun").write_text(
        f"#!/bin/bash\ntrap 'exit 3' USR1\ntouch {tmp_path / 'started'}\nwhile true; do sleep 0.1; done\n"
    )
    (tmp_path / "fails" / "srun").chmod(0o755)
    told = tmp_path / "told"
    own = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n", "GPUS": "2", "RUNS": str(tmp_path)}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, **own, "TOLD": str(told), "PATH": path, "OMP_NUM_THREADS": "1"}
    words = [
        "dmd2.py",
        "--steps",
        "100000",
        "--batch-size",
        "1",
        "--gan-weight",
        "0",
        "--preview-every",
        "0",
        "--keep",
        "0",
    ]

    def job():
        """Start the job; once its run trains, tell it that its time is over. Returns its last checkpoint's step."""
        before = {path: path.stat().st_size for path in tmp_path.glob("7/*/events*")}
        run = subprocess.Popen(
            ["bash", str(ROOT / "docs" / "slurm.sh"), *words],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        trains = lambda: any(p not in before and p.stat().st_size > 2000 for p in tmp_path.glob("7/*/events*"))
        while not trains() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        run.send_signal(signal.SIGUSR1)
        out, _ = run.communicate(timeout=120)
        assert run.returncode == 0, out[-3000:]
        (folder,) = tmp_path.glob("7/dmd2__tiny__0__*")
        return int(sorted((folder / "checkpoints").glob("step_*"))[-1].name[5:])

    # a job that saves nothing after the signal has failed: here its run breaks while it starts
    broken = subprocess.Popen(
        ["bash", str(ROOT / "docs" / "slurm.sh"), *words],
        cwd=ROOT, env=env | {"PATH": f"{tmp_path / 'fails'}:{path}"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        time.sleep(0.1)
    broken.send_signal(signal.SIGUSR1)
    broken.communicate(timeout=60)
    assert broken.returncode == 3 and not told.exists()

    first = job()
    assert first > 0 and told.read_text() == "requeue 7\n"
    assert job() > first and told.read_text() == "requeue 7\nrequeue 7\n"

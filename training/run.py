"""One run: its folder, logs, checkpoints, and the signals that stop it."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from models.folders import check_name
from models.presets import PRESETS, name_of
from training.checkpoints import (
    check_checkpoint,
    find_checkpoint,
    find_init,
    flat_state,
    latest_checkpoint,
    load_init,
    load_state,
    run_name,
    save_weights,
)
from training.files import UserError, make_folder, read_json, readable_by_all, written_aside
from training.flags import check_flags


class Run:
    """The folder runs/<script>__<teacher>__<seed>__<time>/ with its logs, previews and checkpoints.

    device   where this process computes; the process group is joined
    cache    folder of what other runs can use again
    step     the first step to do

    Making a Run checks the flags and makes no run folder; `restore` does.
    """

    def __init__(self, script, args):
        check_flags(args)
        check_name(args.teacher)
        for name in ("prompts", "data", "images", "pairs"):  # before a teacher is fetched
            if (path := getattr(args, name, None)) and not Path(path).exists():
                raise UserError(f"--{name}: no such file or folder {path}")
        self.script, self.signal, self.handlers = Path(script), 0, {}
        self.writer, self.wandb, self.bar, self.lock = None, None, None, None
        self.device, self.rank = common.init_distributed(), dist.get_rank()
        self.cache = Path(args.runs_dir) / "cache"
        self.init, self.checkpoint, self.step, self.world = None, None, 0, dist.get_world_size()
        if args.resume:
            self.checkpoint = find_checkpoint(args.runs_dir, self.script.stem, args.teacher, args.seed, args.resume)
            record = check_checkpoint(self.checkpoint)
            self.step, self.world = record["step"], record["world_size"]
            self.check_resumed(args)
        elif args.init:
            own = " ".join(map(str, getattr(args, "student_sigmas", ())))
            flags = own and f" --shift {args.shift:g} --student-sigmas {own}"
            self.init = find_init(args.runs_dir, args.teacher, args.init, flags)
            args = replace(args, init=str(self.init))
            record = self.init / "args.json"
            before = read_json(record) if record.is_file() else {}
            levels = " ".join(map(str, before.get("student_sigmas", ())))
            for name, was, now in (("student-sigmas", levels, own), ("teacher", before.get("teacher"), args.teacher)):
                if was and now and was != now and self.rank == 0:
                    print(f"warning: {self.init} was trained with --{name} {was}, and this run has {now}")
        self.keep, self.track, self.max_hours = args.keep, args.track, args.max_hours
        self.args = json.loads(json.dumps({"script": self.script.stem, **asdict(args)}, default=str))
        now = time.strftime("%Y%m%d-%H%M%S")
        self.folder = Path(args.runs_dir) / (run_name(self.script.stem, args.teacher, args.seed) + now)
        if self.checkpoint and latest_checkpoint(self.checkpoint.parents[1]) == self.checkpoint:
            self.folder = self.checkpoint.parents[1]
        make_folder(args.runs_dir)
        check_shared(Path(args.runs_dir))
        if args.track and find_spec("wandb") is None:
            raise UserError("--track needs Weights & Biases: pip install wandb")

    def check_resumed(self, args):
        """Raise one line unless these args can go on where the checkpoint stopped."""
        run = self.checkpoint.parents[1]
        before = read_json(run / "args.json")
        if before.get("script") != self.script.stem:
            raise UserError(f"--resume: {run} is no run of {self.script.name}; to start from its weights, --init it")
        teachers = {name_of(args.teacher), name_of(str(before.get("teacher")))}
        if len(teachers) > 1 and teachers <= PRESETS.keys():  # a folder may have been moved
            raise UserError(f"--resume: {run} has the teacher {before['teacher']}, not {args.teacher}")
        if self.step > args.steps:
            raise UserError(f"--steps {args.steps} is over: {self.checkpoint} has {self.step} steps")
        for name in ("steps", "phase_ends") if "phase_ends" in before else ():  # they say which expert is trained when
            if json.loads(json.dumps(getattr(args, name))) != before[name]:
                raise UserError(f"--{name.replace('_', '-')} cannot change in a run with phases: it was {before[name]}")

    def restore(self, networks, optimizers):
        """Fill networks and optimizers from the checkpoint to resume, else networks from --init; open the run folder.

        A checkpoint that its run went on from begins a run folder of its own, so that results do not mix.
        """
        if self.checkpoint:
            load_state(self.checkpoint, networks, optimizers)
        elif self.init:
            load_init(self.init, networks, self.args)
        resumed = bool(self.checkpoint) and self.folder == self.checkpoint.parents[1]
        found = [self.open_folder() if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        if not found[0]:
            raise UserError(f"another process trains in {self.folder}: wait until it has ended")
        self.folder = found[0]
        if self.rank == 0:
            for part in ("checkpoints", "previews"):
                make_folder(self.folder / part)
            for leftover in self.folder.glob("checkpoints/*.tmp"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)
            self.describe(resumed)
            self.writer = SummaryWriter(str(self.folder), purge_step=self.step)
        # SIGHUP is a closed terminal's, SIGUSR1 a cluster's warning
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        # under nohup a hang-up is ignored, and stays so
        self.handlers = {s: signal.signal(s, self.on_signal) for s in signals if signal.getsignal(s) != signal.SIG_IGN}

    def open_folder(self):
        """The run's folder, which no other process may train in while this one lives; None if one does."""
        make_folder(self.folder)
        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        return self.folder

    def describe(self, resumed):
        """Write down what this run is: its flags, the commit, the script itself. Say which flags are new."""
        before = read_json(self.checkpoint.parents[1] / "args.json") if self.checkpoint else self.args
        for name in sorted(self.args.keys() - {"resume", "runs_dir"}):
            if self.args[name] != before.get(name):
                print(f"resuming with --{name.replace('_', '-')} {self.args[name]}, it was {before.get(name)}")
        old = before["batch_size"] * before["grad_accum"] * self.world
        new = self.args["batch_size"] * self.args["grad_accum"] * dist.get_world_size()
        if old != new:
            print(f"{new} samples per update, there were {old}: the run goes on, but not exactly as it would have")
        if self.checkpoint and not resumed:
            print(f"{self.checkpoint} is not the last of its run: going on from it in a new one, {self.folder}")
        if self.step < self.args["steps"]:  # a finished run stays what it was trained with
            with written_aside(self.folder / "args.json") as aside:
                aside.write_text(json.dumps(self.args, indent=2) + "\n")
        (self.folder / "revision.txt").write_text(git_revision())
        shutil.copy(self.script, self.folder)
        if self.track:
            import wandb

            about = {"project": "video-distillation", "id": self.folder.name, "config": self.args}
            self.wandb = wandb.init(**about, resume="allow", sync_tensorboard=True)

    def on_signal(self, number, frame):
        """Stop after this step. Ctrl-C again, later than torchrun repeats it to its processes, does not wait for it."""
        if self.signal and number == signal.SIGINT and time.monotonic() > self.signalled + 5:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.signalled = number, time.monotonic()

    def stop_signal(self):
        """The signal that asks this run to stop, agreed by all ranks; 0 if none. Call once per step, on every rank."""
        if dist.get_world_size() == 1:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def save(self, step, networks, optimizers, students):
        """Write checkpoints/step_<step>/ aside, then rename it: the folder is there whole or not at all.

        students: the networks that a sampler needs, in its order; see checkpoints.py.
        """
        final = self.folder / "checkpoints" / f"step_{step:07d}"
        aside = final.with_name(final.name + ".tmp")
        try:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            dist.barrier()
            writer = dcp.HuggingFaceStorageWriter(str(aside / "state"), save_distributed=True)
            dcp.save(flat_state(networks, optimizers), storage_writer=writer)
            phased = "phase_ends" in self.args  # then a student per phase: of one with two experts, that phase's
            for i in range(len(students) if phased else len(students[0].parts)):
                student, part = students[i if phased else 0], f"transformer{f'_{i + 1}' if i else ''}"
                save_weights(student, part if part in student.parts else "transformer", aside / "student" / part)
            if self.rank == 0:
                (aside / "args.json").write_text(json.dumps(self.args, indent=2) + "\n")
                for path in aside.rglob("*.safetensors"):
                    readable_by_all(path)
                files = {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
                record = {"step": step, "world_size": dist.get_world_size(), "files": files}
                (aside / "checkpoint.json").write_text(json.dumps(record, indent=2) + "\n")
                old = final.with_name(final.name + ".old.tmp")
                if final.exists():  # never without one of the two
                    os.replace(final, old)
                os.replace(aside, final)
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            self.close()
            shutil.rmtree(aside, ignore_errors=True)
            reason, last = (str(error).strip() or repr(error)).splitlines()[-1], latest_checkpoint(self.folder)
            raise UserError(
                f"cannot write {final}: {reason}; the last checkpoint is {last or 'none'}", code=1
            ) from None
        if self.rank == 0:
            for old in sorted(final.parent.glob("step_*"))[: -self.keep] if self.keep else []:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def log(self, step, values, total):
        """Write one step's figures (after averaging over ranks) to TensorBoard and the progress bar.

        Stops with exit code 1 if a loss or gradient norm is not finite: call it before `save`.
        """
        packed = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        values = dict(zip(values, (packed / dist.get_world_size()).tolist(), strict=True))
        for name, value in values.items():
            if name.startswith(("loss/", "grad_norm/")) and not math.isfinite(value):
                self.close()
                last = latest_checkpoint(self.folder)
                raise UserError(f"{name} is {value} at step {step}; the last checkpoint is {last or 'none'}", code=1)
        if self.rank:
            return
        if self.bar is None:
            self.bar = tqdm(initial=self.step, total=total, unit="step", dynamic_ncols=True)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.startswith("loss/")}, refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        self.scalars(step, values)

    def scalars(self, step, values):
        """Write floats to TensorBoard on rank 0, as they are."""
        for name, value in values.items() if self.rank == 0 else ():
            self.writer.add_scalar(name, value, step)

    def finish(self, preview, stop):
        """Flush the logs, say where everything is, give the signals back. Exits with 128 + stop if a signal came."""
        self.close()
        dist.destroy_process_group()
        if self.rank == 0:
            lines = [f"run folder: {self.folder}", f"checkpoint: {latest_checkpoint(self.folder)}"]
            if preview.scores:
                lines = [preview.table(), "", *lines, f"contact sheets and table: {self.folder / 'previews'}"]
            print("\n".join(lines))
        if stop:
            raise SystemExit(128 + stop)

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for log in (self.bar, self.writer):
            if log:
                log.close()
        if self.wandb:
            self.wandb.finish()
        if self.lock:
            self.lock.close()


def check_shared(folder):
    """Raise one line, in all processes, unless all of them see the same folder."""
    marks = [folder / f".seen_by_all_{os.getpid()}_{time.time_ns()}"]
    dist.broadcast_object_list(marks)
    if dist.get_rank() == 0:
        marks[0].touch()
    dist.barrier()
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, marks[0].exists())
    if dist.get_rank() == 0:
        marks[0].unlink()
    if not all(seen):
        raise UserError(
            f"{seen.count(False)} of {len(seen)} processes do not see {folder}: machines must share --runs-dir"
        )


def git_revision():
    """The commit, with "-dirty" if files differ from it; "unknown" outside a repository."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown\n"

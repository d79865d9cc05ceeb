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
from datetime import datetime
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.presets import needs_gpu
from models.students import check_names
from training.checkpoints import (
    find_checkpoint,
    find_init,
    latest_checkpoint,
    load_init,
    load_state,
    run_name,
    runs_of,
    save_state,
    save_weights,
)
from training.files import MISTAKES, UserError, one_line, read_json, written_aside
from training.start import check_resumed, check_start, flag, flags_of


class Run:
    """The folder runs/<script>__<teacher>__<seed>__<time>/ with its logs, previews and checkpoints.

    cache    folder of what other runs can use again
    step     the first step to do

    Making a Run looks for what the flags name. `load` fills the networks, then `open` makes the folder.
    """

    def __init__(self, script, args, device):
        check_names(args.teacher, args.student)
        for name in ("prompts", "data", "images", "pairs"):  # before a teacher is fetched
            if (path := vars(args).get(name)) and not Path(path).exists():
                raise UserError(f"--{name}: no such file or folder {path}")
        if device.type == "cpu" and not args.cpu and needs_gpu(args.teacher):
            raise UserError(f"{args.teacher} would train on the CPU, as no GPU is visible: see to that, or give --cpu")
        if args.track:  # if it is not there, before anything slow
            import_module("wandb")
        self.script, self.device, self.rank = Path(script), device, dist.get_rank()
        self.cache, self.which = Path(args.runs_dir) / "cache", (self.script.stem, args.subject, args.seed)
        self.init, self.checkpoint, self.step, self.world = None, None, 0, dist.get_world_size()
        self.writer, self.wandb, self.bar, self.lock = None, None, None, None
        self.signal, self.handlers, self.started = 0, {}, time.perf_counter()
        args = replace(args, resume=self.restarted(args) or args.resume)
        if args.init and not args.resume:
            self.init = find_init(args.runs_dir, args.student or args.teacher, args.init, args.subject)
            args = replace(args, init=str(self.init))
        self.args, lines = json.loads(json.dumps({"script": self.script.stem, **asdict(args)}, default=str)), ()
        if args.resume:
            self.checkpoint = find_checkpoint(args.runs_dir, *self.which, args.resume)
            record = read_json(self.checkpoint / "checkpoint.json")  # which is written last
            self.step, self.world = record["step"], record["world_size"]
            lines = check_resumed(self.checkpoint.parents[1], self.step, self.args)
        elif self.init:
            lines = check_start(self.init, self.args)
        for line in lines:
            self.say(line)
        if vars(args).get("gan_weight") == 0 < type(args).gan_weight and not args.has_clips:
            self.say("no --data, so no discriminator: clips that the teacher makes cannot correct it")
        self.folder = None  # of a new run until it is open
        if self.checkpoint and latest_checkpoint(self.checkpoint.parents[1]) == self.checkpoint:
            self.take(self.checkpoint.parents[1])
        check_shared(Path(args.runs_dir))
        self.say(f"loading {args.teacher}, prompts and data: minutes, if they are large")

    def restarted(self, args):
        """After a restart by torchrun: the run that this launch began, if it has a checkpoint."""
        self.launch = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"  # of rank 0's machine
        ours = lambda run: (run / "launch.txt").is_file() and (run / "launch.txt").read_text() == self.launch
        begun = [str(run) for run in runs_of(args.runs_dir, *self.which) if ours(run) and latest_checkpoint(run)]
        found = [begun[-1] if begun else None]
        dist.broadcast_object_list(found)
        return found[0] if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) else None

    def say(self, line):
        """Print a line once, above the progress bar."""
        if self.rank == 0:
            tqdm.write(line)

    def load(self, networks, optimizers):
        """Fill networks and optimizers from the checkpoint to resume, else networks from --init."""
        self.optimizers = optimizers
        if self.checkpoint:
            load_state(self.checkpoint, networks, optimizers)
        elif self.init:
            load_init(self.init, networks, self.args)

    def open(self):
        """Make the folder of a new run, clean up in that of one that goes on; catch signals."""
        if not self.folder:
            self.take(Path(self.args["runs_dir"]) / f"{run_name(*self.which)}{datetime.now():%Y%m%d-%H%M%S-%f}")
        if self.rank == 0:
            for part in ("checkpoints", "previews"):
                (self.folder / part).mkdir(exist_ok=True)
            for leftover in self.folder.glob("checkpoints/*.tmp"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)
            self.describe()
            self.writer = SummaryWriter(str(self.folder), purge_step=self.step)
            if self.args["track"]:
                about = {"project": "video-distillation", "id": self.folder.name, "config": self.args}
                self.wandb = import_module("wandb").init(**about, resume="allow", sync_tensorboard=True)
        # SIGHUP is a closed terminal's, SIGUSR1 a cluster's warning
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        # under nohup a hang-up is ignored, and stays so
        self.handlers = {s: signal.signal(s, self.on_signal) for s in signals if signal.getsignal(s) != signal.SIG_IGN}

    def take(self, folder):
        """Go on in this folder, or rank 0's; nobody else may train there until this run ends."""
        found = [folder]
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found = [None]
        dist.broadcast_object_list(found)
        self.folder = found[0]
        if not self.folder:
            raise UserError(f"another process trains in {folder}: wait until it has ended")

    def describe(self):
        """Write down what this run is: its flags, the commit, the script itself. Say which flags are new."""
        before = flags_of(self.checkpoint.parents[1]) if self.checkpoint else self.args
        if self.checkpoint:
            print(f"going on from {self.checkpoint}")
        for name in sorted(self.args.keys() - {"resume", "runs_dir"}):
            if self.args[name] != before.get(name):
                print(f"resuming with {flag(name)} {self.args[name]}, it was {before.get(name)}")
        old = before["batch_size"] * before["grad_accum"] * self.world
        new = self.args["batch_size"] * self.args["grad_accum"] * dist.get_world_size()
        if old != new:
            print(f"{new} samples per update, there were {old}: the run goes on, but not exactly as it would have")
        if self.step < self.args["steps"]:  # a finished run stays what it was trained with
            with written_aside(self.folder / "args.json") as aside:
                aside.write_text(json.dumps(self.args, indent=2) + "\n")
        words = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
        known = shutil.which("git") and subprocess.run(words, capture_output=True, text=True).stdout
        (self.folder / "revision.txt").write_text(known or "unknown\n")
        (self.folder / "launch.txt").write_text(self.launch)
        shutil.copy(self.script, self.folder)
        print(f"run folder: {self.folder}   watch it: tensorboard --logdir {self.folder.parent}")

    def on_signal(self, number, frame):
        """Stop after this step. Ctrl-C again, later than torchrun repeats it to its processes, does not wait for it."""
        if self.signal and number == signal.SIGINT and time.monotonic() > self.signalled + 5:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.signalled = number, time.monotonic()
            if self.rank == 0:  # not by print, which may be at work
                os.write(2, b"\nstopping when this step or preview is finished and saved\n")

    def stop_signal(self):
        """The signal that asks this run to stop, agreed by all ranks; 0 if none. Call once per step, on every rank:
        the clock of time/step begins here, and the progress bar."""
        if self.rank == 0:
            self.bar = self.bar or tqdm(initial=self.step, total=self.args["steps"], unit="step", dynamic_ncols=True)
        asked = torch.tensor(self.signal)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.started = time.perf_counter()
        return int(asked)

    def save(self, step, networks, optimizers, students):
        """Write checkpoints/step_<step>/ aside, then rename it: the folder is there whole or not at all.

        students: the networks that a sampler needs, in its order; see checkpoints.py.
        """
        final = self.folder / "checkpoints" / f"step_{step:07d}"
        self.say(f"saving {final}")
        aside = final.with_name(final.name + ".tmp")
        try:
            save_state(aside / "state", networks, optimizers)
            phased = "phase_ends" in self.args  # then a student per phase: of one with two experts, that phase's
            for i in range(len(students) if phased else len(students[0].parts)):
                student, part = students[i if phased else 0], f"transformer{f'_{i + 1}' if i else ''}"
                save_weights(student, part if part in student.parts else "transformer", aside / "student" / part)
            if self.rank == 0:
                record = {"step": step, "world_size": dist.get_world_size()}
                for name, values in (("args.json", self.args), ("checkpoint.json", record)):
                    (aside / name).write_text(json.dumps(values, indent=2) + "\n")
                os.replace(aside, final)
        except MISTAKES as error:  # a full disk, for one
            self.close()
            shutil.rmtree(aside, ignore_errors=True)
            last = latest_checkpoint(self.folder)
            raise UserError(f"cannot write {final}: {one_line(error)}; the last checkpoint is {last}") from None
        if self.rank == 0 and self.args["keep"]:
            for old in sorted(final.parent.glob("step_*"))[: -self.args["keep"]]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
        self.started = time.perf_counter()

    def log(self, step, values):
        """Write one step's figures (after averaging over ranks) to TensorBoard and the progress bar; time/step is from
        the end of previews and saving to here, where the device has been waited for. Ends the run if a loss or gradient
        norm is not finite: call it before `save`.
        """
        packed = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values.values()])
        dist.all_reduce(packed)
        values = dict(zip(values, (packed / dist.get_world_size()).tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                self.close()
                last = latest_checkpoint(self.folder)
                raise UserError(f"{name} is {value} at step {step}; the last checkpoint is {last or 'none'}")
        if self.rank:
            return
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.startswith("loss/")}, refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        rates = {f"lr/{name}": optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self.scalars(step, values | rates | {"time/step": time.perf_counter() - self.started})

    def scalars(self, step, values):
        """Write floats to TensorBoard on rank 0, as they are."""
        for name, value in values.items() if self.rank == 0 else ():
            self.writer.add_scalar(name, value, step)

    def finish(self, preview, stop):
        """Flush the logs, say where everything is, give the signals back. Exits with 128 + stop if a signal came."""
        self.close()
        dist.destroy_process_group()
        if self.rank == 0:
            if preview.shown:
                print(f"{preview.table()}\n\ncontact sheets and table: {self.folder / 'previews'}")
            print(f"run folder: {self.folder}\ncheckpoint: {latest_checkpoint(self.folder)}")
        if stop:
            raise SystemExit(128 + stop)

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for log in (self.bar, self.writer, self.lock):
            if log:
                log.close()
        if self.wandb:
            self.wandb.finish()


def check_shared(folder):
    """All processes see the same folder: else each machine would write its part of every checkpoint for itself."""
    folder.mkdir(parents=True, exist_ok=True)
    marks, seen = [mkdtemp(dir=folder) if dist.get_rank() == 0 else None], [None] * dist.get_world_size()
    dist.broadcast_object_list(marks)
    dist.all_gather_object(seen, Path(marks[0]).exists())
    if dist.get_rank() == 0:
        os.rmdir(marks[0])
    if not all(seen):
        raise UserError(f"{seen.count(False)} of {len(seen)} processes do not see {folder}: machines must share it")

"""Processes forked from one that has imported everything: what torchrun and a shell start, without their imports."""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from functools import partial
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.distributed as dist

# imported by the process that all others are forked from
SCRIPTS = {name: import_module(name) for name in ("dmd", "dmd2", "dfd", "codmd", "phased_dmd")}
for family in ("wan", "wan_causal", "wan_experts", "wan_5b", "wan_i2v", "cosmos", "qwen_image"):
    import_module(f"models.{family}")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks"])


def on_ranks(world, function, *args, limit=1200):
    """Call a module's function in that many processes of one group; fails with what broke, or where they hang."""
    # as torchrun does: the store is here, at a port that is free, and of no rank
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    group["TORCHELASTIC_USE_AGENT_STORE"] = True
    with TemporaryDirectory() as folder:
        said, ranks = [Path(folder, str(rank)) for rank in range(world)], []
        for rank in range(world):
            own = {**group, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(start(function, *args, said=said[rank], limit=limit, env=own))
        while (alive := [rank for rank in ranks if rank.exitcode is None]) and not any(r.exitcode for r in ranks):
            wait([rank.sentinel for rank in alive])
        for rank in ranks:
            rank.join(10)  # what one has broken the others wait for in vain
        ends = [end_of(rank) for rank in ranks]
        for rank in ranks:
            rank.kill()
        lines = [f"rank {i} ended with {ends[i]}:\n{said[i].read_text()[-12000:]}" for i in range(world)]
    assert ends == [0] * world, "\n".join(lines)


def start(function, *args, said, limit=1200, env=None):
    """A process that calls a module's function. What breaks in it, or where it hangs, is in the file `said`."""
    process = CONTEXT.Process(target=one_process, args=(function, args, said, limit, env or {}))
    process.start()
    return process


def end_of(process):
    """An exit code, the name of a signal, or None for a process that has not ended."""
    return signal.Signals(-process.exitcode).name if (process.exitcode or 0) < 0 else process.exitcode


def one_process(function, args, said, limit, env):
    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in env.items()}
    file = open(said, "w", buffering=1)
    faulthandler.enable(file)
    faulthandler.dump_traceback_later(limit, exit=True, file=file)
    try:
        function(*args)
    except BaseException:
        traceback.print_exc(file=file)
        raise


def run_program(path, words, folder, out):
    """A program's exit code, standard output and error, started in a folder; `out` is a path beside which both go."""
    process = CONTEXT.Process(target=one_program, args=(path, words, folder, out))
    process.start()
    process.join()
    return process.exitcode, *(out.with_suffix(end).read_text() for end in (".out", ".err"))


def one_program(path, words, folder, out):
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(1200, exit=True)
    os.chdir(folder)
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def adam_eps(eps):
    """In this block scripts make their optimizers with that eps."""
    return mock.patch.object(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=eps))


def train_all(runs, eps=1e-8):
    """Runs of any of the scripts, [(name, args), …], one after the other in one group; eps: Adam's."""
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the next run goes on with it
    with adam_eps(eps):
        for name, args in runs:
            SCRIPTS[name].main(args)
    leave()

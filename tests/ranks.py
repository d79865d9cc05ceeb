"""Processes forked from one that has imported everything: what torchrun and a shell do, without the imports of each.

torchrun itself starts the processes of test_runs.py, test_make_shards.py, test_eval_vbench.py and test_cluster.py.
"""

import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from functools import partial
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

# imported by the process that all ranks are forked from
SCRIPTS = {name: import_module(name) for name in ("dmd", "dmd2", "dfd", "codmd", "phased_dmd")}
for family in ("wan", "wan_causal", "wan_experts", "wan_5b", "wan_i2v", "cosmos", "qwen_image"):
    import_module(f"models.{family}")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks"])


def on_ranks(world, function, *args, folders=()):
    """Call a module's function in that many processes of one group; fails with what the broken ones say.

    A rank that dies of a signal is not ours: a segmentation fault in gloo's thread (pt_gloo_runloop, torch 2.13) was
    seen once in some eighty starts. Then all start once more, and what was written to `folders` is removed.
    """
    codes, said = started(world, function, args)
    if any(code < 0 for code in codes):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        codes, said = started(world, function, args)
    assert codes == [0] * world, f"exit codes {codes}\n{said[-3000:]}"


def started(world, function, args):
    """Exit codes of the ranks (1 for one that hung), and what broke in them."""
    # as torchrun does: the store is here, at a port that is free
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as place:
        jobs = [(rank, world, store.port, Path(place), function, args) for rank in range(world)]
        ranks = [CONTEXT.Process(target=one_rank, args=job) for job in jobs]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and any(rank.exitcode is None for rank in ranks):
            if any(rank.exitcode for rank in ranks):  # the others wait for it in vain
                deadline = min(deadline, time.monotonic() + 10)
            wait([rank.sentinel for rank in ranks if rank.exitcode is None], timeout=1)
        codes = [1 if rank.exitcode is None else rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        return codes, "".join(path.read_text() for path in Path(place).iterdir())


def one_rank(rank, world, port, place, function, args):
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    own |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}  # no rank hosts the store
    os.environ |= {name: str(value) for name, value in own.items()}
    try:
        function(*args)
    except BaseException:
        (place / str(rank)).write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def run_program(path, words, folder, out):
    """A program's exit code, standard output and error, started in a folder; `out` is a path beside which both go."""
    process = CONTEXT.Process(target=one_program, args=(path, words, folder, out))
    process.start()
    process.join(timeout=300)
    process.kill()
    return process.exitcode, *(out.with_suffix(end).read_text() for end in (".out", ".err"))


def one_program(path, words, folder, out):
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(end), os.O_WRONLY | os.O_CREAT), number)
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

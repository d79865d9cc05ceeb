"""Processes forked from one that has imported everything: what torchrun and a shell do, without the imports of each.

torchrun itself starts the processes of test_runs.py, test_make_shards.py, test_eval_vbench.py and test_cluster.py.
"""

from harness.flags import with_recipe  # noqa: F401  (before torch)

import multiprocessing
import os
import runpy
import socket
import sys
from importlib import import_module

import torch
import torch.distributed as dist

# imported by the process that all ranks are forked from
SCRIPTS = {name: import_module(name) for name in ("dmd", "dmd2", "dfd", "codmd", "phased_dmd")}
for family in ("wan", "wan_causal", "wan_experts", "wan_5b", "wan_i2v", "cosmos", "qwen_image"):
    import_module(f"families.{family}")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks"])


def on_ranks(world, function, *args):
    """Call a module's function in that many processes of one group. What breaks in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with CONTEXT.Pool(world) as pool:  # which ends what still runs
        done = pool.imap_unordered(one_rank, [(rank, world, port, function, args) for rank in range(world)])
        for _ in range(world):
            done.next(timeout=300)


def one_rank(job):
    rank, world, port, function, args = job
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}
    function(*args)


def run_program(path, words, folder, out):
    """A program's exit code, standard output and error, started in a folder; `out` is a path beside which both go."""
    process = CONTEXT.Process(target=one_program, args=(path, words, folder, out))
    process.start()
    process.join(timeout=300)
    return process.exitcode, *(out.with_suffix(end).read_text() for end in (".out", ".err"))


def one_program(path, words, folder, out):
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(end), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def train_all(runs):
    """Runs of any of the scripts, [(name, args), …], one after the other in one group."""
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the next run goes on with it
    for name, args in runs:
        SCRIPTS[name].main(args)
    leave()

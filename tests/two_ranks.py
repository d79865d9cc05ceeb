"""Run by test_families.py under torchrun: runs of any of the scripts, one after the other in one process group."""

from harness.flags import with_recipe

import json
import sys
from importlib import import_module
from pathlib import Path

import torch.distributed as dist

if __name__ == "__main__":
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the next run goes on with it
    for name, flags in json.loads(Path(sys.argv[1]).read_text()):
        script = import_module(name)
        flags = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
        script.main(with_recipe(script.Args, script.RECIPES, **flags))
    leave()

"""Run a variant of a script: a control, an ablation or a broken run, which is a patch in experiments/variants/.

    python experiments/variant.py vanilla --gan-weight 0
    torchrun --nproc_per_node=8 experiments/variant.py vanilla --teacher wan2.1-1.3b
    python experiments/variant.py vanilla --help              # the flags of the script that it changes

Read NAME.patch as you read the diff of two scripts. The run folder, SCRIPT-NAME__<teacher>__<seed>__<time>, is like a
script's, with the patched script in it; tools and tables find the patch by that name.
"""

import argparse
import atexit
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from training.flags import launch

ROOT = Path(__file__).resolve().parents[1]
PATCHES = {path.stem: path for path in sorted((ROOT / "experiments" / "variants").glob("*.patch"))}


@cache
def load(name):
    """A variant as a module, SCRIPT-NAME. Its file is in a temporary folder until this process ends."""
    base = re.search(r"^--- a/(\S+)", PATCHES[name].read_text(), re.MULTILINE)[1]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{base.removesuffix('.py')}-{name}.py"
    subprocess.run(["patch", "--quiet", "--fuzz=0", "--output", path, ROOT / base, PATCHES[name]], check=True)
    spec = spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PATCHES)
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    script = load(given.name)
    sys.argv = [script.__file__, *given.flags]
    launch(script.main, script.Args)

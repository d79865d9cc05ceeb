"""Files that are there whole or not at all, and the error that ends in one line. Imports nothing of this repository."""

import argparse
import hashlib
import json
import os
import secrets
import sys
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

if sys.platform == "win32":  # no fcntl, SIGHUP or symbolic links for all
    raise SystemExit("error: this runs on Linux; on Windows use WSL: https://learn.microsoft.com/windows/wsl/install")

FLOATS = {"F64", "F32", "F16", "BF16"}  # what numbers in safetensors may be


class UserError(Exception):
    """What a user can mend."""


# what the entry point (training/flags.py) prints in one line, without a traceback
MISTAKES = (UserError, OSError, ModuleNotFoundError, SafetensorError, CheckpointException, ValidationError)
MISTAKES += (argparse.ArgumentError,)


def one_line(error):
    """What a user reads of an error: of flags that are out of bounds the first, of what failed on ranks one."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        return f"--{name}: {first['msg'].lower()}, got {first['input']}"
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:1000] or type(error).__name__


def read_json(path):
    """The dict in a JSON file."""
    with readable(path):
        return dict(json.loads(Path(path).read_text()))


def read_prompts(path):
    """Prompts of a UTF-8 text file (with or without a byte order mark), one per line."""
    with readable(path):
        text = Path(path).read_text(encoding="utf-8-sig")
    prompts = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in prompts:
        raise UserError(f"{path}: line {prompts.index('') + 1} is an empty prompt")
    if Path(path).suffix.lower() in (".csv", ".tsv", ".json", ".jsonl") or prompts[0].startswith("{"):
        raise UserError(f"{path} is a table: write one prompt per line and nothing else")
    return prompts


@contextmanager
def readable(path):
    """What cannot be read in this block, of files that are damaged or do not fit, ends in one line that names them."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # which is no Exception
        raise UserError(f"cannot read {path}: {one_line(error)}") from None


def readable_by_all(path):
    """Give a file the mode that the user's umask asks for: safetensors are written for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    Path(path).chmod(0o666 & ~umask)


@contextmanager
def written_aside(path):
    """Yield a hidden path beside `path` that nobody else has; rename it to `path` when the block succeeds, else
    remove it. Of processes that write the same file the last one stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{secrets.token_hex(8)}{path.suffix}.tmp")
    try:
        yield aside
        readable_by_all(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def hashed(*key):
    """A 63-bit seed of any tuple of numbers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def stamps(paths):
    """(name, size, hash of the first MiB) of files, also of those in folders, for `hashed`: the same on every machine
    that has the same files.
    """
    first = lambda path: hashlib.blake2b(open(path, "rb").read(1 << 20), digest_size=8).hexdigest()
    files = [file for path in paths for file in (sorted(path.glob("*")) if path.is_dir() else [path])]
    return [(path.name, path.stat().st_size, first(path)) for path in files if path.is_file()]


def opened(path):
    """A safetensors file; the last few stay open. A process has 65,530 memory maps, and each open file is one."""
    return open_once(path, path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache(maxsize=256)
def open_once(path, *_):
    with readable(path):
        return safe_open(path, framework="pt")


def read_shard(path):
    """Prompts, {name: shape} and settings (or None) of a shard, of which only the header is read."""
    file = opened(path)
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    with readable(path):
        prompts = json.loads(file.metadata()["prompts"])
    return prompts, shapes, file.get_tensor("settings").tolist() if "settings" in shapes else None


def write_shard(path, prompts, texts, settings=None, **tensors):
    """Write one shard of n samples (see common.Shards). texts: n tensors [tokens, d]; tensors: n [c, f, h, w] per name;
    settings: what a teacher's samples depend on, so that a run can compare.
    """
    own = lambda tensor: tensor.cpu().clone(memory_format=torch.contiguous_format)
    every = {"text": texts, **tensors}
    samples = {f"{i}.{key}": own(tensor) for key, values in every.items() for i, tensor in enumerate(values)}
    for name, tensor in samples.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} of {prompts[int(name.split('.')[0])]!r} is not finite: not written to {path}")
    if settings:
        samples["settings"] = torch.tensor(settings, dtype=torch.float64)
    with written_aside(path) as aside:  # one entry of metadata: safetensors would write two in any order
        save_file(samples, aside, metadata={"prompts": json.dumps(prompts)})

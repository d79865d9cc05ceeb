"""Files that are there whole or not at all, and the error that ends in one line. Imports nothing of this repository."""

import errno
import hashlib
import json
import os
import secrets
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FLOATS = {"F64", "F32", "F16", "BF16"}  # what numbers in safetensors may be


class UserError(Exception):
    """One line for the user, which the entry point prints, and an exit code: 2 for bad input, 1 for a run that broke.

    Of several processes on a machine the first one prints it; with alone=True each that raises it, as what only one
    of them can meet.
    """

    def __init__(self, message, code=2, alone=False):
        super().__init__(message)
        self.code, self.alone = code, alone


def read_json(path):
    """The dict in a JSON file."""
    try:
        record = json.loads(Path(path).read_text())
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_prompts(path):
    """Prompts of a UTF-8 text file (with or without a byte order mark), one per line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        prompts = [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the prompts in {path}: {reason}") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts: write one per line")
    if "\0" in text:
        raise UserError(f"{path} is no text file: it holds NUL characters")
    if "" in prompts:
        raise UserError(f"{path}: line {prompts.index('') + 1} is an empty prompt")
    named = prompts[0].startswith("{") or prompts[0].lower() in ("prompt", "prompts", "caption", "captions")
    if named or Path(path).suffix.lower() in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"{path} is a table (line 1: {prompts[0][:40]!r}): write one prompt per line and nothing else")
    return prompts


@contextmanager
def readable(path):
    """What is read in this block from a teacher's files ends in one line if it cannot be."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of files that somebody damaged, whatever the library that reads them says
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read {path} ({reason}): copy or download it again") from None


def make_folder(folder, hint="; see --runs-dir"):
    """Make a folder that can be written, with its parents."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
    except OSError as error:
        reason = "it is no folder" if Path(folder).exists() and not Path(folder).is_dir() else error.strerror
        raise UserError(f"cannot write the folder {folder}: {reason}{hint}") from None


UMASK = os.umask(0)
os.umask(UMASK)


def readable_by_all(path):
    """Give a file the mode that the user's umask asks for: safetensors are written for their owner alone."""
    os.chmod(path, 0o666 & ~UMASK)


@contextmanager
def written_aside(path):
    """Yield a hidden path beside `path` that nobody else has; rename it to `path` when the block succeeds, else
    remove it. Of processes that write the same file the last one stands.
    """
    path = Path(path)
    aside = path.with_name(f".{secrets.token_hex(8)}{path.suffix}.tmp")
    try:
        yield aside
        readable_by_all(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {(str(error).strip() or repr(error)).splitlines()[-1]}", 1, True
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def hashed(*key):
    """A 63-bit seed of any tuple of numbers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def stamps(paths):
    """(name, size, hash of the first MiB) of files, for `hashed`: the same on every machine that has the same files."""
    first = lambda path: hashlib.blake2b(open(path, "rb").read(1 << 20), digest_size=8).hexdigest()
    return [(path.name, path.stat().st_size, first(path)) for path in paths]


def opened(path):
    """A safetensors file; the last few stay open. A process has 65,530 memory maps, and each open file is one."""
    return open_once(path, path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache(maxsize=256)
def open_once(path, *_):
    return safe_open(path, framework="pt")


def read_shard(path):
    """Prompts, {name: shape} and settings (or None) of a shard, of which only the header is read."""
    try:
        file = opened(path)
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        prompts = json.loads(file.metadata()["prompts"])
        if kinds := {file.get_slice(key).get_dtype() for key in shapes if len(shapes[key]) > 1} - FLOATS:
            raise ValueError(f"it holds {', '.join(sorted(kinds))} numbers")
        if isinstance(prompts, list) and f"{len(prompts)}.text" in shapes:
            raise ValueError(f"it has {len(prompts)} prompts, and more samples")
        if 0 in {shape[0] for key, shape in shapes.items() if key.endswith(".text") and shape}:
            raise ValueError("a text in it has no tokens")
        settings = file.get_tensor("settings").tolist() if "settings" in shapes else None
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("its prompts are no list")
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"cannot read shard {path} ({error}): corrupt, cut or no shard; make it again") from None
    return prompts, shapes, settings


def read_sample(path, name):
    """One tensor of a shard; one line if it is not finite."""
    tensor = opened(path).get_tensor(name)
    if not tensor.isfinite().all():
        raise UserError(f"shard {path}: {name} is not finite: make it again", code=1, alone=True)
    return tensor


def write_shard(path, prompts, texts, settings=None, **tensors):
    """Write one shard of n samples (see common.Shards). texts: n tensors [tokens, d]; tensors: n [c, f, h, w] per name;
    settings: what a teacher's samples depend on, so that a run can compare.
    """
    own = lambda tensor: tensor.cpu().clone(memory_format=torch.contiguous_format)
    every = {"text": texts, **tensors}
    make_folder(Path(path).parent)
    samples = {f"{i}.{key}": own(tensor) for key, values in every.items() for i, tensor in enumerate(values)}
    for name, tensor in samples.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{name} of {prompts[int(name.split('.')[0])]!r} is not finite: not written to {path}", 1, True
            )
    if settings:
        samples["settings"] = torch.tensor(settings, dtype=torch.float64)
    with written_aside(path) as aside:  # one entry of metadata: safetensors would write two in any order
        save_file(samples, aside, metadata={"prompts": json.dumps(prompts)})

"""A teacher's folder: downloaded if it has to be, and whole."""

from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from models.presets import I2V, PRESETS, TINY_WORLD
from training.files import FLOATS, UserError, read_json, readable

PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")


def check_name(teacher):
    """Raise one line for a teacher that is neither a name nor a folder."""
    folder = teacher.removesuffix(":i2v")
    if teacher in PRESETS or (Path(folder) / "model_index.json").is_file():
        return
    meant = [n for n, p in PRESETS.items() if n == f"{folder}-i2v" or p.source.partition("@")[0] == folder]
    if meant or not Path(folder).is_dir():
        known = f"do you mean {meant[0]}?" if meant else f"use a folder in the diffusers layout or {', '.join(PRESETS)}"
        raise UserError(f"unknown teacher {teacher!r}, and no such folder: {known}")
    raise UserError(
        f"{folder} has no model_index.json: not the diffusers layout (of Wan, repositories named …-Diffusers)"
    )


def teacher_folder(teacher):
    """Local folder of a teacher in the diffusers layout, downloaded once if it is on the Hub, whose weights are whole.

    teacher: a name in PRESETS, or a folder, with :i2v after it for the image-to-video of one that does both.
    """
    check_name(teacher)
    folder = source = PRESETS[teacher].source if teacher in PRESETS else teacher.removesuffix(":i2v")
    if teacher in PRESETS and teacher not in TINY_WORLD:
        repository, _, revision = source.partition("@")
        patterns = ["model_index.json", "README.md", *(f"{part}/*" for part in PARTS)]
        try:  # the Hub's client locks, so that one process of a machine downloads
            folder = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
        except Exception as error:  # it raises a dozen kinds for "no network", "no access", "no space"
            version = f" --revision {revision}" if revision else ""
            raise UserError(
                f"cannot get {source} ({type(error).__name__}). Offline: run `hf download {repository}{version} "
                f"--local-dir DIR` where there is a network, copy DIR here and pass --teacher DIR"
                f"{':i2v' if PRESETS[teacher].kind.endswith(I2V) else ''}"
            ) from None
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    for part in PARTS:
        needed = part in ("transformer", "vae", "text_encoder", "tokenizer") or (index.get(part) or [None])[0]
        if needed and not (folder / part).is_dir():
            raise UserError(f"{folder} has no {part}/ folder: not a complete copy in the diffusers layout")
        if needed and part not in ("tokenizer", "image_processor") and not (folder / part / "config.json").is_file():
            raise UserError(f"{folder / part} has no config.json: not a complete copy in the diffusers layout")
        files = sorted((folder / part).glob("*.safetensors"))
        if needed and not files and part not in ("tokenizer", "image_processor"):
            raise UserError(f"{folder / part} holds no *.safetensors: not a complete copy, download it again")
        if any(".fp16." in file.name for file in files):
            raise UserError(f"{folder / part} holds an fp16 variant, which is not read: leave the full-precision files")
        if len(files) > 1 and not any((folder / part).glob("*.index.json")):
            raise UserError(
                f"{folder / part} holds {len(files)} files of weights and no index: leave the one that counts"
            )
        for path in files:  # each is as long as its header says
            with readable(path), safe_open(path, framework="pt") as file:
                kinds = {file.get_slice(key).get_dtype() for key in file.keys()} - FLOATS
            if kinds:
                raise UserError(f"{path} holds {', '.join(sorted(kinds))} weights: get those that were not quantised")
    vae = read_json(folder / "vae" / "config.json")
    for name in ("latents_mean", "latents_std"):
        if not isinstance(vae.get(name), list) or len(vae[name]) != vae.get("z_dim"):
            raise UserError(f"{folder}/vae/config.json has no {name} for each of its z_dim channels: download it again")
    return folder

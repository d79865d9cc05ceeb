"""A teacher's folder: downloaded if it has to be, whole, and of a family that models/ has."""

from importlib import import_module
from pathlib import Path

from huggingface_hub import snapshot_download

from models.presets import PRESETS, TINY_WORLD, family_name
from training.files import FLOATS, UserError, opened, read_json, readable

WEIGHTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")


def family_of(name):
    """The class of such a name ("wan.Wan"). Imported late: --help need not wait for diffusers."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    file, _, cls = name.partition(".")
    return getattr(import_module(f"models.{file}"), cls)


def causal(family, frames, frame_block):
    """The class of a family's causal student that makes so many of its latent frames at a time, or UserError; 0: the
    family.
    """
    if not frame_block:
        return family
    if frames % frame_block or family.__name__ != "Wan":
        only = f"only Wan 2.1 text-to-video has a causal student, and its blocks divide the {frames} latent frames"
        raise UserError(f"--frame-block {frame_block}: {only}")
    return import_module("models.wan_causal").CausalWan


def teacher_folder(teacher):
    """Local folder of a teacher in the diffusers layout, downloaded once if it is on the Hub; UserError unless its
    weights are whole, of full precision, and those of its family's classes.

    teacher: a name in PRESETS, or a folder, with :i2v after it for the image-to-video of one that does both.
    """
    family = family_of(family_name(teacher))
    folder = PRESETS[teacher].source if teacher in PRESETS else teacher.removesuffix(":i2v")
    if teacher in PRESETS and teacher not in TINY_WORLD:
        repository, _, revision = folder.partition("@")
        patterns = [f"{part}/*" for part in (*WEIGHTS, "tokenizer", "image_processor")]
        patterns += ["model_index.json", "README.md"]
        # the Hub's client locks, so that one process of a machine downloads
        with readable(f"{repository} on the Hub (without a network give its folder)"):
            folder = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    for part, cls in (("transformer", family.transformer_class), ("vae", family.vae_class)):
        if (found := (index.get(part) or [None])[-1]) != cls.__name__:
            raise UserError(f"{folder} has a {found} in {part}/, and {family.__name__} reads {cls.__name__}")
    for part in WEIGHTS:
        files, needed = sorted((folder / part).glob("*.safetensors")), (index.get(part) or [None])[0]
        names = ", ".join(file.name for file in files)
        unclear = len(files) > 1 and not any((folder / part).glob("*.index.json"))
        whole = files and (folder / part / "config.json").is_file()
        if unclear or ".fp16." in names or (needed and not whole):
            rule = "it needs a config.json and its full-precision weights, and no others"
            raise UserError(f"{folder / part} holds {names or 'no *.safetensors'}: {rule}")
        for path in files:  # each is as long as its header says
            file = opened(path)
            if kinds := {file.get_slice(key).get_dtype() for key in file.keys()} - FLOATS:
                raise UserError(f"{path} holds {', '.join(sorted(kinds))} weights: get those that were not quantised")
    vae = read_json(folder / "vae" / "config.json")
    for name in ("latents_mean", "latents_std"):  # else the class has defaults, those of another VAE
        if len(vae.get(name) or ()) != vae.get("z_dim"):
            raise UserError(f"{folder}/vae/config.json has no {name} for each of its z_dim channels: download it again")
    return folder

"""Which models can be --student of a teacher."""

from models.presets import family_name
from training.files import UserError, opened, read_json


def check_names(teacher, student=None):
    """UserError before anything is fetched, unless both are names or folders, and those of one family."""
    kinds = [family_name(name).partition(".")[2].removesuffix("Experts") for name in (teacher, student or teacher)]
    if kinds[0] != kinds[1]:
        raise UserError(f"--student {student} is of another family than {teacher}: they cannot go together")


def check(teacher, student):
    """UserError unless the networks of two Models read and predict the same things."""
    for (what, own), other in zip(interface(teacher).items(), interface(student).values()):
        if own != other:
            raise UserError(f"--student {student.name} has other {what} than {teacher.name}: they cannot go together")


def interface(model):
    """{what: value} of what a Model's networks read and predict. Of text encoders a few weights stand for all, in bf16,
    as some copies are.
    """
    vae, text = read_json(model.folder / "vae" / "config.json"), []
    for part in model.family.text_parts:
        files = (model.folder / part).glob("*.safetensors")
        key, path = min((key, path) for path in files for key in opened(path).keys())
        text += [key, opened(path).get_slice(key)[:4].bfloat16().tolist()]
    latents = model.latent_shape, vae["latents_mean"], vae["latents_std"]
    return {"latents": latents, "conditions": model.conditions, "text": (model.text_length, model.text_dim, text)}

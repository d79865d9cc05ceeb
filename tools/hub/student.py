"""What is exported: a student, how it is sampled, and whether a stock pipeline of diffusers does that."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import common
from models.presets import PRESETS, TINY_WORLD
from training.checkpoints import check_checkpoint
from training.files import UserError, read_json
from training.finished import load_run, noise_levels, student_folders
from training.flags import RunArgs

LOADS_TWO = ("WanPipeline", "WanImageToVideoPipeline")  # pipelines with transformer_2 and boundary_ratio
# classes of vllm-omni that read dmd2_config in model_index.json, for folders of these pipelines
SERVED_BY = {
    "WanPipeline": "WanT2VDMD2Pipeline",
    "WanImageToVideoPipeline": "WanI2VDMD2Pipeline",
    "QwenImagePipeline": "QwenImageDMD2Pipeline",
}


@dataclass
class Student:
    """A student in a checkpoint."""

    script: ModuleType
    args: RunArgs
    checkpoint: Path
    step: int
    raw: bool
    """The student itself, not its average."""
    model: common.Model
    folders: list[Path]
    """Of its transformers, in the checkpoint: transformer, transformer_2, …"""
    levels: list[list[float]]
    """Noise levels of each network; a teacher's two experts are one network."""

    @property
    def sampler(self):
        """causal: block by block; euler: Euler steps; renoise: a video at each level, renoised to the next."""
        if getattr(self.args, "frame_block", 0):
            return "causal"
        return "euler" if hasattr(self.args, "phase_ends") else "renoise"

    @property
    def sigmas(self):
        return [sigma for own in self.levels for sigma in own]

    @property
    def pipeline(self):
        """The class that samples it, by name."""
        name = self.model.index["_class_name"]
        return "WanImageToVideoPipeline" if name == "WanPipeline" and self.model.conditions else name

    @property
    def why_not_stock(self):
        """Why no stock pipeline samples it; empty if one does."""
        if self.sampler == "causal":
            return "it is autoregressive"
        if len(self.folders) > 2:
            return f"it has {len(self.folders)} transformers, one per phase, and diffusers' pipelines have two at most"
        if len(self.folders) > 1 and self.pipeline not in LOADS_TWO:
            return f"it has two transformers, one per phase, and {self.pipeline} has one"
        renoises = self.sampler == "renoise" and len(self.sigmas) > 1
        if renoises and self.model.conditions and self.pipeline.startswith("Cosmos"):
            return "it renoises, and Cosmos' pipeline keeps the first frame only in Euler steps"
        return ""

    @property
    def boundary(self):
        """boundary_ratio: noise levels of it and above are the first transformer's."""
        if self.sampler == "euler":  # between the last level of the first phase and the first of the second
            return round((self.levels[0][-1] + self.levels[1][0]) / 2, 4)
        return self.model.index["boundary_ratio"]

    @property
    def base(self):
        """The teacher's repository on the Hub, or None if it has another folder."""
        return self.hub()[0] or None

    @property
    def revision(self):
        """Its revision there, empty if it is main."""
        return self.hub()[2]

    def hub(self):
        name = self.args.teacher  # of a folder nobody knows whether its weights are a repository's
        return (PRESETS[name].source if name in PRESETS and name not in TINY_WORLD else "").partition("@")

    def source(self, folder):
        """The folder of the teacher that one of its transformers began at."""
        own = self.model.folder / folder.name
        return own if folder.name in self.model.family.parts else self.model.folder / "transformer"


def load_student(run, teacher=None):
    """The student of a run or checkpoint folder, with or without :raw. teacher: where its teacher is, if it moved."""
    if not Path(run.removesuffix(":raw")).is_dir():
        raise UserError(f"no such folder {run.removesuffix(':raw')}: give a run or one of its checkpoints")
    script, args, checkpoint = load_run(run)
    step = check_checkpoint(checkpoint)["step"]
    args = replace(args, teacher=teacher) if teacher else args
    if args.teacher not in PRESETS and not Path(args.teacher.removesuffix(":i2v")).is_dir():
        raise UserError(
            f"the teacher of {checkpoint} is gone: there is no folder {args.teacher}; say where with --teacher"
        )
    model = common.Model(args.teacher, args.frames, args.height, args.width)
    folders = student_folders(script, args, checkpoint)
    for folder in folders:
        config = {key: value for key, value in read_json(folder / "config.json").items() if key[0] != "_"}
        if any(model.config.get(key, value) != value for key, value in config.items()):
            raise UserError(f"{folder} is no student of {args.teacher}: their configs differ")
    levels, raw = noise_levels(script, args), run.endswith(":raw")
    return Student(script, args, checkpoint, step, raw, model, folders, levels)

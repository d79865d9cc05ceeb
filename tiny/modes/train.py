"""Train the teacher of the world with modes: as tiny/train.py, on captions of every level of detail, with six blocks.

    python tiny/modes/train.py                   # vae, teacher, report: two hours on two cores, no GPU
    python tiny/modes/train.py --stage report --out tiny/modes/teacher    # only tables and contact sheet

Snapshots, and what a run is a function of, are as there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import AutoencoderKLWan

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python tiny/modes/train.py` finds the package

from tiny import train  # noqa: E402
from tiny.modes import world  # noqa: E402
from tiny.modes.report import report  # noqa: E402
from tiny.training import teacher  # noqa: E402
from tiny.training.vae import vae_stage  # noqa: E402


@dataclass
class Args(train.Args):
    stage: Literal["all", "vae", "teacher", "report"] = "all"
    """What to run: `all` is all three; each needs those before it. `report` writes samples.png beside `out`."""
    out: Path = ROOT / "runs" / "tiny_modes" / "teacher"
    """Folder of the trained teacher, in the diffusers layout. The shipped one is tiny/modes/teacher."""
    work: Path = ROOT / "runs" / "tiny_modes"
    """Folder for snapshots and cached latents; may be deleted afterwards."""
    steps: int = 15000
    """Teacher updates."""
    samples: int = 240
    """Samples per column and level of detail of the report."""


class Clips(teacher.Clips):
    """A clip is shown with a caption of any level of detail, drawn anew every time. The expected clip behind a noisy
    one is the mean over all clips of which the caption is true.
    """

    world, layers, above = world, 6, 0.85

    def __init__(self, args):
        vae = AutoencoderKLWan.from_pretrained(args.work / "vae")
        self.latents = teacher.cached_latents(args, vae, "latents", world)[0].float()
        rows = [world.draw_factors(args.seed + 2, i) for i in range(args.clips)]
        said = [[world.caption_of({name: f[name] for name in names}) for names in world.LEVELS.values()] for f in rows]
        self.captions = torch.tensor([[world.CAPTIONS.index(caption) for caption in captions] for captions in said])
        of = [self.latents[(self.captions == i).any(1)].flatten(1) for i in range(len(world.CAPTIONS))]
        self.true = [(clips, clips.square().sum(1)) for clips in of]

    def shown(self, rows, drop, g):
        detail = torch.randint(self.captions.shape[1], rows.shape, generator=g)
        return torch.where(drop, len(world.CAPTIONS), self.captions[rows, detail])

    def expect(self, x0, x_t, sigma, shown):
        says_nothing = shown == len(world.CAPTIONS)  # the empty caption is true of as much as "a shape"
        super().expect(x0, x_t, sigma, torch.where(says_nothing, world.CAPTIONS.index("a shape"), shown))


def main(args):
    train.check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage in ("all", "vae"):
        vae_stage(args, world)
    if args.stage in ("all", "teacher"):
        teacher.train_teacher(args, Clips(args))
    if args.stage in ("all", "report"):
        report(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Samples to look at while a run trains, beside the teacher's and the data's, with scores that need no other model."""

import math
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from models.latents import decode
from training import media, metrics

FIXED = ("data", "teacher")  # what a student's samples are compared with


class Preview:
    """Fixed prompts x fixed seeds, sampled again and again, written as mp4s and a contact sheet, and scored.

    Every rank samples its share, with the same number of calls.
    """

    def __init__(self, run, model, data, prompts, seeds, batch_size):
        self.run, self.model, self.data = run, model, data
        self.labels, self.seeds, self.batch_size = data.prompts[:prompts], seeds, batch_size
        self.shown, self.vae = {}, None  # {name: (scores, thumbnails)} of what is FIXED and of the newest
        self.total, world = len(self.labels) * seeds, dist.get_world_size()
        each = math.ceil(self.total / world)
        self.mine = [(dist.get_rank() + world * i) % self.total for i in range(each)]

    def decode(self, latents):
        """Clips [3, f, h, w] on the CPU of latents [b, c, f, h, w], one after the other."""
        self.vae = (self.vae or self.model.load_vae(self.run.device, only_decodes=True)).to(self.run.device)
        for x0 in latents.split(1):
            yield decode(self.vae, x0)[0].cpu()
        self.vae.to("cpu")  # a step needs the GPU's memory, in whole pieces
        torch.cuda.empty_cache()

    def write(self, name, sample):
        """Sample, save, score and log. name is "teacher" or a step's number; sample is a function (rng, cond) ->
        latents [b, c, f, h, w]. A rank holds one clip at a time and sends what `look` keeps of it.
        """
        found = {}
        for first in tqdm(
            range(0, len(self.mine), self.batch_size), f"preview {name}", leave=False, disable=dist.get_rank() > 0
        ):
            numbers = self.mine[first : first + self.batch_size]
            cond = self.data.cond_of([number // self.seeds for number in numbers])
            with torch.no_grad():
                latents = sample(common.SampleRNG(self.data.seed, "preview", numbers, self.run.device), cond)
            for clip, number in zip(self.decode(latents), numbers):  # in this order `decode` runs to its end
                found[number] = self.look(name, *divmod(number, self.seeds), clip)
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(found, gathered)
        if gathered:
            found = {number: own for part in gathered for number, own in part.items()}
            self.score(name, [found[number] for number in range(self.total)])

    def write_data(self):
        """The same figures for the data: clips of the same prompts, where there are any."""
        if dist.get_rank() == 0 and self.data.has_clips:
            clips = self.data.preview_clips(len(self.labels), self.seeds, self.decode)
            self.score("data", [self.look("data", p, s, clip) for p, s, clip in clips])

    def folder(self, name):
        """Where the clips of the data, of the teacher, or of the student at a step are written."""
        return self.run.folder / "previews" / (name if name in FIXED else f"step_{name:07d}")

    def look(self, name, p, s, clip):
        """Write clip s of prompt p, the first four of each. Returns what is kept of it: figures, pooled pixels, a
        thumbnail, and of the tiny world, where figures are of many clips, itself.
        """
        if s < 4:
            media.write_video(self.folder(name) / f"{p:02d}_{s}", clip, self.model.fps)
        kept = clip if self.model.world else None
        return metrics.preview_metrics(clip[None, None]), metrics.pooled(clip[None])[0], media.thumbnail(clip), kept

    def score(self, name, found):
        """Score and log what `look` kept of the clips: of each prompt equally many."""
        fixed = name in FIXED
        step = self.run.step if fixed else name
        figures, pooled, thumbnails, clips = zip(*found)
        scores, seeds = {key: fmean(own[key] for own in figures) for key in figures[0]}, len(found) // len(self.labels)
        scores.pop("diversity")
        if seeds > 1:  # one clip per prompt says nothing of diversity
            by_prompt = torch.stack(pooled).split(seeds)
            scores = {"diversity": fmean(metrics.pairwise_rms(own) for own in by_prompt), **scores}
        if self.model.world:
            scores |= self.data.measure(self.labels, torch.stack(clips).unflatten(0, (-1, seeds)))
        clips = [thumbnails[i : i + 2] for i in range(0, len(found), seeds)]
        self.shown = {key: own for key, own in self.shown.items() if key in FIXED}
        self.shown[self.folder(name).name] = scores, clips
        rows = [(f"{key}: {x}", own[p]) for p, x in enumerate(self.labels) for key, (_, own) in self.shown.items()]
        sheet = media.contact_sheet(self.folder(name).with_suffix(".png"), rows)
        prefix = f"preview_{name}" if fixed else "preview"  # the fixed ones are what curves are to be compared with
        self.run.scalars(step, {f"{prefix}/{key}": value for key, value in scores.items()})
        self.run.writer.add_image(f"{prefix}/sheet", np.asarray(sheet), step, dataformats="HWC")

    def table(self):
        """Markdown table of the newest scores beside the teacher's and the data's, also written to previews/."""
        scores = [own for own, _ in self.shown.values()]
        lines = ["| | " + " | ".join(self.shown) + " |", "|---|" + "---:|" * len(scores)]
        for key in scores[-1]:
            cells = [f"{own[key]:.3f}" if key in own else "" for own in scores]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
        (self.run.folder / "previews" / "table.md").write_text("\n".join(lines) + "\n")
        return "\n".join(lines)

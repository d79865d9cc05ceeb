"""Samples to look at while a run trains, beside the teacher's and the data's, with scores that need no other model."""

import math

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from tqdm import tqdm

import common
from models.latents import decode
from training import media, metrics
from training.files import UserError


class Preview:
    """Fixed prompts x fixed seeds, sampled again and again, written as mp4s and a contact sheet, and scored.

    Every rank samples its share, with the same number of calls.
    """

    def __init__(self, run, model, data, prompts, seeds, batch_size):
        self.run, self.model, self.data = run, model, data
        self.labels, self.seeds, self.batch_size = data.prompts[:prompts], seeds, batch_size
        self.scores, self.shown, self.vae = {}, {}, None
        self.total, world = len(self.labels) * seeds, dist.get_world_size()
        each = math.ceil(self.total / world)
        self.mine = [(dist.get_rank() + world * i) % self.total for i in range(each)]

    def decode(self, latents):
        self.vae = (self.vae or self.model.load_vae(self.run.device, only_decodes=True)).to(self.run.device)
        videos = decode(self.vae, latents).cpu()
        self.vae.to("cpu")  # a step needs the GPU's memory
        return videos

    def write(self, name, sample):
        """Sample, decode, gather, save, score and log. name is "teacher" or a step's number; sample is a function
        (rng, cond) -> latents [b, c, f, h, w].
        """
        videos = []
        for first in tqdm(
            range(0, len(self.mine), self.batch_size), f"preview {name}", leave=False, disable=dist.get_rank() > 0
        ):
            numbers = self.mine[first : first + self.batch_size]
            cond = self.data.cond_of([number // self.seeds for number in numbers])
            with torch.no_grad():
                latents = sample(common.SampleRNG(self.data.seed, "preview", numbers, self.run.device), cond)
            videos.append(self.decode(latents))
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(torch.cat(videos), gathered)
        if gathered:
            clips = torch.stack(gathered, dim=1).flatten(0, 1)[: self.total]  # rank r holds samples r, r + world, …
            self.score(name, rearrange(clips, "(p s) c f h w -> p s c f h w", s=self.seeds))

    def write_data(self):
        """The same figures for the data: clips of the same prompts, where there are any. For image-to-video also the
        images that the samples begin with, to be shown beside them.
        """
        if dist.get_rank():
            return
        if self.model.conditions:
            first = self.model.family.first_latent(self.data.cond_of(range(len(self.labels))))
            self.shown["image"] = self.decode(first).unsqueeze(1)
        if self.data.has_clips:
            self.score("data", self.data.preview_clips(len(self.labels), self.seeds, self.decode))

    def score(self, name, clips):
        """Write and log clips [p, s, 3, f, h, w]: of the data, of the teacher, or of the student at a step."""
        fixed, step = isinstance(name, str), self.run.step if isinstance(name, str) else name
        folder = self.run.folder / "previews" / (name if fixed else f"step_{step:07d}")
        if not clips.isfinite().all():
            raise UserError(f"videos of the preview {folder.name} are not finite: something broke before it")
        scores = metrics.preview_metrics(clips) | self.data.measure(self.labels, clips)
        if clips.shape[1] == 1:  # one clip per prompt says nothing of diversity
            scores.pop("diversity")
        self.scores[folder.name] = scores
        shown = {**self.shown, folder.name: clips[:, :4].clone()}  # of each prompt; two on the sheet
        if fixed:
            self.shown = shown
        for p, row in enumerate(shown[folder.name]):
            for s, video in enumerate(row):
                media.write_video(folder / f"{p:02d}_{s}", video, self.model.fps)
        rows = [(f"{key}: {self.labels[p]}", shown[key][p, :2]) for p in range(len(clips)) for key in shown]
        sheet = media.contact_sheet(folder.with_suffix(".png"), rows)
        prefix = f"preview_{name}" if fixed else "preview"  # the fixed ones are what curves are to be compared with
        self.run.scalars(step, {f"{prefix}/{key}": value for key, value in scores.items()})
        self.run.writer.add_image(f"{prefix}/sheet", np.asarray(sheet), step, dataformats="HWC")

    def table(self):
        """Markdown table of the newest scores beside the teacher's and the data's, also written to previews/."""
        last = [name for name in self.scores if name not in ("data", "teacher")][-1:]
        columns = [name for name in ("data", "teacher", *last) if name in self.scores]
        lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for key in self.scores[columns[-1]]:
            cells = [f"{self.scores[c][key]:.3f}" if key in self.scores[c] else "" for c in columns]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
        (self.run.folder / "previews" / "table.md").write_text("\n".join(lines) + "\n")
        return "\n".join(lines)

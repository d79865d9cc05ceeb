"""Training samples of the tiny world, made on the fly, and what a preview of them can measure."""

import common
from models.latents import encode
from tiny import measures, world
from training.files import UserError


class TinyWorld(common.Samples):
    """Sample i is the clip (seed, i) of world.py. Row i is a caption, for image-to-video with the first frame of the
    clip 10**9 + i.
    """

    has_clips = True

    def __init__(self, model, cache, device, seed):
        if model.size != (world.FRAMES, world.SIZE, world.SIZE):
            raise UserError(f"clips of the tiny world are {world.FRAMES} frames of {world.SIZE} x {world.SIZE}")
        self.model, self.device, self.seed, self.vae = model, device, seed, None
        self.encode_image, self.prompts = model.image_encoder(device), list(world.CAPTIONS)
        self.captions = common.encode_text(model, self.prompts, cache, device)

    def row(self, number):
        return world.draw_factors(self.seed, number)["caption"]

    def cond(self, numbers):
        return self.cond_of([self.row(number) for number in numbers], numbers)

    def cond_of(self, rows, numbers=None):
        text = self.captions.cond_of(rows)
        if not self.model.conditions:
            return text
        clips = world.batch(self.seed, numbers or [10**9 + row for row in rows], [self.prompts[row] for row in rows])[0]
        return text | self.encode_image(clips[:, :, :1])

    def latents(self, numbers):
        self.vae = self.vae or self.model.load_vae(self.device)
        return encode(self.vae, world.batch(self.seed, numbers)[0])

    def preview_clips(self, prompts, seeds, to_video):
        """Clips that training never sees."""
        seeds = 1 if self.model.conditions else seeds  # of one image one clip
        captions = [label for label in self.prompts[:prompts] for _ in range(seeds)]
        clips = world.batch(self.seed, range(10**9, 10**9 + len(captions)), captions)[0]
        return [(*divmod(i, seeds), clip) for i, clip in enumerate(clips)]

    def measure(self, captions, clips):
        """The true factors, read back from the pixels."""
        return measures.summary(clips.flatten(0, 1), [caption for caption in captions for _ in range(clips.shape[1])])

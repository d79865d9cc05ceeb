"""Train the tiny teacher: a Wan-shaped text-to-video model of the world in tiny/data.py, small enough for a laptop.

    python tiny/train.py                   # vae, teacher, report: hours on two cores (see tiny/README.md), no GPU
    python tiny/train.py --stage report --out tiny/teacher    # only table and contact sheet, of the shipped weights

It writes a folder that stock diffusers loads, `WanPipeline.from_pretrained("runs/tiny/teacher")`. Every stage is
interruptible: run the same command again and it goes on from the last snapshot in --work. Clips, noise and dropout are
functions of (seed, step), so a run that was interrupted and one that was not are the same run.
"""

import json
import math
import os
import shutil
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python tiny/train.py` finds the package

from diffusers import (  # noqa: E402
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders import autoencoder_kl_wan as wan_vae  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanAttnProcessor  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel  # noqa: E402

from tiny import data  # noqa: E402

HERE = Path(__file__).resolve().parent


@dataclass
class Args:
    stage: Literal["all", "vae", "teacher", "report", "levels", "denoiser"] = "all"
    """What to run. `teacher` needs the VAE of `vae`, `report` needs both, and so do two that are no part of `all`.
    `levels`: clips noised to each of some levels and denoised from there, so one sees at which noise a factor is lost.
    `denoiser`: the error of the teacher's prediction at high noise beside that of the best possible one."""
    out: Path = HERE.parent / "runs" / "tiny" / "teacher"
    """Folder of the trained teacher, in the diffusers layout. The shipped one is tiny/teacher."""
    work: Path = HERE.parent / "runs" / "tiny"
    """Folder for snapshots and cached latents; may be deleted afterwards."""
    seed: int = 0
    """Seed of weights, clips and noise."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    vae_steps: int = 1400
    """Updates of encoder and decoder together."""
    decoder_steps: int = 2400
    """Updates of the decoder alone after that, at half the learning rate."""
    vae_batch: int = 8
    """Clips per VAE update; every clip is fresh."""
    vae_lr: float = 2e-3
    """Peak learning rate of the VAE, after a warm-up and before a cosine to zero."""
    kl_weight: float = 3e-3
    """Weight of the mean KL per latent value against the mean absolute error per pixel."""
    clips: int = 16384
    """Clips that the teacher trains on, encoded once."""
    steps: int = 57500
    """Teacher updates."""
    batch: int = 32
    """Clips per teacher update."""
    lr: float = 2e-3
    """Learning rate of the teacher: warmed up, level, and down to zero over the last 60 % of the steps."""
    train_shift: float = 5.0
    """Shift of the noise levels in training: high noise decides the motion and is the hardest to learn."""
    shift: float = 3.0
    """Shift of the scheduler that is shipped."""
    dropout: float = 0.15
    """Share of captions replaced by the empty one, which guidance needs."""
    ema_decay: float = 0.999
    """Decay of the weight average that is shipped."""
    compile: bool = True
    """Compile the transformer for training; needs a C++ compiler."""
    save_every: int = 250
    """Updates between two snapshots, in every stage."""
    guidance_scale: float = 2.0
    """Guidance in the last column of the report, and the one recommended to trainers."""
    samples: int = 528
    """Samples per column of the report; clips that `levels` and `denoiser` noise."""


def cosine_lr(step, steps, lr, warmup):
    """Learning rate at `step`: linear warm-up, then a cosine to zero."""
    return lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trapezoid_lr(step, steps, lr, warmup):
    """Learning rate at `step`: linear warm-up, level, and a straight line to zero over the last 60 %."""
    return lr * min(1, (step + 1) / warmup, (1 - step / steps) / 0.6)


def generator(*key):
    """A torch generator that depends on nothing but the integers in `key`."""
    g = torch.Generator()
    g.manual_seed(hash(key) % 2**63)
    return g


def save_state(path, step, modules, optimizer):
    """Snapshot of a dict of modules and their AdamW state, written aside and then renamed."""
    tensors = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().clone().contiguous() for k, v in tensors.items()}, f"{path}.tmp", metadata={"step": str(step)}
    )
    os.replace(f"{path}.tmp", path)


def load_state(path, modules, optimizer):
    """Load the snapshot in place, if there is one; returns the number of steps that it holds."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as f:
        step, tensors = int(f.metadata()["step"]), {k: f.get_tensor(k) for k in f.keys()}
    for name, module in modules.items():
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
    state = {}
    for k, v in tensors.items():
        if k.startswith("optimizer."):
            _, i, field = k.split(".")
            state.setdefault(int(i), {})[field] = v
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


class Muon(torch.optim.AdamW):
    """AdamW, but `matrices` (kernels too) move by orthogonalised momentum instead: Muon, Jordan et al. 2024.

    Most of these pixels' variance is brightness and position; colour and outline are a small rest that AdamW is slow
    to reach. A step that is equally long in every direction needs a fraction of the updates.
    """

    def __init__(self, matrices, others, lr):
        groups = [{"params": others, "orthogonal": False}, {"params": matrices, "orthogonal": True}]
        super().__init__(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0)

    def step(self):
        shapes = {}
        for p in self.param_groups[1]["params"]:
            if not self.state[p]:  # AdamW's `load_state_dict` looks for a step
                self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            self.state[p]["momentum"].lerp_(p.grad, 0.05)
            nesterov = p.grad.lerp(self.state[p]["momentum"], 0.95).flatten(1)
            shapes.setdefault(nesterov.shape, []).append((p, nesterov))
            p.grad = None  # so that AdamW leaves it alone
        for shape, pairs in shapes.items():
            updates = orthogonalise(torch.stack([update for _, update in pairs]))
            for (p, _), update in zip(pairs, updates, strict=True):
                # 0.4 sqrt(max(m, n)) gives it about the size of AdamW's step, so that one learning rate serves both
                p.data.add_(update.reshape(p.shape), alpha=-self.param_groups[1]["lr"] * 0.4 * max(shape) ** 0.5)
        super().step()


def orthogonalise(x):
    """Roughly the nearest (semi-)orthogonal matrices to x [b, m, n], by five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):  # a quintic that drives every singular value to about 1
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


# --- VAE ---

chunked_resample = wan_vae.WanResample.forward


def whole_clip_resample(self, x, feat_cache=None, feat_idx=None):
    """WanResample for all frames at once. x: [b, c, f, h, w].

    Without its feature cache diffusers' module leaves out the resampling in time; this puts it back (the first frame
    is its own chunk), so that encoder and decoder see a clip in one call: the numbers of the chunked call, in half the
    time.
    """
    if feat_cache is not None:
        return chunked_resample(self, x, feat_cache, feat_idx)
    if self.mode == "upsample3d":
        rest = rearrange(self.time_conv(x[:, :, 1:]), "b (two c) f h w -> b c (f two) h w", two=2)
        x = torch.cat([x[:, :, :1], rest], dim=2)
    frames = x.shape[2]
    x = self.resample(rearrange(x, "b c f h w -> (b f) c h w"))
    x = rearrange(x, "(b f) c h w -> b c f h w", f=frames)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


wan_vae.WanResample.forward = whole_clip_resample


def encode(vae, videos):
    """Videos [b, 3, f, h, w] in [0, 1] to the mean and standard deviation of their latents, each [b, c, f, h, w]."""
    x = wan_vae.patchify(videos * 2 - 1, vae.config.patch_size)
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def decode(vae, latents):
    """Latents [b, c, f, h, w] to videos [b, 3, f, h, w], in [0, 1] but for overshoot."""
    x = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    return (wan_vae.unpatchify(x, vae.config.patch_size) + 1) / 2


def latent_statistics(vae):
    """Mean and standard deviation that latents are normalised by, each [c, 1, 1, 1]."""
    return (rearrange(torch.tensor(v), "c -> c 1 1 1") for v in (vae.config.latents_mean, vae.config.latents_std))


def normalised(vae, videos):
    """Latents [b, c, f, h, w] of videos [b, 3, f, h, w] in [0, 1]: the posterior's mode, as the transformer has it."""
    shift, scale = latent_statistics(vae)
    return (encode(vae, videos)[0] - shift) / scale


def reconstruct(vae, videos, g, extra_noise):
    """Loss, KL and squared error of videos [b, 3, f, h, w] sent through the VAE, with noise from the generator g.

    extra_noise: the latents get up to this many of their own standard deviations on top, mostly far less. A decoder
    trained so forgives a sampler's small errors; the encoder, and so the latents, know nothing of it.
    """
    mean, std = encode(vae, videos)
    if extra_noise:
        level = extra_noise * torch.rand(len(mean), 1, 1, 1, 1, generator=g) ** 2
        std = std + level * mean.std((0, 2, 3, 4), keepdim=True)
    error = (decode(vae, mean + std * torch.randn(mean.shape, generator=g)) - videos).abs()
    # the background is most of the frame and easy: count the shape and its rim five times
    chroma = videos.amax(1, keepdim=True) - videos.amin(1, keepdim=True)
    near = F.max_pool3d((chroma > 0.01).float(), (1, 3, 3), stride=1, padding=(0, 1, 1))
    # squares find the shape while it is far off (absolute errors would settle for background), L1 makes it crisp
    loss = ((2 * error + 16 * error**2) * (1 + 4 * near)).mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * torch.log(std)).mean()
    return loss, kl, (error**2).mean().item()


def train_vae(args, name, params, vae, first, steps, lr, extra_noise=0.0):
    """Train `params` of the VAE, in place, for `steps` updates on clips from index `first` on."""
    matrices, others = ([p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1])
    optimizer = Muon(matrices, others, lr)
    snapshot = args.work / f"{name}.safetensors"
    start = load_state(snapshot, {"vae": vae}, optimizer)
    begin, average = time.time(), None
    for step in range(start, steps):
        videos, _ = data.batch(args.seed, range(first + step * args.vae_batch, first + (step + 1) * args.vae_batch))
        loss, kl, mse = reconstruct(vae, videos, generator(args.seed, first, step), extra_noise)
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, lr, warmup=100)
        optimizer.zero_grad()
        (loss + args.kl_weight * min(1, (first + step) / 1000) * kl).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        average = mse if average is None else average + 0.05 * (mse - average)
        if step % 50 == 0:
            psnr, rate = -10 * math.log10(average), (time.time() - begin) / (step - start + 1)
            print(
                f"{name} {step}: loss {loss.item():.4f} KL {kl.item():.2f} PSNR {psnr:.1f} ({rate:.2f} s/step)",
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_state(snapshot, step + 1, {"vae": vae}, optimizer)


def build_vae():
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=8,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,  # 4x in space: 2 by this and 2 by the one level; 2x in time
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = -6  # start with a nearly exact code, let the KL add noise to it
    return vae


def vae_stage(args):
    """Train encoder and decoder, then the decoder alone, measure the latents, and save it all in the work folder."""
    torch.manual_seed(args.seed)
    vae = build_vae()
    train_vae(args, "vae", list(vae.parameters()), vae, 0, args.vae_steps, args.vae_lr)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    params = [p for p in vae.parameters() if p.requires_grad]
    train_vae(args, "decoder", params, vae, args.vae_steps * args.vae_batch, args.decoder_steps, args.vae_lr / 2, 1.0)
    with torch.no_grad():
        means = torch.cat([encode(vae, data.batch(args.seed + 1, range(i, i + 64))[0])[0] for i in range(0, 2048, 64)])
    vae.register_to_config(
        latents_mean=means.mean((0, 2, 3, 4)).tolist(),
        latents_std=means.std((0, 2, 3, 4)).tolist(),
    )
    vae.save_pretrained(args.work / "vae")


# --- teacher ---

TEXT_LENGTH = 16  # what trainers pad prompts to; the longest caption has 4 tokens
STOCK_TEXT_LENGTH = 512  # what WanPipeline pads to by default


def build_tokenizer():
    """A word-level tokenizer of the captions' words, with T5's special tokens: one `</s>` at the end, then padding."""
    words = dict.fromkeys(word for caption in data.CAPTIONS for word in caption.split())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_text_encoder(vocabulary):
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_heads=2,
        num_layers=1,
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def build_transformer():
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),  # 5 x 8 x 8 latents, 80 tokens
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=8,
        out_channels=8,
        text_dim=32,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class PaddedText(WanAttnProcessor):
    """Cross-attention over the real tokens and ONE padding token that stands for all of them.

    WanPipeline pads embeddings with zeros up to any length and does not mask them. n equal keys count as one key with
    log(n) added to its logit, so training can see 16 and 512 tokens at the price of 5.
    """

    bias = None  # [b, 1, 1, tokens], set before each forward

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, None)


def text_table(text_encoder, tokens):
    """Embeddings [n, tokens + 1, d] of tokenized captions; zero past each caption's end, as WanPipeline has them."""
    embeddings = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return F.pad(embeddings * tokens.attention_mask[..., None], (0, 0, 0, 1))


def cached_latents(args):
    """Normalised latents of the training clips (the posterior's mode), float16 [n, c, f, h, w], and caption indices.

    Encoded in chunks, so that an interrupted run goes on where it stopped.
    """
    vae = AutoencoderKLWan.from_pretrained(args.work / "vae")
    size, chunks = 2048, []
    for first in range(0, args.clips, size):
        path = args.work / f"latents-{args.seed + 2}-{first}.safetensors"
        if not path.exists():
            latents, labels = [], []
            for i in range(first, first + size, 64):
                videos, captions = data.batch(args.seed + 2, range(i, i + 64))
                with torch.no_grad():
                    latents.append(normalised(vae, videos).half().contiguous())
                labels += [data.CAPTIONS.index(caption) for caption in captions]
            save_file({"latents": torch.cat(latents), "labels": torch.tensor(labels)}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        chunks.append(load_file(path))
    return torch.cat([c["latents"] for c in chunks]), torch.cat([c["labels"] for c in chunks])


def save_teacher(args, transformer, text_encoder):
    """Write the whole pipeline aside, then swap it in."""
    aside, old = args.out.with_name(args.out.name + ".new"), args.out.with_name(args.out.name + ".old")
    for folder in (aside, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipe = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=AutoencoderKLWan.from_pretrained(args.work / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=args.shift),
        transformer=transformer,
    )
    pipe.save_pretrained(aside)
    config = aside / "vae" / "config.json"  # diffusers notes where the VAE was loaded from: nobody else's business
    fields = json.loads(config.read_text())
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2) + "\n")
    if args.out.exists():
        args.out.rename(old)
    aside.rename(args.out)
    shutil.rmtree(old, ignore_errors=True)


def posterior_mean(x_t, sigma, clips, squares):
    """E[x0 | x_t], were x0 one of `clips` [n, d] with equal chances. x_t: [b, ...], sigma: [b], squares: |clips|^2 [n].

    As a target in place of the one clip that x_t was made of it has the same mean, so the same gradient in expectation,
    without the noise that the choice of the clip is: at high noise most of the target (Xu et al. 2023, arXiv
    2302.00670, with all clips as the reference batch). At low noise it is the clip itself.
    """
    signal = 1 - sigma[:, None]
    logits = (signal * (x_t.flatten(1) @ clips.T) - signal**2 * squares / 2) / sigma[:, None] ** 2
    return (torch.softmax(logits, dim=1) @ clips).view_as(x_t)


def train_teacher(args):
    latents, labels = cached_latents(args)
    order = labels.argsort(stable=True)
    latents, labels = latents[order].float(), labels[order]
    squares = latents.flatten(1).square().sum(1)
    counts = torch.bincount(labels, minlength=len(data.CAPTIONS)).tolist()
    members = list(zip(latents.flatten(1).split(counts), squares.split(counts), strict=True))  # of each caption
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    tokens = tokenizer([*data.CAPTIONS, ""], padding=True, return_tensors="pt")
    text_encoder, transformer = build_text_encoder(len(tokenizer)), build_transformer()
    ema_text, ema = deepcopy(text_encoder), deepcopy(transformer)  # made first: they keep the stock processors
    ema_text.requires_grad_(False), ema.requires_grad_(False)
    padded = PaddedText()
    for block in transformer.blocks:
        block.attn2.set_processor(padded)
    modules = {"transformer": transformer, "text": text_encoder, "ema": ema, "ema_text": ema_text}
    params = [*transformer.parameters(), *text_encoder.parameters()]
    ema_params = [*ema.parameters(), *ema_text.parameters()]
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen = set(matrices)
    optimizer = Muon(matrices, [p for p in params if p not in chosen], args.lr)
    snapshot = args.work / "teacher.safetensors"
    start = load_state(snapshot, modules, optimizer)
    velocity = torch.compile(transformer) if args.compile else transformer
    begin, average = time.time(), 1.0

    for step in range(start, args.steps):
        g = generator(args.seed, step, 1)
        rows = torch.randint(len(latents), (args.batch,), generator=g)
        x0 = latents[rows]
        # noise levels: logit-normal, one in four uniform so that the ends are trained too; stratified over the batch
        u = (torch.arange(args.batch) + torch.rand(args.batch, generator=g)) / args.batch
        uniform = (torch.arange(args.batch) + torch.randint(4, (1,), generator=g)) % 4 == 0
        u = torch.where(uniform, u, torch.sigmoid(torch.special.ndtri(u)))
        sigma = args.train_shift * u / (1 + (args.train_shift - 1) * u)
        noise = torch.randn(x0.shape, generator=g)
        s = rearrange(sigma, "b -> b 1 1 1 1")
        x_t = (1 - s) * x0 + s * noise

        drop = torch.rand(args.batch, generator=g) < args.dropout
        shown = torch.where(drop, len(data.CAPTIONS), labels[rows])
        for label, clips in enumerate(members):
            same = (shown == label) & (sigma > 0.8)  # below, only the clip itself counts
            x0[same] = posterior_mean(x_t[same], sigma[same], *clips)
        text = text_table(text_encoder, tokens)[shown]
        stock = torch.rand(args.batch, generator=g) < 1 / 8
        pads = torch.where(stock, STOCK_TEXT_LENGTH, TEXT_LENGTH) - (text.shape[1] - 1)
        padded.bias = torch.zeros(args.batch, 1, 1, text.shape[1])
        padded.bias[..., -1] = torch.log(pads)[:, None, None]

        v = velocity(x_t, 1000 * sigma, text, return_dict=False)[0]
        loss = F.mse_loss(v, (x_t - x0) / s)
        for group in optimizer.param_groups:
            group["lr"] = trapezoid_lr(step, args.steps, args.lr, warmup=300)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        # a young average must not hold on to the initial weights
        torch._foreach_lerp_(
            ema_params, [p.detach() for p in params], 1 - min(args.ema_decay, (1 + step) / (10 + step))
        )

        average += 0.01 * (loss.item() - average)
        if step % 100 == 0:
            rate = (time.time() - begin) / (step - start + 1)
            print(f"teacher {step}: loss {average:.4f} ({rate:.3f} s/step)", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(snapshot, step + 1, modules, optimizer)
            save_teacher(args, ema, ema_text)


# --- report ---


def sample(pipe, captions, guidance_scale, text_length=TEXT_LENGTH, steps=50, seed=0):
    """Videos [b, 3, f, h, w] for a list of captions, by the stock pipeline: Euler, `steps` steps."""
    videos, g = [], generator(seed, 2)
    for i in range(0, len(captions), 64):
        frames = pipe(
            captions[i : i + 64],
            height=data.SIZE,
            width=data.SIZE,
            num_frames=data.FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=text_length,
            generator=g,
            output_type="pt",
        ).frames
        videos.append(rearrange(frames.float(), "b f c h w -> b c f h w"))
    return torch.cat(videos)


def report(args):
    """Print the table of data, reconstructions and teacher, and write samples.png beside the folder of the weights."""
    pipe = WanPipeline.from_pretrained(args.out)
    pipe.set_progress_bar_config(disable=True)
    captions = [data.CAPTIONS[i % len(data.CAPTIONS)] for i in range(args.samples)]
    videos, _ = data.batch(args.seed + 3, range(args.samples), captions)
    with torch.no_grad():
        means = [pipe.vae.encode(x * 2 - 1).latent_dist.mode() for x in videos.split(64)]
        begin = time.time()
        reconstructions = torch.cat([pipe.vae.decode(x).sample for x in means]) / 2 + 0.5
    print(f"decoding: {len(videos) / (time.time() - begin):.0f} clips/s on {torch.get_num_threads()} threads")
    psnr = -10 * torch.log10(F.mse_loss(reconstructions, videos))
    print(f"reconstruction PSNR: {psnr:.1f} dB")
    columns = {"data": videos, "reconstructions": reconstructions}
    for g in (1.0, args.guidance_scale):
        begin = time.time()
        columns[f"teacher, guidance {g:g}"] = sample(pipe, captions, g)
        print(f"sampling, guidance {g:g}: {len(videos) / (time.time() - begin):.2f} clips/s, 50 steps and decoding")
    figures = {name: data.summary(x, captions) for name, x in columns.items()}
    # what a user gets who does not know about the short texts, on fewer samples because 512 tokens are slow
    few = captions[:48]
    name = f"guidance {args.guidance_scale:g}, text padded to {STOCK_TEXT_LENGTH} ({len(few)} samples)"
    figures[name] = data.summary(sample(pipe, few, args.guidance_scale, STOCK_TEXT_LENGTH, seed=1), few)

    print("\n| | " + " | ".join(figures) + " |\n|---" + "|---" * len(figures) + "|")
    cells = [[f"{f['clean']:.1f}" for f in figures.values()], [f"{f['right']:.1f}" for f in figures.values()]]
    cells += [[f"{f[n + '_mean']:.3g} ± {f[n + '_std']:.2g}" for f in figures.values()] for n in data.FREE]
    rest = ["direction_tv", "direction_entropy", "coherence"]
    cells += [[f"{f[n]:.3f}" for f in figures.values()] for n in rest]
    units = {"x": "px", "y": "px", "speed": "px/frame", "size": "px"}
    names = ["clean %", "right caption %"] + [f"{n}, {units[n]}" if n in units else n for n in data.FREE]
    names += ["direction: total variation from uniform", "direction: entropy", "coherence, px"]
    for name, row in zip(names, cells, strict=True):
        print(f"| {name} | " + " | ".join(row) + " |")

    first = len(data.CAPTIONS)
    sheets = [torch.from_numpy(data.contact_sheet(x[:first])) for x in columns.values()]
    gap = torch.full((sheets[0].shape[0], 16, 3), 255, dtype=torch.uint8)
    sheet = torch.cat([part for s in sheets for part in (s, gap)][:-1], dim=1)
    picture = args.out.resolve().parent / "samples.png"
    Image.fromarray(sheet.numpy()).save(picture, optimize=True)
    print(f"\n{picture}: one row a caption; " + ", ".join(columns))


@torch.no_grad()
def levels(args, steps=50):
    """Print a table: clips noised to sigma and denoised by the teacher, guidance 1, against the same clips.

    A row tells what the noise levels below its sigma do; what it adds to the row above, what the levels between do.
    Sigma 0 is the VAE alone, sigma 1 samples from pure noise.
    """
    pipe = WanPipeline.from_pretrained(args.out)
    captions = [data.CAPTIONS[i % len(data.CAPTIONS)] for i in range(args.samples)]
    videos, _ = data.batch(args.seed + 3, range(args.samples), captions)
    wanted = data.read_factors(videos)
    text = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0]
    shift, scale = latent_statistics(pipe.vae)
    x0 = torch.cat([normalised(pipe.vae, x) for x in videos.split(64)])
    noise = torch.randn(x0.shape, generator=generator(args.seed, 3))
    stretch, names = pipe.scheduler.config.shift, ["speed", "size", "brightness", "saturation"]
    columns = ["sigma", "right %", *(f"{name}: mean, spread (%), correlation" for name in names), "coherence, px"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for top in (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        z = (1 - top) * x0 + top * noise
        start = top / (stretch - (stretch - 1) * top)  # the scheduler shifts it back to top
        if top:
            pipe.scheduler.set_timesteps(sigmas=torch.linspace(start, 0, steps + 1)[:-1].tolist())
            for t in pipe.scheduler.timesteps:
                v = pipe.transformer(z, t.expand(len(z)), text, return_dict=False)[0]
                z = pipe.scheduler.step(v, t, z, return_dict=False)[0]
        out = torch.cat([decode(pipe.vae, part * scale + shift) for part in z.split(64)])
        f, figures = data.read_factors(out), data.summary(out, captions)
        cells = [f"{top:g}", f"{figures['right']:.1f}"]
        for name in names:
            got, want = f[name][f["clean"]], wanted[name][f["clean"]]
            mean, spread = 100 * (got.mean() / want.mean() - 1), 100 * (got.std() / want.std() - 1)
            cells.append(f"{mean:+.0f}, {spread:+.0f}, {torch.corrcoef(torch.stack([got, want]))[0, 1]:.2f}")
        print("| " + " | ".join([*cells, f"{figures['coherence']:.3f}"]) + " |", flush=True)


def excess(prediction, x0, halves):
    """Squared errors, means over all values: (the best possible one, how far `prediction` is beyond it).

    prediction of x0 from some x_t, [b, ...]; halves: E[x0 | x_t], [b, ...], estimated twice from different clips. The
    noise of either estimate is in one factor of a product only, so it is in the mean of neither product. What both
    share stays: with few clips near x_t an estimate is drawn to the nearest.
    """
    return [math.prod(x - half for half in halves).mean().item() for x in (x0, prediction)]


@torch.no_grad()
def denoiser(args):
    """Print a table: the squared error of the teacher's prediction of x0 from x_t, beside the best possible one's.

    The world is known, so the best possible prediction is too: the mean of all clips of the caption, weighed by how
    likely each makes x_t. Two halves of `args.clips` fresh clips stand for all. At sigma .9 they are few, and what the
    teacher is beyond the best is more than the table says; below they are too few.
    """
    pipe, caption = WanPipeline.from_pretrained(args.out), data.CAPTIONS[0]
    text = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0]

    def latents(seed, count):
        parts = torch.arange(count).split(64)
        return torch.cat([normalised(pipe.vae, data.batch(seed, part, caption)[0]) for part in parts])

    x0, halves = latents(args.seed + 3, args.samples), latents(args.seed + 4, args.clips).flatten(1).chunk(2)
    noise = torch.randn(x0.shape, generator=generator(args.seed, 3))
    print(f"{caption}; squared error per latent value\n")
    print("| sigma | best possible | teacher | beyond the best | of the best, % |\n|---|---|---|---|---|")
    for level in (0.9, 0.93, 0.95, 0.98, 1.0):
        x_t, sigma = (1 - level) * x0 + level * noise, torch.full((len(x0),), level)
        parts = zip(x_t.split(64), (1000 * sigma).split(64))
        v = [pipe.transformer(x, t, text.expand(len(x), -1, -1), return_dict=False)[0] for x, t in parts]
        prediction = x_t - level * torch.cat(v)
        best, beyond = excess(prediction, x0, [posterior_mean(x_t, sigma, h, h.square().sum(1)) for h in halves])
        total = F.mse_loss(prediction, x0).item()
        print(f"| {level:g} | {best:.3f} | {total:.3f} | {beyond:.4f} | {100 * beyond / best:.1f} |", flush=True)


def check(args):
    """Exit with one line on arguments that cannot work."""
    problem = None
    for name in (
        "vae_steps",
        "decoder_steps",
        "vae_batch",
        "steps",
        "batch",
        "save_every",
        "samples",
        "vae_lr",
        "lr",
        "shift",
        "train_shift",
    ):
        if getattr(args, name) <= 0:
            problem = f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}"
    if args.clips % 2048 or args.clips <= 0:
        problem = f"--clips must be a multiple of 2048, not {args.clips}"
    if args.threads < 0 or args.seed < 0:
        problem = "--threads and --seed must not be negative"
    if not 0 <= args.dropout <= 1 or not 0 <= args.ema_decay < 1:
        problem = "--dropout must be in [0, 1] and --ema-decay in [0, 1)"
    if args.stage == "teacher" and not (args.work / "vae" / "config.json").exists():
        problem = f"no VAE in {args.work / 'vae'}: run --stage vae first"
    if args.stage in ("report", "levels", "denoiser") and not (args.out / "model_index.json").exists():
        problem = f"no teacher in {args.out}: run --stage all first"
    if problem:
        print(f"tiny/train.py: {problem}", file=sys.stderr)
        sys.exit(2)


def main(args):
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage in ("all", "vae"):
        vae_stage(args)
    if args.stage in ("all", "teacher"):
        train_teacher(args)
    if args.stage in ("all", "report"):
        report(args)
    if args.stage == "levels":
        levels(args)
    if args.stage == "denoiser":
        denoiser(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

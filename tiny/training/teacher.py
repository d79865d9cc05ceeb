"""The teachers: tokenizer, text encoder and transformer, and the training of the last two on the VAE's latents."""

import time

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.training_utils import EMAModel
from einops import rearrange
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tiny import world
from tiny.training.optim import MuonAndAdamW

TEXT_LENGTH = 16  # what trainers pad prompts to; the longest caption has 6 tokens
STOCK_TEXT_LENGTH = 512  # what WanPipeline pads to by default


def build_tokenizer():
    """A word-level tokenizer of the captions' words, with T5's special tokens: one `</s>` at the end, then padding."""
    words = dict.fromkeys(word for caption in world.CAPTIONS for word in caption.split())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TEXT_LENGTH, **special)


def build_text_encoder(vocabulary):
    size = {"vocab_size": vocabulary, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 1}
    return UMT5EncoderModel(UMT5Config(**size, dropout_rate=0.0, tie_word_embeddings=False))


def build_transformer():
    width = {"num_attention_heads": 4, "attention_head_dim": 24, "text_dim": 32, "freq_dim": 64, "ffn_dim": 384}
    transformer = WanTransformer3DModel(  # of 5 x 8 x 8 latents, 80 tokens
        patch_size=(1, 2, 2), in_channels=8, out_channels=8, num_layers=6, cross_attn_norm=True, rope_max_seq_len=64,
        **width,
    )  # fmt: skip
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def encode_clips(args, vae):
    """Normalised latents [n, c, f, h, w] of the training clips (the posterior's mode), and true captions for each:
    their numbers [n, level of detail].
    """
    mean, std = (
        rearrange(torch.tensor(values), "c -> c 1 1 1") for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents, captions = [], []
    for start in range(0, args.clips, 64):
        numbers = range(start, min(start + 64, args.clips))
        videos, _ = world.batch(args.seed + 2, numbers)
        with torch.no_grad():
            latents.append((vae.encode(videos * 2 - 1).latent_dist.mode() - mean) / std)
        for factors in (world.draw_factors(args.seed + 2, i) for i in numbers):
            said = [world.caption_of({name: factors[name] for name in names}) for names in world.LEVELS.values()]
            captions.append([world.CAPTIONS.index(caption) for caption in said])
    return torch.cat(latents), torch.tensor(captions)


def embed(text_encoder, tokens, length):
    """Embeddings [n, length, d] of tokenized captions, zero past each caption's end, as WanPipeline has them."""
    embeddings = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    embeddings = embeddings * tokens.attention_mask[..., None]
    return F.pad(embeddings, (0, 0, 0, length - embeddings.shape[1]))


def posterior_mean(x_t, sigma, clips, squares):
    """E[x0 | x_t], were x0 one of `clips` [n, d] with equal chances. x_t: [b, ...], sigma: [b], squares: |clips|^2 [n].

    As a target it has the same mean as the one clip that x_t was made of, so the same gradient in expectation, without
    the noise of which clip that was (Xu et al. 2023, arXiv 2302.00670, with all clips as the reference batch).
    """
    signal = 1 - sigma[:, None]
    logits = (signal * (x_t.flatten(1) @ clips.T) - signal**2 * squares / 2) / sigma[:, None] ** 2
    return (torch.softmax(logits, dim=1) @ clips).view_as(x_t)


def train_transformer(args, pipe, params, steps, peak_lr, known=0):
    """Train `params` of the pipeline's transformer and text encoder, in place, and leave their average there.

    known: how many first latent frames are given: they stay clean, and their tokens are told noise level 0, as in Wan
    2.2 5B.
    """
    transformer = pipe.transformer
    latents, captions = encode_clips(args, pipe.vae)
    # the clips that each caption is true of, and all for the empty one
    true = [latents[(captions == i).any(1)].flatten(1) for i in range(len(world.CAPTIONS))] + [latents.flatten(1)]
    squares = [clips.square().sum(1) for clips in true]
    tokens = pipe.tokenizer([*world.CAPTIONS, ""], padding=True, return_tensors="pt")
    optimizer = MuonAndAdamW(params, [p for p in transformer.blocks.parameters() if p.ndim == 2])
    ema = EMAModel(params, decay=args.ema_decay)
    velocity = torch.compile(transformer, dynamic=False) if args.compile else transformer
    begin, average = time.time(), 1.0

    for step in range(steps):
        rows = torch.randint(args.clips, (args.batch,))
        x0 = latents[rows]
        # noise levels: logit-normal, one in four uniform so that the ends are trained too; stratified over the batch
        u = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch
        uniform = (torch.arange(args.batch) + torch.randint(4, (1,))) % 4 == 0
        u = torch.where(uniform, u, torch.sigmoid(torch.special.ndtri(u)))
        sigma = args.train_shift * u / (1 + (args.train_shift - 1) * u)
        levels = sigma[:, None].repeat(1, x0.shape[2])
        levels[:, :known] = 0
        s = rearrange(levels, "b f -> b 1 f 1 1")
        x_t = (1 - s) * x0 + s * torch.randn_like(x0)
        tokens_per_frame = x0.shape[3] // 2 * (x0.shape[4] // 2)
        timestep = 1000 * (levels.repeat_interleave(tokens_per_frame, dim=1) if known else sigma)

        # any true caption, or the empty one, which guidance needs
        caption = captions[rows, torch.randint(captions.shape[1], (args.batch,))]
        caption[torch.rand(args.batch) < args.dropout] = len(world.CAPTIONS)
        if not known:  # at high noise the clip behind x_t is anybody's guess: its mean is the target
            for i in caption[sigma > 0.85].unique():
                rows = (caption == i) & (sigma > 0.85)
                x0[rows] = posterior_mean(x_t[rows], sigma[rows], true[i], squares[i])
        length = STOCK_TEXT_LENGTH if torch.rand(()) < 1 / 8 else TEXT_LENGTH  # Wan does not mask padding
        text = embed(pipe.text_encoder, tokens, length)[caption]

        v = velocity(x_t, timestep, text, return_dict=False)[0]
        loss = F.mse_loss(v[:, :, known:], ((x_t - x0) / s)[:, :, known:])
        # warmed up, level, and down to zero over the last 60 %
        optimizer.step(loss, peak_lr * min(1, (step + 1) / 300, (1 - step / steps) / 0.6))
        ema.step(params)

        average += 0.01 * (loss.item() - average)
        if step % 100 == 0:
            rate = (time.time() - begin) / (step + 1)
            print(f"transformer {step}: loss {average:.4f} ({rate:.3f} s/step)", flush=True)
    ema.copy_to(params)


def train_teacher(args):
    """Train transformer and text encoder on latents, and write the whole pipeline: --init's, or a new one of the VAE in
    <out>/vae.
    """
    torch.manual_seed(args.seed)
    if args.init:
        pipe = WanPipeline.from_pretrained(args.init)
    else:
        tokenizer = build_tokenizer()
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=build_text_encoder(len(tokenizer)),
            vae=AutoencoderKLWan.from_pretrained(args.out / "vae"),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=build_transformer(),
        )
    params = [*pipe.transformer.parameters(), *pipe.text_encoder.parameters()]
    train_transformer(args, pipe, params, args.steps, args.lr)
    pipe.save_pretrained(args.out)


def train_image_to_video(args):
    """Train the transformer of <out> on with the first frame given, and write the pipeline <out>_i2v."""
    pipe = WanPipeline.from_pretrained(args.out)
    torch.manual_seed(args.seed)
    pipe.text_encoder.requires_grad_(False)
    train_transformer(args, pipe, list(pipe.transformer.parameters()), args.i2v_steps, args.lr / 2, known=1)
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    i2v = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)
    i2v.save_pretrained(args.out.with_name(args.out.name + "_i2v"))


def train_small(args):
    """Train every other block of the transformer of <out> on, without those between, and write <out>_small."""
    pipe = WanPipeline.from_pretrained(args.out)
    torch.manual_seed(args.seed)
    pipe.text_encoder.requires_grad_(False)
    pipe.transformer.blocks = pipe.transformer.blocks[::2]
    pipe.transformer.register_to_config(num_layers=len(pipe.transformer.blocks))
    train_transformer(args, pipe, list(pipe.transformer.parameters()), args.small_steps, args.lr / 2)
    pipe.save_pretrained(args.out.with_name(args.out.name + "_small"))

"""The teacher: tokenizer, text encoder and transformer, and the training of the last two on the VAE's latents."""

import json
import os
import shutil
import time
from copy import deepcopy
from functools import cached_property
from hashlib import blake2b

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from einops import rearrange
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tiny import world
from tiny.training.optim import Muon, flags_of, generator, load_state, save_state, trapezoid_lr
from tiny.training.vae import normalised

TEXT_LENGTH = 16  # what trainers pad prompts to; the longest caption has 6 tokens
# flags that decide what is trained, for the snapshot, beside the number of steps
FLAGS = ("clips", "batch", "lr", "train_shift", "dropout", "ema_decay")
STOCK_TEXT_LENGTH = 512  # what WanPipeline pads to by default


def build_tokenizer():
    """A word-level tokenizer of the captions' words, with T5's special tokens: one `</s>` at the end, then padding."""
    words = dict.fromkeys(word for caption in world.CAPTIONS for word in caption.split())
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
        num_layers=6,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class PaddedText(WanAttnProcessor):
    """Cross-attention over the real tokens and ONE padding token that stands for all of them.

    WanPipeline pads embeddings with zeros up to any length and does not mask them. n equal keys count as one key with
    log(n) added to its logit, so training can see 16 and 512 tokens at the price of 7.
    """

    bias = None  # [b, 1, 1, tokens], set before each forward

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, None)


def text_table(text_encoder, tokens):
    """Embeddings [n, tokens + 1, d] of tokenized captions; zero past each caption's end, as WanPipeline has them."""
    embeddings = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return F.pad(embeddings * tokens.attention_mask[..., None], (0, 0, 0, 1))


def padding_bias(text, g):
    """PaddedText's bias for embeddings [b, tokens + 1, d]: one row in eight has as many pads as in WanPipeline."""
    stock = torch.rand(len(text), generator=g) < 1 / 8
    pads = torch.where(stock, STOCK_TEXT_LENGTH, TEXT_LENGTH) - (text.shape[1] - 1)
    bias = torch.zeros(len(text), 1, 1, text.shape[1])
    bias[..., -1] = torch.log(pads)[:, None, None]
    return bias


def cached_latents(args, vae, name):
    """Normalised latents of the training clips (the posterior's mode), float16 [n, c, f, h, w].

    Encoded in chunks, in files of that name in --work, so that an interrupted run goes on where it stopped.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    size, chunks = 2048, []
    key = blake2b(b"".join(x.detach().numpy().tobytes() for x in vae.state_dict().values()), digest_size=4).hexdigest()
    for first in range(0, args.clips, size):
        path = args.work / f"{name}-{args.seed + 2}-{key}-{first}.safetensors"
        if not path.exists():
            latents = []
            for i in range(first, first + size, 64):
                with torch.no_grad():
                    latents.append(normalised(vae, world.batch(args.seed + 2, range(i, i + 64))[0]).half().contiguous())
            save_file({"latents": torch.cat(latents)}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        chunks.append(load_file(path)["latents"])
    return torch.cat(chunks)


class Clips:
    """The training clips: their latents, a true caption for each, and the expected clip behind a noisy one."""

    def __init__(self, args, vae, name="latents"):
        self.latents = cached_latents(args, vae, name).float()
        rows = [world.draw_factors(args.seed + 2, i) for i in range(args.clips)]
        said = [[world.caption_of({name: f[name] for name in names}) for names in world.LEVELS.values()] for f in rows]
        self.captions = torch.tensor([[world.CAPTIONS.index(caption) for caption in captions] for captions in said])

    @cached_property
    def true(self):
        """For each caption the clips that it is true of, [n, d], and their squared norms."""
        of = [self.latents[(self.captions == i).any(1)].flatten(1) for i in range(len(world.CAPTIONS))]
        return [(clips, clips.square().sum(1)) for clips in of]

    def shown(self, rows, drop, g):
        """Captions of these clips as indices [b], of any level of detail; past the last one where it is dropped."""
        detail = torch.randint(self.captions.shape[1], rows.shape, generator=g)
        return torch.where(drop, len(world.CAPTIONS), self.captions[rows, detail])

    def expect(self, x0, x_t, sigma, shown, above=0.85):
        """Put the mean over all clips of which the caption is true in the place of x0 [b, ...], where sigma is high."""
        nothing = world.CAPTIONS.index("a shape")  # which says no more than the empty caption
        said = torch.where(shown == len(world.CAPTIONS), nothing, shown)
        for caption in said[sigma > above].unique():
            same = (said == caption) & (sigma > above)  # below, only the clip itself counts
            x0[same] = posterior_mean(x_t[same], sigma[same], *self.true[caption])


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
    config = aside / "vae" / "config.json"  # diffusers notes where the VAE was loaded from, which is a path of ours
    fields = json.loads(config.read_text())
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2) + "\n")
    if args.out.exists():
        args.out.rename(old)
    aside.rename(args.out)
    shutil.rmtree(old, ignore_errors=True)


def posterior_mean(x_t, sigma, clips, squares):
    """E[x0 | x_t], were x0 one of `clips` [n, d] with equal chances. x_t: [b, ...], sigma: [b], squares: |clips|^2 [n].

    As a target it has the same mean as the one clip that x_t was made of, so the same gradient in expectation, without
    the noise of which clip that was. At high noise this is most of the target (Xu et al. 2023, arXiv 2302.00670, with
    all clips as the reference batch); at low noise the posterior mean is the clip itself.
    """
    signal = 1 - sigma[:, None]
    logits = (signal * (x_t.flatten(1) @ clips.T) - signal**2 * squares / 2) / sigma[:, None] ** 2
    return (torch.softmax(logits, dim=1) @ clips).view_as(x_t)


def train_teacher(args):
    """Train transformer and text encoder on the clips' latents, and write the pipeline with their weight averages."""
    data = Clips(args, AutoencoderKLWan.from_pretrained(args.work / "vae"))
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    tokens = tokenizer([*world.CAPTIONS, ""], padding=True, return_tensors="pt")
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
    snapshot, flags = args.work / "teacher.safetensors", flags_of(args, "steps", *FLAGS)
    start = load_state(snapshot, modules, optimizer, flags)
    velocity = torch.compile(transformer) if args.compile else transformer
    begin, average = time.time(), 1.0

    for step in range(start, args.steps):
        g = generator(args.seed, step, 1)
        rows = torch.randint(args.clips, (args.batch,), generator=g)
        x0 = data.latents[rows]
        # noise levels: logit-normal, one in four uniform so that the ends are trained too; stratified over the batch
        u = (torch.arange(args.batch) + torch.rand(args.batch, generator=g)) / args.batch
        uniform = (torch.arange(args.batch) + torch.randint(4, (1,), generator=g)) % 4 == 0
        u = torch.where(uniform, u, torch.sigmoid(torch.special.ndtri(u)))
        sigma = args.train_shift * u / (1 + (args.train_shift - 1) * u)
        noise = torch.randn(x0.shape, generator=g)
        s = rearrange(sigma, "b -> b 1 1 1 1")
        x_t = (1 - s) * x0 + s * noise

        drop = torch.rand(args.batch, generator=g) < args.dropout
        shown = data.shown(rows, drop, g)
        data.expect(x0, x_t, sigma, shown)
        text = text_table(text_encoder, tokens)[shown]
        padded.bias = padding_bias(text, g)

        v = velocity(x_t, 1000 * sigma, text, return_dict=False)[0]
        loss = F.mse_loss(v, (x_t - x0) / s)
        for group in optimizer.param_groups:
            group["lr"] = trapezoid_lr(step, args.steps, args.lr, warmup=300)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        decay = min(args.ema_decay, (1 + step) / (10 + step))  # a young average must not hold on to the initial weights
        torch._foreach_lerp_(ema_params, [p.detach() for p in params], 1 - decay)

        average += 0.01 * (loss.item() - average)
        if step % 100 == 0:
            rate = (time.time() - begin) / (step - start + 1)
            print(f"teacher {step}: loss {average:.4f} ({rate:.3f} s/step)", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(snapshot, step + 1, modules, optimizer, flags)
            save_teacher(args, ema, ema_text)
    if start >= args.steps:  # of a finished snapshot, perhaps into another folder
        save_teacher(args, ema, ema_text)

"""Model loading and data: all that the scripts share. No loss, sampler or schedule is in this file.

A velocity network is called `v = model(x_t, sigma, cond)`: x_t `b c f h w` latents, sigma [b] in [0, 1], cond a dict of
tensors with the batch first. A model family is one short class (see `Wan`). Every random draw and every sample read is
a function of (seed, sample number), so a run has no hidden state: it resumes exactly, at any number of processes.

A user's mistake ends in one line on standard error and exit code 2; a loss that is not finite in exit code 1.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import logging as diffusers_logging
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_gather
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from tiny import data as tiny
from tools import metrics

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()
# no script writes in place into a network's output, which is what this warns of
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
# its successor is private and younger than the oldest torch that runs this
warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")

# ------------------------------------------------------------------------------------------------- model loading

TEACHERS = {
    "tiny": str(Path(__file__).parent / "tiny" / "teacher"),
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
# transformer/config.json of the two, so that --dry-run and local copies need no network
WAN_CONFIGS = {
    "wan2.1-1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan2.1-14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
TINY_CONFIG = {"num_attention_heads": 4, "num_layers": 4, "ffn_dim": 384, "text_dim": 32}  # the same of tiny's
# lowest, and where there is one highest, value of every script's flags
RANGES = {
    **dict.fromkeys(("steps", "student_every", "batch_size", "grad_accum", "num_pairs", "pair_steps"), (1,)),
    **dict.fromkeys(("save_every", "preview_prompts", "preview_seeds", "teacher_steps", "shift"), (1,)),
    **dict.fromkeys(("lr", "fake_score_lr", "weight_decay", "regression_weight", "guidance_scale"), (0,)),
    **dict.fromkeys(("keep", "preview_every", "gpus", "seed", "gan_weight", "discriminator_weight"), (0,)),
    **dict.fromkeys(("relation_weight", "sample_relation", "frame_relation", "lora_rank"), (0,)),
    **dict.fromkeys(("relation_temperature", "lora_alpha"), (1e-9,)),
    "data_prob": (0, 1),
    "ema_decay": (0, 1),
    "max_grad_norm": (1e-9,),
}


class Fatal(SystemExit):
    """A line for the user on standard error, and an exit code: 2 for bad input, 1 for a run that broke.

    Printed once a machine; with alone=True by every process that raises it, as what only one of them can meet.
    """

    def __init__(self, message, code=2, alone=False):
        super().__init__(code)
        self.message = message
        if alone or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {message}", file=sys.stderr, flush=True)


def parse_args(Args, recipes):
    """Command line -> Args. A flag beats the teacher's row in `recipes`, which beats the defaults of Args. For
    --resume, the args of that run stand in for both.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before training begins: no traceback
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("teacher", "seed", "runs-dir", "resume"):
        scan.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    given = {name: value for name, value in vars(scan.parse_known_args()[0]).items() if value is not None}
    args = with_recipe(Args, recipes, teacher=given.get("teacher", Args.teacher))
    if "resume" in given:
        prefix = run_prefix(sys.argv[0], args.teacher, given.get("seed", args.seed))
        run = find_checkpoint(given.get("runs_dir", args.runs_dir), prefix, given["resume"]).parents[1]
        before = read_json(run / "args.json") if (run / "args.json").is_file() else {}
        before = {k: tuple(v) if isinstance(v, list) else v for k, v in before.items() if k in vars(args)}
        place = {"runs_dir": str(run.parent)} if before else {}  # it may have been moved
        args = replace(args, **{**before, **place, "resume": None, "track": False})
    shown = f"The values below are those of --teacher {args.teacher}; --teacher NAME --help shows another's."
    return tyro.cli(Args, default=args, description=f"{Args.__doc__}\n\n{shown}")


def with_recipe(Args, recipes, **flags):
    """Args of the teacher's recipe with `flags` on top: what the command line does, for tests and notebooks."""
    teacher = flags.setdefault("teacher", Args.teacher)
    return Args(**{**recipes.get(recipe_name(teacher), {}), **flags})


def recipe_name(teacher):
    """The name in TEACHERS of a teacher, also for a folder with its config (a copy, a tiny one trained again); other
    folders keep their path.
    """
    config = Path(teacher) / "transformer" / "config.json"
    if teacher in TEACHERS or not config.is_file():
        return teacher
    config = read_json(config)
    same = [name for name, c in {"tiny": TINY_CONFIG, **WAN_CONFIGS}.items() if c.items() <= config.items()]
    return same[0] if same else teacher


def check_ranges(args):
    """Raise one line for the first flag that cannot work: out of its range, or missing. args is a dict."""
    for name, (low, *high) in RANGES.items():
        value = args.get(name, low)
        if not math.inf > value >= low or (high and not value <= high[0]):  # so that NaN is out of range too
            bounds = f"between {low} and {high[0]}" if high else f"at least {low}"
            raise Fatal(f"--{name.replace('_', '-')} must be {bounds}, got {value}")
    sigmas = args.get("student_sigmas", (1.0,))
    if not sigmas or sigmas[0] != 1 or not all(high > low > 0 for high, low in pairwise(sigmas)):
        raise Fatal(f"--student-sigmas must start at 1 and fall, above 0, got {' '.join(map(str, sigmas))}")
    ends = args.get("phase_ends", (0.0,))
    if not ends or ends[-1] != 0 or list(ends[:-1]) != [sigma for sigma in sigmas[1:] if sigma in ends]:
        raise Fatal(
            f"--phase-ends must be some of --student-sigmas below 1, falling, then 0, got {' '.join(map(str, ends))}"
        )
    if any(end >= 0.98 for end in ends):
        raise Fatal(f"--phase-ends must be below .98, the highest score time, got {' '.join(map(str, ends))}")
    if args["steps"] % len(ends):
        raise Fatal(f"--steps must be a multiple of the {len(ends)} phases, got {args['steps']}")
    if not all(0 <= beta < 1 for beta in args.get("betas", ())):
        raise Fatal(f"--betas must be in [0, 1), got {' '.join(map(str, args['betas']))}")
    if args.get("init") and not args.get("resume") and not Path(args["init"]).is_dir():
        raise Fatal(f"--init: no such folder {args['init']}")
    if not (args.get("init") or args.get("from_scratch", True) or args.get("resume") or args.get("dry_run")):
        raise Fatal(
            "--init CHECKPOINT is missing. From the teacher's weights this method is known not to converge; train "
            "dmd2.py first, or try it anyway with --from-scratch"
        )


def needs_clips(args):
    """Whether the flags ask for clips besides prompts; one line if there are none. args is a dict."""
    why = {
        "--gan-weight": args.get("gan_weight"),
        "--data-prob": args.get("data_prob"),
        "--student-input data": args.get("student_input") == "data",
    }
    flags = [flag for flag, needed in why.items() if needed]
    if flags and not args["data"] and (args["prompts"] or recipe_name(args["teacher"]) != "tiny"):
        raise Fatal(
            f"{flags[0]} needs clips, and prompts are not: pass --data FOLDER (latent shards), or switch off "
            "what needs them: --gan-weight 0, --data-prob 0, --student-input simulate"
        )
    return bool(flags)


def check_blocks(teacher, args):
    """Raise one line if the discriminator is to read blocks that the network has not. args is a dict."""
    blocks, last = args["discriminator_blocks"], teacher.config["num_layers"] - 1
    wrong = not blocks or len(set(blocks)) < len(blocks) or min(blocks) < 0 or max(blocks) > last
    if wrong and args["gan_weight"]:
        raise Fatal(
            f"--discriminator-blocks must be different numbers from 0 to {last}, got {' '.join(map(str, blocks))}"
        )


def read_json(path):
    """The dict in a JSON file."""
    try:
        record = json.loads(Path(path).read_text())
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
        return record
    except (OSError, ValueError) as error:
        raise Fatal(f"cannot read {path}: {error}") from None


def init_distributed():
    """Join torchrun's process group, or make one of a single process. Returns (rank, world size, device)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # two hours: while one process downloads a teacher, the others wait
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)
    return dist.get_rank(), dist.get_world_size(), device


def teacher_folder(teacher, *parts):
    """Local folder that holds the `parts` ("transformer", "vae", …) of a teacher, downloaded once if it is on the Hub.

    teacher: a name in TEACHERS, or a folder in the diffusers layout.
    """
    source = TEACHERS.get(teacher, teacher)
    if teacher in TEACHERS and teacher != "tiny":
        from huggingface_hub import snapshot_download

        patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
        try:
            folder = snapshot_download(source, allow_patterns=patterns, local_files_only=True)
            if not all((Path(folder) / part).is_dir() for part in parts):
                raise OSError("incomplete")
        except (OSError, ValueError):
            try:
                if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                    snapshot_download(source, allow_patterns=patterns)
                dist.barrier()  # one download a machine
                folder = snapshot_download(source, allow_patterns=patterns, local_files_only=True)
            except Exception as error:  # the hub client raises a dozen kinds for "no network", "no access", "no space"
                raise Fatal(
                    f"cannot get {source} ({type(error).__name__}). Offline: run `hf download {source} "
                    f"--local-dir DIR` where there is a network, copy DIR here and pass --teacher DIR"
                ) from None
        source = folder
    if not Path(source).is_dir():
        raise Fatal(f"unknown teacher {teacher!r}: use {', '.join(TEACHERS)}, or a folder in the diffusers layout")
    for part in parts:
        if not (Path(source) / part).is_dir():
            raise Fatal(f"{source} has no {part}/ folder: not a complete copy in the diffusers layout")
    return Path(source)


def check_weights(folder):
    """Raise one line unless a part's safetensors are there, and as long as their headers say."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Fatal(f"{folder} holds no *.safetensors: not a complete copy, download it again")
    for file in files:
        with readable(file), safe_open(file, framework="pt"):
            pass


@contextmanager
def readable(path):
    """What is read in this block from a teacher's files ends in one line if it cannot be."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Fatal(f"cannot read {path} ({reason}): copy or download it again") from None


class Wan(nn.Module):
    """Wan 2.1 text-to-video: cond = {"text": [b, l, d]}, zero beyond each prompt's end, as WanPipeline pads it."""

    transformer_class = WanTransformer3DModel
    fps = 16
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    # a constant of the model: the negative prompt of diffusers' Wan examples, which is Wan's own in English
    negative_prompt = (
        "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
        "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly "
        "drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy "
        "background, three legs, many people in the background, walking backwards"
    )

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    @property
    def blocks(self):
        return self.transformer.blocks

    @property
    def width(self):
        """Width of a block's output [b, tokens, width]."""
        return self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim

    def forward(self, x_t, sigma, cond):
        """x_t [b, c, f, h, w], sigma [b] in [0, 1] -> velocity [b, c, f, h, w], float32."""
        dtype = self.transformer.patch_embedding.weight.dtype
        timestep = 1000 * sigma.float()  # stays float32: bf16 would round 937 to 936
        v = self.transformer(x_t.to(dtype), timestep, cond["text"].to(dtype), return_dict=False)[0]
        return v.float()

    @staticmethod
    def shapes(config, vae, frames, height, width):
        """Latent shape (c, f, h, w) and patch size (f, h, w) of a video of that many pixels; one line if it has none.

        config and vae are the dicts of the transformer's and the VAE's config.json.
        """
        time, space = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
        patch = config.get("patch_size", (1, 2, 2))
        for name, pixels, step in (("height", height, space * patch[1]), ("width", width, space * patch[2])):
            if pixels < step or pixels % step:
                raise Fatal(f"--{name} must be a multiple of {step} for this teacher, got {pixels}")
        if frames < 1 or (frames - 1) % time:
            raise Fatal(f"--frames must be 1 + a multiple of {time} for this teacher, got {frames}")
        shape = (config["in_channels"], (frames - 1) // time + 1, height // space, width // space)
        longest = max(size // p for size, p in zip(shape[1:], patch, strict=True))
        if longest > config.get("rope_max_seq_len", math.inf):
            raise Fatal(
                f"{frames} frames of {height} x {width} are {longest} patches along one side; this teacher's rotary "
                f"embedding has {config['rope_max_seq_len']}: see --frames, --height, --width"
            )
        return shape, patch

    @staticmethod
    def text_length(folder):
        """Tokens a prompt is padded to: the tokenizer's own limit, at most the 512 that WanPipeline pads to."""
        return min(read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length", 512), 512)

    @staticmethod
    def text_encoder(folder, device):
        """A function: list of n prompts -> list of n embeddings [tokens, d] on the CPU."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with readable(folder):
            pipe = WanPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype)
        pipe.to(device)
        length = Wan.text_length(folder)

        @torch.no_grad()
        def encode(prompts):
            prompts = [prompt_clean(prompt) for prompt in prompts]
            ids = pipe.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            mask = ids.attention_mask.to(device)
            text = pipe.text_encoder(ids.input_ids.to(device), mask).last_hidden_state
            return [row[: int(n)].cpu().contiguous() for row, n in zip(text, mask.sum(1), strict=True)]

        return encode

    @staticmethod
    def load_vae(folder, device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with readable(folder / "vae"):
            vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=dtype)
        return vae.to(device).requires_grad_(False)

    @staticmethod
    @torch.no_grad()
    def encode(vae, video):
        """Video [b, 3, f, h, w] in [0, 1] -> normalised latents [b, c, f', h', w'], float32 (the posterior's mode)."""
        latents = vae.encode((2 * video - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        mean, std = (torch.tensor(s, device=vae.device) for s in (vae.config.latents_mean, vae.config.latents_std))
        return (latents.float() - rearrange(mean, "c -> c 1 1 1")) / rearrange(std, "c -> c 1 1 1")

    @staticmethod
    @torch.no_grad()
    def decode(vae, latents):
        """Normalised latents [b, c, f', h', w'] -> video [b, 3, f, h, w] in [0, 1], float32."""
        mean, std = (torch.tensor(s, device=vae.device) for s in (vae.config.latents_mean, vae.config.latents_std))
        latents = latents * rearrange(std, "c -> c 1 1 1") + rearrange(mean, "c -> c 1 1 1")
        return (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() + 1) / 2


FAMILIES = {"WanTransformer3DModel": Wan}


class Teacher:
    """What is known of a teacher before its weights are read: family, folder, configs, latent shape.

    frames, height and width are the video's, in pixels. With offline=True, the Wan presets need no files at all.
    """

    def __init__(self, teacher, frames, height, width, offline=False):
        self.name = teacher
        if offline and teacher in WAN_CONFIGS:
            self.folder, self.family = None, Wan
            fixed = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "in_channels": 16}
            self.config = {**fixed, **WAN_CONFIGS[teacher]}
            vae, self.text_length = {}, 512
        else:
            self.folder = teacher_folder(teacher, "transformer", "vae", "tokenizer", "text_encoder")
            for part in ("transformer", "vae", "text_encoder") if not offline else ():
                check_weights(self.folder / part)
            self.config = read_json(self.folder / "transformer" / "config.json")
            if self.config.get("_class_name") not in FAMILIES:
                raise Fatal(
                    f"{self.folder} holds a {self.config.get('_class_name')}; known: {', '.join(FAMILIES)} "
                    "(a family is one class in common.py)"
                )
            self.family = FAMILIES[self.config["_class_name"]]
            vae = read_json(self.folder / "vae" / "config.json")
            self.text_length = self.family.text_length(self.folder)
        self.text_dim = self.config["text_dim"]
        self.latent_shape, self.patch = self.family.shapes(self.config, vae, frames, height, width)
        self.world = tiny if recipe_name(teacher) == "tiny" else None
        if self.world and (frames, height, width) != (tiny.FRAMES, tiny.SIZE, tiny.SIZE):
            raise Fatal(
                f"the tiny world is {tiny.FRAMES} frames of {tiny.SIZE} x {tiny.SIZE}: --frames, --height, --width"
            )
        self.fps = tiny.FPS if self.world else self.family.fps
        self.negative_prompt = "" if self.world else self.family.negative_prompt

    def load_network(self, trained, device, dtype=None, gradient_checkpointing=False, lora_rank=0, lora_alpha=1.0):
        """The teacher's network, sharded over all ranks. Student and fake score are copies: load it again.

        trained networks keep float32 master weights; frozen ones are bf16 on a GPU (dtype says otherwise). Compute is
        bf16 on a GPU, with float32 gradient reduction, and float32 on the CPU. requires_grad is set here, once: FSDP2
        fixes its reduction dtype at the first forward. With lora_rank only a LoRA on attention and feed-forward layers
        is trained, its update scaled by lora_alpha / lora_rank.
        """
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" and not trained else torch.float32
        with init_empty_weights(include_buffers=False):
            transformer = self.family.transformer_class.from_config(self.config)
        if lora_rank:
            transformer.add_adapter(self.lora_config(lora_rank, lora_alpha))
        # the rotary embedding's tables: no file holds them, and they stay float32 as in a stock bf16 model
        buffers = {name: buffer.clone() for name, buffer in transformer.named_buffers()}
        network = self.family(transformer).to(dtype).requires_grad_(trained)
        if lora_rank:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(trained and ".lora_" in name)
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        shard(network, device)
        network.to_empty(device=device)
        for name, buffer in buffers.items():
            module, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(module), leaf, buffer.to(device))
        self.reset(network)
        return network

    def lora_config(self, rank, alpha):
        from peft import LoraConfig

        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=self.family.lora_layers)

    def reset(self, network):
        """Give a network of `load_network` the teacher's weights (again); a discriminator on it stays as it is."""
        put_weights(network, self.folder / "transformer", next(network.parameters()).dtype)

    def weights_id(self):
        """Something that changes when the transformer's files do."""
        return hashed(*stamps(sorted((self.folder / "transformer").iterdir())))


def put_weights(network, folder, dtype):
    """Fill a sharded network with the safetensors of a transformer's folder in the diffusers layout, in place.

    A LoRA on it starts as no change: its first half as nn.Linear's weights do, its second half zero.
    """
    weights = {}
    if dist.get_rank() == 0:
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else []
        for name in files or ["diffusion_pytorch_model.safetensors"]:
            with readable(folder / name):
                weights |= {key: value.to(dtype) for key, value in load_file(folder / name).items()}
        generator = torch.Generator().manual_seed(0)
        for key, parameter in network.transformer.state_dict().items():
            if ".base_layer." in key and key.replace(".base_layer.", ".") in weights:
                weights[key] = weights.pop(key.replace(".base_layer.", "."))
            elif ".lora_" in key:
                bound = parameter.shape[1] ** -0.5 if ".lora_A." in key else 0
                weights[key] = torch.empty(parameter.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
    reshard(network)
    try:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1)
        set_model_state_dict(network.transformer, weights, options=options)
    except (RuntimeError, KeyError, ValueError) as error:
        raise Fatal(f"the weights in {folder} do not fit: {str(error).splitlines()[0]}") from None


def shard(network, device):
    """FSDP2, in place: every one of `network.blocks` is a unit, the rest is the root's. Returns the network.

    A single process on the CPU has nothing to shard.
    """
    if device.type == "cpu" and dist.get_world_size() == 1:
        return network
    bf16 = torch.bfloat16 if device.type == "cuda" else None
    # inputs are cast by the family's forward, which keeps the timestep in float32
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(network, mesh=mesh, mp_policy=policy)


def reshard(network):
    """Give the parameters back to FSDP2, which leaves a root unsharded after a forward without gradient."""
    if hasattr(network, "reshard"):
        network.reshard()


def clip_grad_norm(network, max_norm):
    """Clip the gradient of the whole network in place; returns its norm before clipping, a float tensor []."""
    norm = nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def ema_update(ema, student, decay):
    """ema <- decay * ema + (1 - decay) * student, in place; nothing to do when both are the same network."""
    if ema is not student:
        reshard(ema), reshard(student)
        torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - decay)


def gather_rows(x):
    """Rows [world * b, ...] of all ranks, from x [b, ...] of each; the same b everywhere.

    The backward of PyTorch's differentiable all-gather sums the gradients that all ranks have for these rows. So a loss
    of all rows, computed on every rank and averaged over ranks as FSDP2 does, has the gradient of one process that
    holds the whole batch.
    """
    return torch.cat(all_gather(x))


def mean_over_ranks(values):
    """dict of scalar tensors or floats -> dict of floats, averaged over ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / dist.get_world_size()).tolist(), strict=True))


def load_init(path, networks):
    """Start networks from a checkpoint (or the newest one of a run folder) of any script, or from a student alone.

    networks: dict of "student", "fake_score" and perhaps "ema". What the checkpoint lacks keeps the teacher's weights,
    and an average starts at the student; both are said. What only the checkpoint has is ignored. Of a run with phases
    one expert must be named, by its folder: student/transformer, student/transformer_2, …
    """
    path = Path(path)
    if not path.is_dir():
        raise Fatal(f"--init: no such folder {path}")
    path = (latest_checkpoint(path) or path) if (path / "checkpoints").is_dir() else path
    experts = path / "student" if (path / "checkpoint.json").is_file() else path
    if (experts / "transformer_2").is_dir():
        raise Fatal(f"--init: {path} has an expert a phase: name one, {experts / 'transformer'} or transformer_2, …")
    if (path / "checkpoint.json").is_file():
        check_checkpoint(path)
        found = load_networks(path, networks)
    elif (path / "transformer").is_dir() or (path / "diffusion_pytorch_model.safetensors").is_file():
        found = {"student"}
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        put_weights(networks["student"], folder, torch.float32)
    else:
        found = set()
    if "student" not in found:
        raise Fatal(f"--init: no student in {path}: pass a run, a checkpoint, or a folder that holds transformer/")
    if "ema" in networks and "ema" not in found:
        ema_update(networks["ema"], networks["student"], 0)
    if dist.get_rank() == 0:
        kept = (
            "; it has no fake score, which starts from the teacher" if "fake_score" in networks.keys() - found else ""
        )
        print(f"starting from {', '.join(sorted(found))} of {path}{kept}")


def load_networks(checkpoint, networks):
    """Fill those of the networks, a dict by name, that a checkpoint has; returns their names.

    A network is there as a whole or not at all, but for its discriminator, which may be new.
    """
    reader = dcp.HuggingFaceStorageReader(str(checkpoint / "state"))
    known, wanted = reader.read_metadata().state_dict_metadata, flat_state(networks, {})
    found = {name for name in networks if any(key.startswith(f"{name}.") for key in known)}
    state = {key: value for key, value in wanted.items() if key in known}
    for key, value in wanted.items():
        if key in known and known[key].size != value.shape:
            raise Fatal(f"--init {checkpoint}: {key} is {tuple(known[key].size)}, this teacher's {tuple(value.shape)}")
        if key not in known and key.split(".")[0] in found and ".discriminator." not in key:
            raise Fatal(
                f"--init {checkpoint}: it has no {key}; one of the two has a LoRA. Pass "
                f"{checkpoint / 'student' / 'transformer'}, where it is merged"
            )
    dcp.load(state, storage_reader=reader)
    for name in found:
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        set_model_state_dict(networks[name], own, options=StateDictOptions(strict=False))
    return found


def flat_state(networks, optimizers):
    """name.parameter -> tensor, for all networks and optimizers: safetensors hold nothing but tensors.

    An optimizer of the same name as a network belongs to it. Its hyper-parameters come from the flags, not from here.
    """
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {}
    for name, network in networks.items():
        state |= {f"{name}.{key}": value for key, value in get_model_state_dict(network).items()}
    for name, optimizer in optimizers.items():
        values = get_optimizer_state_dict(networks[name], optimizer, options=flat)
        state |= {f"{name}_optimizer.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
    return state


def merged(network, state):
    """The transformer's weights in `state`, the full state dict of a network, with a LoRA added to its layers."""
    weights = {key.removeprefix("transformer."): value.clone() for key, value in state.items()}
    for name, module in network.transformer.named_modules():
        if hasattr(module, "lora_A"):
            down, up = (weights.pop(f"{name}.lora_{half}.default.weight") for half in "AB")
            weights[f"{name}.weight"] = weights.pop(f"{name}.base_layer.weight") + module.scaling["default"] * up @ down
            if f"{name}.base_layer.bias" in weights:
                weights[f"{name}.bias"] = weights.pop(f"{name}.base_layer.bias")
    return weights


def latest_checkpoint(folder):
    """The newest complete checkpoint in a run folder, or None."""
    steps = sorted(Path(folder).glob("checkpoints/step_*"), key=lambda path: path.name)
    steps = [path for path in steps if not path.name.endswith(".tmp")]
    return steps[-1] if steps else None


def check_checkpoint(path):
    """Raise one line unless every file that the checkpoint was written with is there, whole; returns its record."""
    if not (path / "checkpoint.json").is_file():
        raise Fatal(f"{path} is not a complete checkpoint (no checkpoint.json): resume from another one")
    record = read_json(path / "checkpoint.json")
    if not isinstance(record.get("files"), dict) or not isinstance(record.get("step"), int):
        raise Fatal(f"{path / 'checkpoint.json'} is damaged: resume from another checkpoint")
    for name, size in record["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise Fatal(f"{path} is incomplete: {name} is missing or has the wrong size; resume from another one")
    return record


def run_prefix(script, teacher, seed):
    """How the names of the runs of a script, teacher and seed begin."""
    return f"{Path(script).stem}__{Path(teacher).name}__{seed}__"


def find_checkpoint(runs_dir, prefix, resume):
    """The checkpoint folder that --resume means: "latest", a run folder, or a checkpoint folder."""
    if resume == "latest":
        found = [c for run in sorted(Path(runs_dir).glob(prefix + "*")) if (c := latest_checkpoint(run))]
        if not found:
            raise Fatal(f"--resume latest: no checkpoint in {runs_dir}/{prefix}*; leave --resume out to start")
        return max(found, key=lambda path: path.stat().st_mtime)
    path = Path(resume).absolute()
    if not path.is_dir():
        raise Fatal(f"--resume: no such folder {resume}")
    return (latest_checkpoint(path) or path) if (path / "checkpoints").is_dir() else path


class Run:
    """Folder, logs and checkpoints of one run: runs/<script>__<teacher>__<seed>__<time>/.

    args is the dict that is recorded. resume: None, "latest" (the newest run of the same script, teacher and seed that
    has a checkpoint), a run folder, or a checkpoint folder. `step` is the first step to do. Making a Run checks all
    this and makes no run folder; `begin` does.
    """

    def __init__(self, script, args, runs_dir, resume=None, keep=3, track=False):
        self.rank, self.script, self.keep, self.track = dist.get_rank(), script, keep, track
        self.args = args = json.loads(json.dumps(args, default=str))
        self.writer, self.wandb, self.bar, self.signal, self.handlers = None, None, None, 0, {}
        prefix = run_prefix(script, args["teacher"], args["seed"])
        self.checkpoint = find_checkpoint(runs_dir, prefix, resume) if resume else None
        self.step = check_checkpoint(self.checkpoint)["step"] if self.checkpoint else 0
        new = Path(runs_dir) / f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = self.checkpoint.parents[1] if self.checkpoint else new
        if self.checkpoint:
            self.check_resumed()
        make_folder(self.folder if self.checkpoint else runs_dir)
        if track and find_spec("wandb") is None:
            raise Fatal("--track needs Weights & Biases: pip install wandb")

    def begin(self, networks, optimizers):
        """Fill networks and optimizers from the checkpoint, if there is one, and open the run folder and its logs."""
        self.load(networks, optimizers)
        if not self.checkpoint:
            names = [unused_folder(self.folder) if self.rank == 0 else None]
            dist.broadcast_object_list(names)
            self.folder = names[0]
        if self.rank == 0:
            make_folder(self.folder / "checkpoints")
            make_folder(self.folder / "previews")
            for leftover in self.folder.glob("checkpoints/*.tmp"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)
            record, args = self.folder / "args.json", self.args
            before = read_json(record) if self.checkpoint else args
            for name in sorted(args.keys() - {"resume", "runs_dir"}):
                if args[name] != before.get(name):
                    print(f"resuming with --{name.replace('_', '-')} {args[name]}, it was {before.get(name)}")
            record.write_text(json.dumps(args, indent=2) + "\n")
            (self.folder / "revision.txt").write_text(git_revision())
            shutil.copy(self.script, self.folder)
            self.writer = SummaryWriter(str(self.folder), purge_step=self.step)
            if self.track:
                import wandb

                name = self.folder.name
                self.wandb = wandb.init(project="video-distillation", name=name, config=self.args, resume="allow")
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    def check_resumed(self):
        """Raise one line unless these args can go on where the checkpoint stopped."""
        if not (self.folder / Path(self.script).name).is_file():
            raise Fatal(
                f"--resume: {self.folder} is no run of {Path(self.script).name}; to start from its weights, --init it"
            )
        if self.step > self.args["steps"]:
            raise Fatal(f"--steps {self.args['steps']} is over: {self.checkpoint} has {self.step} steps")
        newest = latest_checkpoint(self.folder)
        if newest and newest.name > self.checkpoint.name:
            raise Fatal(
                f"--resume: {self.folder} goes on to {newest.name}, which the new steps would mix with: move what is "
                f"later than {self.checkpoint.name} out of checkpoints/ first"
            )
        before = read_json(self.folder / "args.json")
        for name in ("steps", "phase_ends") if "phase_ends" in before else ():  # they say which expert is trained when
            if self.args[name] != before[name]:
                raise Fatal(f"--{name.replace('_', '-')} cannot change in a run with phases: it was {before[name]}")

    def on_signal(self, number, frame):
        """Stop after this step. Ctrl-C again, later than torchrun repeats it to its processes, does not wait for it."""
        if self.signal and number == signal.SIGINT and time.monotonic() > self.signalled + 5:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.signalled = number, time.monotonic()

    def stop_signal(self):
        """The signal that asks this run to stop, agreed by all ranks; 0 if none. Call once a step, on every rank."""
        if dist.get_world_size() == 1:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def load(self, networks, optimizers):
        if not self.checkpoint:
            return
        state = flat_state(networks, optimizers)
        try:
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(self.checkpoint / "state")))
        except (Exception, dcp.CheckpointException) as error:  # dcp's own wraps every cause and is no Exception
            reason = str(error).strip().splitlines()[-1]
            raise Fatal(
                f"cannot resume from {self.checkpoint}: {reason}. Flags must be those in {self.folder / 'args.json'}"
            ) from None
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        for name, network in networks.items():
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            set_model_state_dict(network, own)
        for name, optimizer in optimizers.items():
            own = get_optimizer_state_dict(networks[name], optimizer, options=flat)
            prefix = f"{name}_optimizer."
            own |= {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            set_optimizer_state_dict(networks[name], optimizer, own, options=flat)

    def save(self, step, networks, optimizers, export):
        """Write checkpoints/step_<step>/ aside, then rename it: the folder is there whole or not at all.

        state/    all networks and optimizers, sharded safetensors of torch.distributed.checkpoint
        student/  `export` alone in the diffusers layout: transformer/config.json and its safetensors. Of a list the
                  second is transformer_2/, as WanPipeline calls it, and so on. A LoRA is merged into its layers.
        """
        final = self.folder / "checkpoints" / f"step_{step:07d}"
        aside = final.with_name(final.name + ".tmp")
        try:
            self.write(step, networks, optimizers, export if isinstance(export, list) else [export], aside)
            if self.rank == 0:
                shutil.rmtree(final, ignore_errors=True)
                os.replace(aside, final)
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            self.close()
            shutil.rmtree(aside, ignore_errors=True)
            reason, last = (str(error).strip() or repr(error)).splitlines()[-1], latest_checkpoint(self.folder)
            raise Fatal(f"cannot write {final}: {reason}; the last checkpoint is {last or 'none'}", code=1) from None
        if self.rank == 0:
            for old in sorted(final.parent.glob("step_*"))[: -self.keep] if self.keep else []:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def write(self, step, networks, optimizers, exports, folder):
        """The files of a checkpoint, see `save`."""
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(folder / "state"), save_distributed=True)
        dcp.save(flat_state(networks, optimizers), storage_writer=writer)
        for i, network in enumerate(exports):
            whole = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if self.rank == 0:
                with init_empty_weights(include_buffers=False):
                    transformer = type(network.transformer).from_config(network.transformer.config)
                transformer.load_state_dict(merged(network, whole), assign=True)
                transformer.save_pretrained(folder / "student" / f"transformer{f'_{i + 1}' if i else ''}")
        if self.rank == 0:
            files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
            record = {"step": step, "world_size": dist.get_world_size(), "files": files}
            (folder / "checkpoint.json").write_text(json.dumps(record, indent=2) + "\n")

    def log(self, step, values, total):
        """Write one step's figures (after averaging over ranks) to TensorBoard and the progress bar.

        Raises Fatal with exit code 1 if a loss or gradient norm is not finite: call it before `save`.
        """
        values = mean_over_ranks(values)
        for name, value in values.items():
            if name.startswith(("loss/", "grad_norm/")) and not math.isfinite(value):
                self.close()
                last = latest_checkpoint(self.folder)
                raise Fatal(f"{name} is {value} at step {step}; the last checkpoint is {last or 'none'}", code=1)
        if self.rank:
            return
        if self.bar is None:
            self.bar = tqdm(initial=self.step, total=total, unit="step", dynamic_ncols=True)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.startswith("loss/")}, refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        self.scalars(step, values)

    def scalars(self, step, values):
        """Write floats to TensorBoard on rank 0, as they are."""
        if self.rank == 0:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            if self.wandb:
                self.wandb.log(values, step=step)

    def finish(self, preview, stop):
        """Flush the logs, say where everything is, give the signals back. Exits with 128 + stop if a signal came."""
        self.close()
        dist.destroy_process_group()
        if self.rank == 0:
            lines = [f"run folder: {self.folder}", f"checkpoint: {latest_checkpoint(self.folder)}"]
            if preview.scores:
                lines = [preview.table(), "", *lines, f"contact sheets and table: {self.folder / 'previews'}"]
            print("\n".join(lines))
        if stop:
            raise SystemExit(128 + stop)

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.bar:
            self.bar.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


def git_revision():
    """The commit, and whether files differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--short"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown\n"
    return revision + (f"with changes:\n{changed}" if changed else "")


def dry_run(teacher, args, forwards, backwards, trained=2, graphs=1, experts=1):
    """Print parameters, memory per GPU and FLOPs per step, from shapes alone.

    args is the dict of the flags; "gpus" 0 stands for this launch's processes. trained: networks with an optimizer,
    float32; the teacher (bf16) and, if there is one, the averaged student (float32) come on top. forwards: forward
    passes of one sample in one step, of all networks; backwards: how many of them are differentiated; graphs: how many
    are alive at once; experts: phases, all but the last of which leave a frozen expert (float32). Of a student with
    --lora-rank only the LoRA has gradients and optimizer. FLOPs are counted by PyTorch on meta tensors (a backward is
    two forwards, and one more with gradient checkpointing). The activation figure adds up what autograd saves in one
    differentiated forward of the bf16 network with flash attention; allocator slack and temporary buffers are not in
    it.
    """
    world_size = args["gpus"] or int(os.environ.get("WORLD_SIZE", 1))
    batch_size, grad_accum, checkpointing = args["batch_size"], args["grad_accum"], args["gradient_checkpointing"]
    frozen = 2 + 4 * (args["ema_decay"] > 0) + 4 * (experts - 1)  # bytes per parameter
    if int(os.environ.get("RANK", 0)):
        return
    with torch.device("meta"):
        network = teacher.family(teacher.family.transformer_class.from_config(teacher.config)).to(torch.bfloat16)
        x_t = torch.empty(1, *teacher.latent_shape)
        sigma, cond = torch.empty(1), {"text": torch.empty(1, teacher.text_length, teacher.text_dim)}
    parameters = sum(p.numel() for p in network.parameters())
    updated, copies = trained * parameters, f"{trained} trained copies"
    if args.get("lora_rank"):
        layers = [m for n, m in network.named_modules() if n.endswith(tuple(teacher.family.lora_layers))]
        lora = args["lora_rank"] * sum(m.in_features + m.out_features for m in layers)
        updated, copies = updated + lora - parameters, f"{copies}, one by {lora / 1e6:,.1f} M of LoRA"
    block = sum(p.numel() for p in network.blocks[0].parameters())
    owned, saved = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    tokens = math.prod(teacher.latent_shape[1:]) // math.prod(teacher.patch)

    def pack(tensor):  # each storage once, and not the weights
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            saved[storage._cdata] = storage
        return tensor

    def flash(query, key, value, **_):  # what a GPU runs; for meta tensors PyTorch would write the matrices out
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    with (
        mock.patch.object(nn.functional, "scaled_dot_product_attention", flash),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        network(x_t, sigma, cond)
    flops, activations = counter.get_total_flops(), sum(storage.nbytes() for storage in saved.values())
    if checkpointing:  # the input of every block, and one block's own
        layers = len(network.blocks)
        activations = layers * tokens * network.width * 2 + activations / layers
    samples = batch_size * grad_accum * world_size
    step = samples * flops * (forwards + (2 + checkpointing) * backwards)
    gib = 1024**3
    rows = {
        "weights": (trained * 4 + frozen) * parameters / world_size,
        "gradients": 4 * updated / world_size,
        "optimizer": 8 * updated / world_size,
        "one unsharded block": 2 * 2 * block,
        "activations": graphs * batch_size * activations,
    }
    rate = 4e14 * world_size  # FLOP/s
    pairs = args["num_pairs"] * args["pair_steps"] * 2 * flops if "num_pairs" in args and not args["pairs"] else 0
    work = {"teacher pairs": pairs, f"all {args['steps']:,} steps": args["steps"] * step}
    lines = [
        f"teacher             {teacher.name}: {parameters / 1e6:,.1f} M parameters, {copies}",
        f"latents             {' x '.join(map(str, teacher.latent_shape))} (c f h w), {tokens:,} tokens",
        f"batch               {batch_size} x {grad_accum} accumulated x {world_size} GPUs = {samples} samples a step",
        "memory per GPU      an estimate: float32 master weights and Adam, bf16 compute",
        *(f"  {name:<20}{size / gib:10.3f} GiB" for name, size in [*rows.items(), ("total", sum(rows.values()))]),
        f"FLOPs per step      {step:.3g}, {step / world_size:.3g} per GPU; {flops:.3g} a forward of one sample",
        f"time per step       {step / rate:.3g} s if a GPU sustains 400 TFLOP/s: assumed, not measured",
        *(f"  {name:<18}{total / rate / 3600:.3g} hours" for name, total in work.items() if total),
    ]
    print("\n".join(lines))


# ---------------------------------------------------------------------------------------------------------- data


class SharedDraws:
    """Random numbers of a step that are the same on all ranks: for what changes the number of forwards."""

    def __init__(self, seed, step):
        self.key = (seed, step)

    def uniform(self, stream):
        """A float in [0, 1), a function of (seed, step, stream) alone: one stream never disturbs another."""
        return hashed(*self.key, stream) / 2**63


class Draws:
    """Random numbers of a micro-batch: sample i has a generator of its own, seeded by (seed, stream, i).

    So a sample's noise does not depend on how many processes or micro-batches share the work.
    """

    def __init__(self, seed, stream, indices, device):
        self.generators = [torch.Generator(device).manual_seed(hashed(seed, stream, int(i))) for i in indices]

    def __len__(self):
        return len(self.generators)

    def normal(self, shape):
        """Standard normal [b, *shape], float32."""
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self.generators])

    def uniform(self):
        """Uniform on [0, 1), [b], float32."""
        return torch.stack([torch.rand((), generator=g, device=g.device) for g in self.generators])


def hashed(*key):
    """A 63-bit seed of any tuple of numbers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def stamps(paths):
    """(name, size, time) of files, for `hashed`: something that changes when they do, without reading them."""
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def sample_numbers(step, micro, batch_size, grad_accum):
    """Global numbers of this rank's samples in a micro-batch; step s holds samples s * n to (s + 1) * n - 1."""
    first = ((step * grad_accum + micro) * dist.get_world_size() + dist.get_rank()) * batch_size
    return range(first, first + batch_size)


class Shards:
    """Random access to a folder of safetensors shards, each with the rows of some samples.

    tokens   [t, d]           text embeddings of all its prompts, one after another, without padding
    offsets  [n + 1]          int64, prompt i is tokens[offsets[i] : offsets[i + 1]]
    latents  [n, c, f, h, w]  normalised latents of the clips (of a teacher's samples, in a folder of pairs)
    noise    [n, c, f, h, w]  pairs only: the noise that the teacher's ODE took to those latents
    metadata "prompts"        a JSON list of the n prompts

    Headers are read and checked at once, rows only when they are asked for.
    """

    def __init__(self, folder, teacher, device, keys=(), seed=0):
        self.teacher, self.device, self.seed, self.epoch = teacher, device, seed, None
        self.files, self.rows, self.prompts = [], [], []
        paths = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
        if not paths:
            raise Fatal(f"no *.safetensors shards in {folder}")
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            except (OSError, SafetensorError) as error:
                raise Fatal(f"cannot read shard {path} ({error}): it is corrupt or truncated, make it again") from None
            for key in ("tokens", "offsets", *keys):
                if key not in shapes:
                    raise Fatal(f"shard {path} has no {key!r} (it has {', '.join(shapes)})")
            offsets, tokens = file.get_tensor("offsets"), shapes["tokens"]
            if offsets.ndim != 1 or offsets.dtype != torch.int64 or len(tokens) != 2:
                raise Fatal(f"shard {path}: offsets must be int64 [n + 1] and tokens [t, d]; make it again")
            n, offsets = len(offsets) - 1, offsets.tolist()
            if offsets != sorted(offsets) or offsets[:1] != [0] or offsets[-1] != tokens[0]:
                raise Fatal(f"shard {path}: offsets must rise from 0 to the {tokens[0]} tokens; make it again")
            if tokens[1] != teacher.text_dim:
                raise Fatal(
                    f"shard {path}: text embeddings are {tokens[1]} wide, {teacher.name} takes {teacher.text_dim}"
                )
            for key in keys:
                if shapes[key] != (n, *teacher.latent_shape):
                    raise Fatal(
                        f"shard {path}: {key} are {shapes[key]}, expected {(n, *teacher.latent_shape)} "
                        "from --frames, --height, --width and the teacher's VAE"
                    )
            try:
                prompts = json.loads((file.metadata() or {}).get("prompts", json.dumps([""] * n)))
            except ValueError:
                prompts = None
            if not isinstance(prompts, list) or len(prompts) != n or not all(isinstance(p, str) for p in prompts):
                raise Fatal(f"shard {path}: metadata 'prompts' must be a JSON list of its {n} prompts; make it again")
            self.prompts += prompts
            self.rows += [(len(self.files), row) for row in range(n)]
            self.files.append((file, offsets))
        if not self.rows:
            raise Fatal(f"the shards in {folder} hold no samples")

    def __len__(self):
        return len(self.rows)

    def row(self, number):
        """Row of sample `number`: every row once an epoch, in an order that is a function of (seed, epoch)."""
        epoch, place = divmod(number, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(hashed(self.seed, "epoch", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator).tolist()
        return self.order[place]

    def prompt(self, number):
        return self.prompts[self.row(number)]

    def cond(self, numbers):
        """Conditions of samples, {"text": [b, l, d]} float32 on the device."""
        return self.cond_of([self.row(number) for number in numbers])

    def latents(self, numbers, key="latents"):
        """Latents (or noise) of samples, [b, c, f, h, w] float32 on the device."""
        return self.latents_of([self.row(number) for number in numbers], key)

    def cond_of(self, rows):
        text = torch.zeros(len(rows), self.teacher.text_length, self.teacher.text_dim)
        for out, (file, row) in zip(text, (self.rows[r] for r in rows), strict=True):
            file, offsets = self.files[file]
            tokens = file.get_slice("tokens")[offsets[row] : offsets[row + 1]][: len(out)]
            out[: len(tokens)] = tokens
        return {"text": text.to(self.device)}

    def latents_of(self, rows, key="latents"):
        picked = [self.files[file][0].get_slice(key)[row : row + 1] for file, row in (self.rows[r] for r in rows)]
        return torch.cat(picked).float().to(self.device)


def write_shard(path, prompts, texts, **tensors):
    """Write one shard of n samples (see Shards), aside and then renamed. texts: list of n [tokens, d]."""
    offsets = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)
    tensors |= {"tokens": torch.cat(list(texts)), "offsets": offsets}
    with metrics.written_aside(path) as aside:
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata={"prompts": json.dumps(prompts)})


def shared_chunks(folder, total, size):
    """Chunks of the sample numbers 0 to total - 1 that `folder` has no shard of yet, dealt out to the ranks.

    Every rank gets equally many, so that sharded networks run in step; some are then made twice.
    """
    if dist.get_rank() == 0:
        make_folder(folder)
    dist.barrier()
    missing = [first for first in range(0, total, size) if not Path(folder, f"{first:08d}.safetensors").is_file()]
    dist.barrier()
    world, rank = dist.get_world_size(), dist.get_rank()
    for i in tqdm(range(math.ceil(len(missing) / world)), desc="teacher pairs", disable=rank > 0 or not missing):
        first = missing[(i * world + rank) % len(missing)]
        yield range(first, min(first + size, total))
    dist.barrier()


def write_pairs(folder, data, numbers, cond, noise, latents):
    """Write one shard of teacher pairs, named by its first sample's number."""
    prompts = [data.prompt(number) for number in numbers]
    path = Path(folder) / f"{numbers[0]:08d}.safetensors"
    write_shard(path, prompts, unpadded(cond["text"]), noise=noise.cpu(), latents=latents.cpu())


def unpadded(text):
    """Padded embeddings [b, l, d] -> list of b [tokens, d] on the CPU: padding is zero, and no real token's is."""
    return [row[: int(row.abs().sum(-1).count_nonzero())].cpu() for row in text]


def make_folder(folder, hint="; see --runs-dir"):
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
    except OSError as error:
        raise Fatal(f"cannot write the folder {folder}: {error.strerror}{hint}") from None


def unused_folder(folder):
    """Make the folder; if there is one already, the first of folder-2, folder-3, … that is not. Returns which."""
    for i in count(1):
        free = folder.with_name(f"{folder.name}-{i}") if i > 1 else folder
        try:
            free.mkdir()
            return free
        except FileExistsError:
            pass


def read_prompts(path):
    """Prompts of a UTF-8 text file (with or without a byte order mark), one a line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        prompts = [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Fatal(f"cannot read the prompts in {path}: {reason}") from None
    if not prompts:
        raise Fatal(f"{path} holds no prompts: write one a line")
    if "" in prompts:
        raise Fatal(f"{path}: line {prompts.index('') + 1} is an empty prompt")
    return prompts


def encode_text(teacher, prompts, cache, device, chunk=1024):
    """Encode prompts once, into shards under `cache`; a Shards of them, row i for prompt i.

    Ranks share the work. The text encoder is loaded only if something is missing and freed afterwards.
    """
    config = json.dumps(read_json(teacher.folder / "text_encoder" / "config.json"))
    key = hashed(prompts, config, stamps(sorted((teacher.folder / "text_encoder").iterdir())), teacher.text_length)
    folder = Path(cache) / f"text_{key:016x}"
    encode = None
    make_folder(folder)
    for first in range(dist.get_rank() * chunk, len(prompts), dist.get_world_size() * chunk):
        path, part = folder / f"{first:08d}.safetensors", prompts[first : first + chunk]
        if not path.is_file():
            encode = encode or teacher.family.text_encoder(teacher.folder, device)
            texts = [text for i in range(0, len(part), 16) for text in encode(part[i : i + 16])]
            write_shard(path, part, texts)
    del encode
    dist.barrier()
    return Shards(folder, teacher, device)


class TinyWorld:
    """Samples of the tiny world, made on the fly: sample i is the clip (seed, i) with its caption. See tiny/data.py."""

    def __init__(self, teacher, cache, device, seed):
        self.teacher, self.device, self.seed, self.vae = teacher, device, seed, None
        self.prompts = list(tiny.CAPTIONS)
        self.captions = encode_text(teacher, self.prompts, cache, device)

    def caption(self, number):
        factors = tiny.draw_factors(self.seed, number)
        return factors["color"] * len(tiny.KINDS) + factors["kind"]

    def prompt(self, number):
        return self.prompts[self.caption(number)]

    def cond(self, numbers):
        return self.captions.cond_of([self.caption(number) for number in numbers])

    def latents(self, numbers):
        self.vae = self.vae or self.teacher.family.load_vae(self.teacher.folder, self.device)
        return self.teacher.family.encode(self.vae, tiny.batch(self.seed, numbers)[0])

    def cond_of(self, rows):
        return self.captions.cond_of(rows)


def load_data(teacher, prompts, data, cache, device, seed):
    """Training samples: latent shards from the folder `data`, prompts from the file `prompts`, or the tiny world."""
    if data:
        return Shards(data, teacher, device, keys=("latents",), seed=seed)
    if prompts:
        encoded = encode_text(teacher, read_prompts(prompts), cache, device)  # no clips
        encoded.seed = seed
        return encoded
    if not teacher.world:
        raise Fatal(f"{teacher.name} needs --prompts FILE (one prompt a line) or --data FOLDER (latent shards)")
    return TinyWorld(teacher, cache, device, seed)


class Preview:
    """Fixed prompts x fixed seeds, sampled again and again, written as mp4s and a contact sheet, and scored.

    The caller samples: `latents = [sampler(rng, cond) for rng, cond in preview.batches()]`, then `write`s them. Every
    rank samples its share, the same number of times. The scores need no pretrained weights: tools/metrics.py, and for
    the tiny world the true factors read back from the pixels.
    """

    def __init__(self, run, teacher, data, prompts, seeds, batch_size, seed, device):
        self.run, self.teacher, self.data, self.device = run, teacher, data, device
        self.labels = data.prompts[:prompts]
        self.seeds, self.batch_size, self.seed = seeds, batch_size, seed
        self.scores, self.shown, self.vae = {}, {}, None
        total, world = len(self.labels) * seeds, dist.get_world_size()
        each = math.ceil(total / world)
        self.total, self.mine = total, [(dist.get_rank() + world * i) % total for i in range(each)]

    def batches(self):
        for first in range(0, len(self.mine), self.batch_size):
            numbers = self.mine[first : first + self.batch_size]
            cond = self.data.cond_of([number // self.seeds for number in numbers])
            yield Draws(self.seed, "preview", numbers, self.device), cond

    def write(self, name, latents):
        """Decode, gather, save and score; name is "teacher" or "step_…". Returns {"preview/…": float} on rank 0."""
        self.vae = self.vae or self.teacher.family.load_vae(self.teacher.folder, self.device)
        videos = [self.teacher.family.decode(self.vae, x).cpu() for batch in latents for x in batch.split(1)]
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(torch.cat(videos), gathered)
        if dist.get_rank():
            return {}
        clips = torch.stack(gathered, dim=1).flatten(0, 1)[: self.total]  # rank r holds samples r, r + world, …
        return self.score(name, rearrange(clips, "(p s) c f h w -> p s c f h w", s=self.seeds))

    def write_data(self):
        """The same figures for the data: clips of the same prompts, where there are any."""
        if dist.get_rank() or isinstance(self.data, Shards) and "latents" not in self.data.files[0][0].keys():
            return
        if isinstance(self.data, TinyWorld):
            numbers = range(10**9, 10**9 + self.total)  # never trained on
            captions = [label for label in self.labels for _ in range(self.seeds)]
            clips = tiny.batch(self.seed, numbers, captions)[0]
        else:
            self.vae = self.vae or self.teacher.family.load_vae(self.teacher.folder, self.device)
            latents = self.data.latents_of(range(len(self.labels)))
            clips = torch.cat([self.teacher.family.decode(self.vae, x).cpu() for x in latents.split(1)])
        self.score("data", rearrange(clips, "(p s) c f h w -> p s c f h w", p=len(self.labels)))

    def score(self, name, clips):
        scores = metrics.preview_metrics(clips)
        if clips.shape[1] == 1:  # one clip a prompt says nothing of diversity
            scores = {key: value for key, value in scores.items() if key not in ("diversity", "vendi")}
        if self.teacher.world and set(self.labels) <= set(tiny.CAPTIONS):  # of other prompts nobody knows what is right
            captions = [label for label in self.labels for _ in range(clips.shape[1])]
            scores |= tiny.summary(clips.flatten(0, 1), captions)
        self.scores[name] = scores
        # four clips of each prompt are enough to look at
        self.shown[name] = clips[:, :4].clone()
        folder = self.run.folder / "previews" / name
        folder.mkdir(parents=True, exist_ok=True)
        for p, row in enumerate(self.shown[name]):
            for s, video in enumerate(row):
                metrics.write_mp4(folder / f"{p:02d}_{s}.mp4", video, self.teacher.fps)
        fixed = [key for key in ("data", "teacher") if key in self.shown and key != name]
        rows = [(f"{self.labels[p]}: {key}", self.shown[key][p]) for p in range(len(clips)) for key in (*fixed, name)]
        metrics.contact_sheet(self.run.folder / "previews" / f"{name}.png", rows)
        if name in ("data", "teacher"):  # what the curves are to be compared with
            self.run.scalars(self.run.step, {f"preview_{name}/{key}": value for key, value in scores.items()})
        else:
            self.shown.pop(name)
        return {f"preview/{key}": value for key, value in scores.items()}

    def table(self):
        """Markdown table of the newest scores beside the teacher's and the data's, also written to previews/."""
        last = [name for name in self.scores if name not in ("data", "teacher")][-1:]
        columns = [name for name in ("data", "teacher", *last) if name in self.scores]
        keys = list(self.scores[columns[-1]])
        lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for key in keys:
            cells = [f"{self.scores[c][key]:.3f}" if key in self.scores[c] else "" for c in columns]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
        (self.run.folder / "previews" / "table.md").write_text("\n".join(lines) + "\n")
        return "\n".join(lines)

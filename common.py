"""Model loading and data: all that the scripts share. No loss, sampler or schedule is in this file.

A network is called `v, features = network(x_t, sigma, cond, blocks)`, see models/. Every random draw and every sample
read is a function of (seed, sample number), so a run has no hidden state: it resumes exactly, at any number of
processes.
"""

import os
import warnings
from datetime import timedelta
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_gather

from models.adapters import Adapted, add_adapters
from models.folders import causal, family_of, teacher_folder
from models.images import find_images
from models.latents import latent_shape
from models.presets import TINY_FPS, TINY_WORLD, family_name, name_of
from models.text import encoded_prompts
from training.files import UserError, hashed, opened, read_json, read_prompts, read_shard, readable

# no script writes in place into a network's output, which is what this warns of
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
# its successor is private and younger than the oldest torch that runs this
warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")

TRAINED = ("student", "fake_score")
IN_FLOAT32 = ".time_embedder"  # Wan's, also in a bf16 model

# ------------------------------------------------------------------------------------------------- model loading


def init_distributed():
    """Join torchrun's process group, or make one of a single process. Returns this process's device."""
    if dist.is_initialized():
        return local_device()
    missing = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} - os.environ.keys()
    joined = len(missing) < 3
    if joined and missing:
        raise UserError(f"{', '.join(sorted(missing))} missing in the environment: start it by torchrun")
    if not joined and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise UserError("srun starts this several times, each alone: let it start a torchrun (docs/cluster.md)")
    device = local_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(hours=2)  # while one process downloads a teacher or finishes a clip, the others wait
    store, rank, world = next(dist.rendezvous("env://", timeout=wait)) if joined else (dist.HashStore(), 0, 1)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # else a restarted process may find those before it (pytorch 135712)
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world)
    return device


def local_device():
    """The GPU of this process, the only one that it sees or that of its local rank; the CPU where there is none."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if not gpus:
        return torch.device("cpu")
    if local >= gpus > 1:
        raise UserError(f"process {local} of this machine has no GPU of its own, {gpus} are visible: start fewer")
    torch.cuda.set_device(local if gpus > 1 else 0)
    return torch.device("cuda", torch.cuda.current_device())


class Model:
    """What is known of a teacher's model beside its weights: family, folder, configs, latent shape. teacher: a name in
    presets.py, or a folder; frames, height and width are the video's, in pixels; compute: RunArgs.compute. student: a
    name or folder whose weights all networks but the teacher begin with, a Model in .student; None: the teacher's.
    """

    def __init__(self, teacher, frames, height, width, compute=None, student=None, negative_prompt=None):
        self.compute = dict(compute or {})
        self.shard_size = self.compute.pop("shard_size", 0)
        self.name, self.family, self.size = teacher, family_of(family_name(teacher)), (frames, height, width)
        self.folder, self.config, self.index, vae, self.text_length = self.read(teacher)
        with readable(f"the configs in {self.folder}"):
            self.text_dim = self.config[self.family.text_dim]
            self.latent_shape, self.patch = latent_shape(self.config, vae, *self.size)
            self.conditions = self.family.conditions(self.config, self.latent_shape)
        self.world = name_of(teacher) in TINY_WORLD
        self.fps = TINY_FPS if self.world else self.family.fps
        own_prompt = "" if self.world else self.family.negative_prompt
        self.negative_prompt = own_prompt if negative_prompt is None else negative_prompt
        self.student = type(self)(student, *self.size, compute) if student else None
        if student:
            import_module("models.students").check(self, self.student)

    def read(self, teacher):
        """The folder; configs of transformer, pipeline and VAE; how many tokens a prompt is padded to."""
        folder = teacher_folder(teacher)
        files = (folder / name for name in ("transformer/config.json", "model_index.json", "vae/config.json"))
        return folder, *map(read_json, files), self.family.text_length(folder)

    def check(self, frame_block, blocks):
        """A causal student of that many frames, and a discriminator of these blocks, can be made of these weights."""
        own = self.student or self
        causal(own.family, own.latent_shape[1], frame_block)
        if not set(blocks) <= set(range(own.config["num_layers"])):
            raise UserError(f"--discriminator-blocks: {own.name} has {own.config['num_layers']} blocks, got {blocks}")

    def load_teacher(self, device, adapters):
        """The teacher, and what LoRAs are put on: the teacher too, or another network of the student's weights."""
        if not self.student:
            return [self.load_network("teacher", device, adapters=adapters)] * 2
        base = self.load_network("base", device, adapters=adapters) if adapters else None
        return self.load_network("teacher", device), base

    def load_network(self, role, device, frame_block=0, dtype=None, base=None, adapters=None):
        """A network with the teacher's weights, or the student's where it has its own, sharded over all ranks.

        role: "teacher" and "base" are frozen, bf16 on a GPU. "student" and "fake_score" are trained and keep float32
        master weights; all others ("ema", "expert_0", …) are frozen, float32; dtype says otherwise. Compute is bf16 on
        a GPU, with float32 gradient reduction, and float32 on the CPU. requires_grad is set here, once: FSDP2 fixes its
        reduction dtype at the first forward.
        adapters: LoRAs to put on it, {role: (rank, alpha)}, none of them on. A network of such a role that is loaded
        with this one as its base is this one with that LoRA on. frame_block: latent frames that a causal student makes
        at a time; 0: it is none.
        """
        from models.compute import prepare

        if self.student and role != "teacher":
            return self.student.load_network(role, device, frame_block, dtype, base, adapters)
        if role in getattr(base, "adapters", ()):
            network = Adapted(base, role, trained=role in TRAINED)
            self.reset(network)
            return network
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" and role in ("teacher", "base") else torch.float32)
        with readable(f"the configs in {self.folder}"), init_empty_weights(include_buffers=False):
            transformers = [self.family.transformer_class.from_config(self.config) for _ in self.family.parts]
            for transformer in transformers:
                add_adapters(transformer, self.family.lora_layers, adapters or {})
        network = causal(self.family, self.latent_shape[1], frame_block)(*transformers, index=self.index)
        network.frame_block, network.adapters, network.folder = frame_block, tuple(adapters or ()), self.folder
        # the rotary embedding's tables: no file holds them, and they stay float32 as in a stock bf16 model
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        for name, parameter in network.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if ".lora_" in name or IN_FLOAT32 in name else dtype)
            parameter.requires_grad_(role in TRAINED)
        prepare(network, transformers, **self.compute)
        self.shard(network, device)
        network.to_empty(device=device)
        for name, buffer in buffers.items():
            module, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(module), leaf, buffer.to(device))
        self.reset(network)
        return network

    @cached_property
    def mesh(self):
        """All ranks, for FSDP2: one for all networks. Groups of --shard-size ranks hold each network once."""
        world = dist.get_world_size()
        together = self.shard_size or world
        if world % together:
            raise UserError(f"--shard-size must divide the {world} processes, got {together}")
        sizes, names = (world // together, together), ("replicate", "shard")
        first = int(together == world)  # then there is nothing to replicate
        return init_device_mesh(local_device().type, sizes[first:], mesh_dim_names=names[first:])

    def shard(self, network, device):
        """FSDP2, in place: every one of `network.blocks` is a unit, what stays float32 is one, the rest is the root's.
        Returns the network. A single process on the CPU has nothing to shard.
        """
        if device.type == "cpu" and dist.get_world_size() == 1:
            return network
        bf16 = torch.bfloat16 if device.type == "cuda" else None
        # inputs are cast by the family's forward, which keeps the timestep in float32
        policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name, module in network.named_modules():
            if name.endswith(IN_FLOAT32):
                fully_shard(module, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        for block in network.blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        return fully_shard(network, mesh=self.mesh, mp_policy=policy)

    def reset(self, network):
        """Give a network of `load_network` the weights of its folder (again); heads on it stay as they are."""
        if isinstance(network, Adapted):
            reshard(network)
            return network.start()
        for part in network.parts:
            put_weights(network, network.folder / part, part)

    def load_vae(self, device, only_decodes=False):
        """The VAE, frozen: float32, as what it encodes is trained on, or bf16 on a GPU if it only decodes."""
        dtype = torch.bfloat16 if device.type == "cuda" and only_decodes else torch.float32
        with readable(self.folder / "vae"):
            vae = self.family.vae_class.from_pretrained(self.folder / "vae", dtype=dtype)
        return vae.to(device).requires_grad_(False)

    def image_encoder(self, device):
        """A function: first frames [b, 3, 1, h, w] in [0, 1] -> {name: [b, …]}, what cond holds of them."""
        if not self.conditions:
            return lambda images: {}
        return self.family.image_encoder(self.folder, self.load_vae(device), self.size[0])


def put_weights(network, folder, part="transformer"):
    """Fill part of a sharded network in place with the safetensors of a diffusers folder of a transformer."""
    reshard(network)
    state = network.get_submodule(part).state_dict()
    weights = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    with readable(f"the weights in {folder}"):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        for key in sorted(weights.keys() ^ reader.read_metadata().state_dict_metadata.keys()):
            raise ValueError(f"{key} is {'missing' if key in weights else 'unknown'}")
        dcp.load(weights, storage_reader=reader)


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

    The backward of PyTorch's differentiable all-gather sums all ranks' gradients of these rows. So a loss of all rows,
    computed on every rank and averaged as FSDP2 does, has the gradient of one process that holds the whole batch.
    """
    return torch.cat(all_gather(x))


# ---------------------------------------------------------------------------------------------------------- data


class SharedRNG:
    """Random numbers of a step that are the same on all ranks."""

    def __init__(self, seed, step):
        self.key = (seed, step)

    def uniform(self, stream):
        """A float in [0, 1), a function of (seed, step, stream) alone: one stream never disturbs another."""
        return hashed(*self.key, stream) / 2**63


class SampleRNG:
    """Random numbers of a micro-batch: sample i has a generator of its own, seeded by (seed, stream, i).

    So a sample's noise does not depend on how many processes or micro-batches share the work.
    """

    def __init__(self, seed, stream, numbers, device):
        self.numbers = numbers
        self.generators = [torch.Generator(device).manual_seed(hashed(seed, stream, int(i))) for i in numbers]

    def __len__(self):
        return len(self.generators)

    def normal(self, shape):
        """Standard normal [b, *shape], float32."""
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self.generators])

    def uniform(self):
        """Uniform on [0, 1), [b], float32."""
        return torch.stack([torch.rand((), generator=g, device=g.device) for g in self.generators])


def on_device(x, device):
    """A tensor of the CPU on the device; a copy to a GPU is waited for by what reads it there, and not here."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Samples:
    """Training samples by number, any number: prompts, what the network reads of them, and perhaps clips.

    A subclass has model, device, seed, prompts (a list), has_clips, and the methods row(number), cond_of(rows) and
    latents(numbers).
    """

    def micro_batches(self, stream, step, batch_size, grad_accum):
        """This rank's micro-batches of a step: (rng, cond, load_x0), draws of `stream`, conditions, and a function that
        reads the clips' latents [b, c, f, h, w]. Over all ranks, step s has the samples s * n to (s + 1) * n - 1.
        """
        for micro in range(grad_accum):
            first = ((step * grad_accum + micro) * dist.get_world_size() + dist.get_rank()) * batch_size
            numbers = range(first, first + batch_size)
            load_x0 = cache(partial(self.latents, numbers))
            yield SampleRNG(self.seed, stream, numbers, self.device), self.cond(numbers), load_x0

    def cond(self, numbers):
        """Conditions of samples, {"text": [b, l, d]} and what the model's family adds, float32 on the device."""
        return self.cond_of([self.row(number) for number in numbers])

    def preview_clips(self, prompts, seeds, to_video):
        """Clips [3, f, h, w] of the first prompts, each with its prompt and seed, to be shown beside samples: of each
        prompt equally many. to_video: latents [b, c, f, h, w] -> clips, one after the other.
        """
        return ((p, 0, clip) for p in range(prompts) for clip in to_video(self.latents_of([p])))

    def measure(self, prompts, clips):
        """What a world whose truth is known reads of clips [p, s, 3, f, h, w]: {name: float}."""
        return {}


class Shards(Samples):
    """Random access to a folder of safetensors shards, each with n samples and their prompts, a JSON list, as metadata.

    0.text     [tokens, d]   embedding of the first prompt, without padding; 1.text, …
    0.latents  [c, f, h, w]  normalised latents of its clip, where it has one
    0.first, … [...]         what an image-to-video teacher reads of its first frame (Model.conditions)
    0.noise    [c, f, h, w]  of a teacher's own samples: the noise that its ODE took to those latents
    settings   [3]           of the same: guidance, shift, steps

    Headers are read and checked at once, samples only when they are asked for. keys: what must be there beside the text
    and the conditions; None for shards of text alone.
    """

    def __init__(self, folder, model, device, seed=0, keys=None, settings=None):
        self.model, self.device, self.seed = model, device, seed
        self.conditions = {} if keys is None else model.conditions
        keys = (*(keys or ()), *self.conditions)
        self.has_clips = "latents" in keys
        self.folder, self.rows, self.prompts, self.orders = Path(folder), [], [], {}
        for path in sorted(self.folder.glob("*.safetensors")):
            prompts, shapes, made_with = read_shard(path)
            for i, key in ((i, key) for i in range(len(prompts)) for key in ("text", *keys)):
                shape = shapes.get(f"{i}.{key}")
                own = {"text": (shape[0] if shape else "tokens", model.text_dim), **self.conditions}
                if shape != (wanted := own.get(key, model.latent_shape)):
                    raise UserError(
                        f"shard {path} is of another teacher: {i}.{key} is {shape or 'missing'}, not {wanted}"
                    )
            if settings and made_with and made_with != list(settings):
                raise UserError(f"{path} has guidance, shift, steps {made_with}, this run {list(settings)}")
            self.prompts += prompts
            self.rows += [(path, i) for i in range(len(prompts))]
        if not self.rows:
            raise UserError(f"no *.safetensors shards in {folder}: tools/make_shards.py makes them of videos")

    def __len__(self):
        return len(self.rows)

    def row(self, number):
        """Row of sample `number`: every row once per epoch, in an order that is a function of (seed, epoch)."""
        epoch, place = divmod(number, len(self))
        if epoch not in self.orders:
            generator = torch.Generator().manual_seed(hashed(self.seed, "epoch", epoch))
            self.orders[epoch] = torch.randperm(len(self), generator=generator).tolist()
        return self.orders[epoch][place]

    def cond_of(self, rows):
        text = torch.zeros(len(rows), self.model.text_length, self.model.text_dim)
        for out, (path, i) in zip(text, (self.rows[row] for row in rows), strict=True):
            tokens = opened(path).get_tensor(f"{i}.text")[: len(out)]
            out[: len(tokens)] = tokens
        return {"text": on_device(text, self.device)} | {key: self.latents_of(rows, key) for key in self.conditions}

    def latents(self, numbers, key="latents"):
        """Latents (noise, a condition) of samples, [b, c, f, h, w] float32 on the device."""
        return self.latents_of([self.row(number) for number in numbers], key)

    def latents_of(self, rows, key="latents"):
        picked = [opened(path).get_tensor(f"{i}.{key}") for path, i in (self.rows[row] for row in rows)]
        return on_device(torch.stack(picked).float(), self.device)


def load_data(model, prompts, data, cache, device, seed, images=None):
    """Training samples: latent shards from the folder `data`, prompts from the file `prompts` (for image-to-video with
    first frames from the folder `images`), or the tiny world; without any, the prompts that ship with the repository.
    """
    if images and (data or not prompts):
        raise UserError("--images goes with --prompts, and without --data, whose clips have their first frames")
    if data:
        return Shards(data, model, device, seed, keys=("latents",))
    if model.world and not prompts:
        return import_module("tiny.samples").TinyWorld(model, cache, device, seed)  # it builds on this file
    prompts = read_prompts(prompts or Path(__file__).parent / "prompts" / "prompts.txt")
    images = find_images(model, images, len(prompts))
    return encode_text(model, prompts, cache, device, images, seed)  # no clips


def encode_text(model, prompts, cache, device, images=(), seed=0):
    """Prompts, encoded once, and perhaps the images at these paths, as Shards under `cache`: row i for prompt i."""
    folder = encoded_prompts(model, prompts, cache, device, images)
    dist.barrier()
    return Shards(folder, model, device, seed, keys=() if images else None)

"""Samples of the teacher itself, made once and kept as shards: pairs for a regression, clips where there are none."""

import math

import torch.distributed as dist
from tqdm import tqdm

import common
from training.files import hashed, stamps, write_shard


def teacher_samples(run, data, sample, args):
    """Shards of the teacher's own samples, noise and latents, for the first --num-samples of data; made only once.

    sample: a function (rng, cond) -> latents. Ranks share the work, each with equally many batches, so that sharded
    networks run in step.
    """
    rank, world, count = dist.get_rank(), dist.get_world_size(), args.num_samples
    folder = run.cache / f"pairs_{samples_key(data, args):016x}"
    paths = {first: folder / f"{first:08d}.safetensors" for first in range(0, count, args.batch_size)}
    missing = [first for first, path in paths.items() if not path.is_file()]
    dist.barrier()
    for turn in tqdm(range(math.ceil(len(missing) / world)), "teacher samples", disable=rank > 0 or not missing):
        first = missing[(turn * world + rank) % len(missing)]
        numbers = range(first, min(first + args.batch_size, count))
        draws = lambda numbers=numbers: common.SampleRNG(data.seed, "pairs", numbers, run.device)
        cond = data.cond(numbers)
        # padding is zero, and no real token's embedding is
        texts = [row[: int(row.abs().sum(-1).count_nonzero())].cpu() for row in cond["text"]]
        prompts = [data.prompts[data.row(number)] for number in numbers]
        own = {key: cond[key] for key in data.model.conditions}
        tensors = {"noise": draws().normal(data.model.latent_shape), "latents": sample(draws(), cond), **own}
        write_shard(paths[first], prompts, texts, settings=solver_settings(args), **tensors)
    dist.barrier()
    return common.Shards(folder, data.model, run.device, data.seed, keys=("latents", "noise"))


def solver_settings(args):
    """What the teacher's samples depend on beside the teacher and the prompts."""
    return (args.guidance_scale, args.shift, args.teacher_steps)


def samples_key(data, args):
    """What samples of the teacher depend on: a folder of them is good while this is the same."""
    model = data.model
    files = stamps(model.folder / part for part in model.family.parts)
    where = (model.family.__name__, files, model.latent_shape, model.negative_prompt, data.prompts)
    if model.conditions and isinstance(data, common.Shards):  # first frames; their folder's name stands for its images
        where += (data.folder.name, stamps(sorted({path for path, _ in data.rows})))
    return hashed(where, args.num_samples, args.batch_size, data.seed, solver_settings(args))

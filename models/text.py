"""Prompts into what text encoders make of them, once."""

from pathlib import Path

import torch.distributed as dist

from models.images import read_images
from training.files import hashed, stamps, write_shard


def encoded_prompts(model, prompts, cache, device, images=(), encode=None):
    """Folder of shards under `cache` that hold the prompts' embeddings and, for image-to-video, what the family reads
    of their first frames, given by their paths. Ranks share the work. Encoders are loaded only if something is missing,
    and freed after; who has loaded one encodes the negative prompt too.
    """
    parts = [*model.family.text_parts, "tokenizer", *(("vae", "image_encoder") if images else ())]
    files = stamps(model.folder / part for part in parts)
    key = hashed(prompts, files, model.text_length, (stamps(images), model.size) if images else ())
    folder, chunk, rank = Path(cache) / f"text_{key:016x}", 16 if images else 256, dist.get_rank()
    for first in range(rank * chunk, len(prompts), dist.get_world_size() * chunk):
        path, part = folder / f"{first:08d}.safetensors", prompts[first : first + chunk]
        if path.is_file():
            continue
        if not encode:
            encode = model.family.text_encoder(model.folder, device)
            read = model.image_encoder(device) if images else None
            if rank == 0:
                tell_what_is_lost(model.folder / "tokenizer", model.text_length, prompts)
                encoded_prompts(model, [model.negative_prompt], cache, device, encode=encode)
        texts = [text for i in range(0, len(part), 16) for text in encode(part[i : i + 16])]
        own = read(read_images(images[first : first + chunk], *model.size[1:])) if images else {}
        write_shard(path, part, texts, **own)
    return folder


def tell_what_is_lost(folder, length, prompts):
    """Print how many prompts a text encoder with the tokenizer in a folder, of that length, does not take whole."""
    from transformers import AutoTokenizer  # --help need not wait for it

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = zip(prompts, tokenizer(prompts, verbose=False).input_ids)
    lost = [prompt for prompt, row in rows if len(row) > length or tokenizer.unk_token_id in row]
    if lost:
        why = f"are cut at {length} tokens or have words that the text encoder does not know"
        print(f"{len(lost)} of {len(prompts)} prompts {why}, the first: {lost[0][:80]!r}")

"""Prompts into what text encoders make of them, once."""

from pathlib import Path

import torch.distributed as dist

from models.images import read_images
from training.files import hashed, stamps, write_shard


def encoded_prompts(model, prompts, cache, device, images=()):
    """Folder of shards under `cache` that hold the prompts' embeddings and, for image-to-video, what the family reads
    of their first frames, given by their paths. Ranks share the work. Encoders are loaded only if something is missing,
    and freed after.
    """
    parts = [*model.family.text_parts, "tokenizer", *(("vae", "image_encoder") if images else ())]
    files = [path for part in parts for path in sorted((model.folder / part).glob("*")) if path.is_file()]
    key = hashed(prompts, stamps(files), model.text_length, (stamps(images), model.size) if images else ())
    folder, chunk = Path(cache) / f"text_{key:016x}", 16 if images else 256
    encode, read = None, None
    if dist.get_rank() == 0 and len(list(folder.glob("*.safetensors"))) * chunk < len(prompts):
        tell_what_is_lost(model.family.tokenizer(model.folder), model.text_length, prompts)
    for first in range(dist.get_rank() * chunk, len(prompts), dist.get_world_size() * chunk):
        path, part = folder / f"{first:08d}.safetensors", prompts[first : first + chunk]
        if not path.is_file():
            encode = encode or model.family.text_encoder(model.folder, device)
            texts = [text for i in range(0, len(part), 16) for text in encode(part[i : i + 16])]
            read = read or (model.image_encoder(device) if images else None)
            own = read(read_images(images[first : first + chunk], *model.size[1:])) if images else {}
            write_shard(path, part, texts, **own)
    dist.barrier()
    return folder


def tell_what_is_lost(tokenizer, length, prompts):
    """Print how many prompts a text encoder of that many tokens does not take whole, if any."""
    tokens = tokenizer(prompts, verbose=False).input_ids
    for lost, why in (
        ([len(row) > length for row in tokens], f"are cut at the text encoder's {length} tokens"),
        ([tokenizer.unk_token_id in row for row in tokens], "have words that the tokenizer does not know"),
    ):
        if any(lost):
            print(f"{sum(lost)} of {len(prompts)} prompts {why}, the first: {prompts[lost.index(True)][:80]!r}")

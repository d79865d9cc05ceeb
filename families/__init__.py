"""One file a model family: how its network is called, and how text and video become what the network reads.

A family is an `nn.Module` that holds a diffusers transformer and offers

    network = Family(transformer)
    v = network(x_t, sigma, cond)                    # velocity [b, c, f, h, w], float32
    v, features = network(x_t, sigma, cond, read=(15, 22))   # and the outputs [b, tokens, width] of these blocks
    network.blocks                                   # the units that FSDP2 shards
    network.width                                    # of the features

with x_t latents [b, c, f, h, w], sigma [b] in [0, 1], cond a dict of tensors with the batch first, "text" among them.
And of the class itself

    transformer_class, vae_class     the diffusers classes
    lora_layers                      names of the layers that a LoRA is put on
    fps, negative_prompt             frames per second; the prompt of guidance's other half
    shapes(config, vae, frames, height, width)       latent shape (c, f, h, w) and patch size, or Fatal
    text_length(folder)              tokens that every prompt is padded to
    tokenizer(folder)                the text encoder's tokenizer, of transformers
    text_encoder(folder, device)     a function: list of prompts -> list of embeddings [tokens, d]

Latents are normalised with the VAE's latents_mean and latents_std (latents.py), which all families have.

`wan.py` is the file to copy. To add a family: write its file, name its class in classes.py beside the pipeline that its
model_index.json names and its teachers in PRESETS, and test it against the stock pipeline as tests/test_runs.py does.
No script changes.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from harness.files import Fatal, readable

PRESETS = {  # name: (Hub repository or local folder, what its transformer's config holds, its pipeline)
    "tiny": (str(Path(__file__).resolve().parents[1] / "tiny" / "teacher"),
             {"num_attention_heads": 4, "num_layers": 4, "ffn_dim": 384, "text_dim": 32}, "WanPipeline"),
    "wan2.1-1.3b": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
                    {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "text_dim": 4096}, "WanPipeline"),
    "wan2.1-14b": ("Wan-AI/Wan2.1-T2V-14B-Diffusers",
                   {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "text_dim": 4096}, "WanPipeline"),
}  # fmt: skip


def teacher_folder(teacher):
    """Local folder of a teacher in the diffusers layout, downloaded once if it is on the Hub, whose weights are whole.

    teacher: a name in families.PRESETS, or a folder.
    """
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    folder = source = PRESETS[teacher][0] if teacher in PRESETS else teacher
    if teacher in PRESETS and teacher != "tiny":
        try:  # the Hub's client locks, so that one process of a machine downloads
            folder = snapshot_download(source, allow_patterns=["model_index.json", *(f"{part}/*" for part in parts)])
        except Exception as error:  # it raises a dozen kinds for "no network", "no access", "no space"
            raise Fatal(
                f"cannot get {source} ({type(error).__name__}). Offline: run `hf download {source} "
                f"--local-dir DIR` where there is a network, copy DIR here and pass --teacher DIR"
            ) from None
    folder = Path(folder)
    if not folder.is_dir():
        raise Fatal(f"unknown teacher {teacher!r}: use {', '.join(PRESETS)}, or a folder in the diffusers layout")
    if (folder / "transformer_2").is_dir():
        raise Fatal(f"{folder} has two experts (transformer_2), as Wan2.2-A14B: no family here has two yet")
    for part in parts:
        if not (folder / part).is_dir():
            raise Fatal(f"{folder} has no {part}/ folder: not a complete copy in the diffusers layout")
        files = sorted((folder / part).glob("*.safetensors"))
        if not files and part != "tokenizer":
            raise Fatal(f"{folder / part} holds no *.safetensors: not a complete copy, download it again")
        if any(".fp16." in file.name for file in files):
            raise Fatal(
                f"{folder / part} holds an fp16 variant, which is not read: leave the full-precision files alone"
            )
        for file in files:  # each is as long as its header says
            with readable(file), safe_open(file, framework="pt"):
                pass
    return folder

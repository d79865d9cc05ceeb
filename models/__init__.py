"""One file a model family: how its network is called, and how text, images and video become what the network reads.

A family is an `nn.Module` that holds a diffusers transformer, or two, and offers

    network = Family(transformer, index=model_index)          # or (transformer, transformer_2, index) with two experts
    v, features = network(x_t, sigma, cond, blocks=(15, 22))  # velocity [b, c, f, h, w], float32, and the outputs
                                                              # [b, tokens, width] of these transformer blocks
    network.blocks, network.width                             # the units that FSDP2 shards; width of the features
    network.chunks(x_t), network.update_cache(x0, cond)       # of a causal student, see wan_causal.py; else Wan's do

with x_t latents [b, c, f, h, w], sigma [b] in [0, 1], cond a dict of tensors with the batch first, "text" among them.
And of the class itself

    transformer_class, vae_class, text_encoder_class    of diffusers and transformers
    parts                            folders of its networks: transformer, perhaps transformer_2
    text_dim                         the name in the transformer's config of the width of cond["text"]
    text_parts                       folders whose files cond["text"] depends on
    lora_layers                      names of the layers that a LoRA is put on
    fps, negative_prompt             frames per second; the prompt of guidance's other half
    text_length(folder)              tokens that every prompt is padded to
    text_embedder(folder, tokenizer, encoder)    a function: n prompts -> embeddings [n, tokens, d], zero as padding
    conditions(config, shape)        {name: shape} of what cond holds beside the text; {} unless image-to-video
    image_encoder(folder, vae, frames)    a function: first frames [b, 3, 1, h, w] -> {name: [b, …]} of these conditions

Latents are normalised with the VAE's latents_mean and latents_std (latents.py), which all families have.

To add a family: copy wan.py, name the class and the pipeline whose folders it reads in presets.py, and test it against
the stock pipeline as tests/test_models.py does. No script changes.
"""

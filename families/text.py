"""What text encoders lose of a prompt."""


def tell_what_is_lost(tokenizer, length, prompts):
    """Print how many prompts a text encoder of that many tokens does not take whole, if any."""
    tokens = tokenizer(prompts, verbose=False).input_ids
    for lost, why in (
        ([len(row) > length for row in tokens], f"are cut at the text encoder's {length} tokens"),
        ([tokenizer.unk_token_id in row for row in tokens], "have words that the tokenizer does not know"),
    ):
        if any(lost):
            print(f"{sum(lost)} of {len(prompts)} prompts {why}, the first: {prompts[lost.index(True)][:80]!r}")

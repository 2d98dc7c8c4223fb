"""Pauses in transformers alone: `model.generate(**inputs, custom_generate=folder, trust_remote_code=True, pauses=10)`.

A copy of this file lies in every exported folder, and imports nothing of nanopause.
"""

import torch
from transformers import GenerationMixin


def generate(
    *args, model, pauses=10, inputs=None, input_ids=None, attention_mask=None, generation_config=None, **options
):
    """What `generate` returns, with `pauses` pauses after the prompts [Goyal et al. 2023, Algorithm 3], which are read
    in one pass with them and are not among the ids returned; a streamer sees them. Prompts of unequal length are padded
    on the left."""
    prompts = args[0] if args else inputs if input_ids is None else input_ids
    if prompts is None:
        raise ValueError("generation with pauses needs input_ids")
    if not (isinstance(pauses, int) and pauses >= 0):
        raise ValueError(f"pauses={pauses!r} must be 0 or more")
    pause_id = model.config.pause_token_id
    if attention_mask is None:
        attention_mask = torch.ones_like(prompts)
    behind = prompts.new_full((len(prompts), pauses), pause_id)
    if generation_config is not None:
        options["generation_config"] = generation_config
    for key in ("max_length", "min_length"):  # they count the prompt
        given = options.get(key)
        if given is not None:
            options[key] = given + pauses
    made = GenerationMixin.generate(
        model, input_ids=torch.cat((prompts, behind), 1),
        attention_mask=torch.cat((attention_mask, attention_mask.new_ones(behind.shape)), 1),
        **options,
    )  # fmt: skip
    n = prompts.shape[1]

    def without(ids):
        return torch.cat((ids[:, :n], ids[:, n + pauses :]), 1)

    if torch.is_tensor(made):
        return without(made)
    made.sequences = without(made.sequences)
    return made

"""Pauses in transformers alone: `model.generate(**inputs, custom_generate=folder, trust_remote_code=True, pauses=10)`.

Every exported folder contains a copy of this file, so it does not import nanopause.
"""

import copy

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer


class WithoutPauses(BaseStreamer):
    """Passes tokens to a streamer, with the pauses removed: the first call has the prompts and is cut to n ids."""

    def __init__(self, streamer, n):
        self.streamer, self.n = streamer, n

    def put(self, ids):
        self.streamer.put(ids[..., : self.n])
        self.n = None

    def end(self):
        self.streamer.end()


def generate(
    *args, model, pauses=0, inputs=None, input_ids=None, attention_mask=None, generation_config=None, streamer=None,
    **options,
):  # fmt: skip
    """`generate` with `pauses` pauses after the prompts [Goyal et al. 2023, Algorithm 3]. The pauses are prefilled with
    the prompts in one forward pass and removed from the returned and the streamed ids. Prompts of unequal length must
    be padded on the left. A missing attention_mask is inferred as in transformers: pads are masked unless the pad is an
    end of text. Raises ValueError for inputs after which pauses cannot be inserted."""
    prompts = args[0] if args else inputs if input_ids is None else input_ids
    if prompts is None:
        raise ValueError("generation with pauses needs input_ids: pass the prompts as token ids")
    if isinstance(options.get("custom_generate"), str):
        del options["custom_generate"]  # this file is already the model's generate
    if not (isinstance(pauses, int) and pauses >= 0):
        raise ValueError(f"pauses={pauses!r} must be 0 or more")
    for key in ("inputs_embeds", "position_ids", "token_type_ids", "past_key_values", "cache"):
        if options.get(key) is not None:
            raise ValueError(f"generation with pauses takes no {key}: give whole prompts as input_ids")
    pause_id = model.config.pause_token_id
    suffix = prompts.new_full((len(prompts), pauses), pause_id)
    settings = copy.deepcopy(generation_config or model.generation_config)
    default = GenerationConfig()
    for key in ("max_length", "min_length"):  # they include the prompt, so pauses are added
        length = options.pop(key, None)
        for config in (settings, model.generation_config):
            if length is None and getattr(config, key) != getattr(default, key):
                length = getattr(config, key)
        if length is not None:
            setattr(settings, key, length + pauses)
    options = settings.update(**options)  # returns those that are inputs of the model
    if attention_mask is None:
        pad, eos = (
            getattr(model.generation_config if getattr(settings, key) is None else settings, key)
            for key in ("pad_token_id", "eos_token_id")
        )
        can_infer = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
        attention_mask = prompts.ne(pad).to(prompts.dtype) if can_infer else torch.ones_like(prompts)
    n = prompts.shape[1]
    output = GenerationMixin.generate(
        model, input_ids=torch.cat((prompts, suffix), 1),
        attention_mask=torch.cat((attention_mask, attention_mask.new_ones(suffix.shape)), 1),
        generation_config=settings, streamer=streamer and WithoutPauses(streamer, n), **options,
    )  # fmt: skip

    def without_pauses(ids):
        return torch.cat((ids[:, :n], ids[:, n + pauses :]), 1)

    if torch.is_tensor(output):
        return without_pauses(output)
    output.sequences = without_pauses(output.sequences)
    return output

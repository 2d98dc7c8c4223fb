"""Write text with a model that train.py made.

python sample.py --out_dir=out/pause --prompt="The function returns" --pauses=10
"""

import codecs
import sys
import time
from pathlib import Path

import tyro

import kernels
from nanopause import checkpoint, engine, errors
from nanopause.distributed import Processes


def main(
    out_dir: str = "out/pause",
    prompt: str = "",
    pauses: int = 0,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1337,
    show_pauses: bool = False,
    device: str = "auto",
) -> None:
    """Continue a prompt, thinking for some pauses before the first token.

    Args:
        out_dir: Folder of a training run; its newest intact checkpoint is read.
        prompt: Text to continue. Empty: a new document.
        pauses: Pauses after the prompt, read in the same pass.
        max_new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token.
        top_k: Sample among the k likeliest tokens; 0 does not restrict.
        top_p: Sample among the fewest tokens whose probabilities reach this.
        seed: Of the sampling.
        show_pauses: Print a mark for every pause.
        device: "cpu", "cuda", …; "auto" takes a GPU where there is one.
    """
    device = Processes(device).device
    model, tokenizer, _ = checkpoint.load(Path(out_dir), device)
    ids = engine.stream(
        model, tokenizer, prompt, pauses=pauses, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
    kernels.choose(None, device)  # says which, before the text
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    print(prompt + "<|pause|>" * (pauses if show_pauses else 0), end="", flush=True)
    begin, n = time.perf_counter(), 0
    for token in ids:
        n += 1
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))
    print(f"{n} tokens, {n / (time.perf_counter() - begin):.0f} tokens/s, {pauses} pauses", file=sys.stderr)


if __name__ == "__main__":
    errors.run(lambda: tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True))

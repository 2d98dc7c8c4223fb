"""HTML page of a generation: each token shaded by its log-probability, and the position of every pause."""

import codecs
import html
import math
from itertools import zip_longest

from nanopause.engine import Generation, Token
from nanopause.tokenizer import Tokenizer

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #777; --line: #ccc; --doubt: 200, 80, 20; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --faint: #999; --line: #444; --doubt: 240, 130, 50; }
}
body { font: 16px/1.9 Georgia, serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto 14rem; padding: 0 1rem; }
h1 { font-size: 1.1rem; } h1, .legend, .facts, .tip { font-family: system-ui, sans-serif; }
.legend, .facts { font-size: .8rem; color: var(--faint); } .facts { margin: 0 0 .4rem; }
.text { white-space: break-spaces; overflow-wrap: anywhere; border-top: 1px solid var(--line); padding: .6rem 0 1rem; }
.prompt, .token i { color: var(--faint); } .token i { font-style: normal; }
.token { position: relative; border-radius: 2px; background: rgba(var(--doubt), var(--d)); }
.token:hover, .token:focus { outline: 2px solid var(--ink); }
.pause { font: 600 .66rem system-ui, sans-serif; border: 1px solid var(--ink); border-radius: 3px; padding: 0 .25em;
  margin: 0 .1em; vertical-align: .1em; white-space: nowrap; }
.tip { display: none; position: absolute; z-index: 1; top: 1.7em; left: 0; font-size: .78rem; line-height: 1.4;
  color: var(--ink); background: var(--paper); border: 1px solid var(--ink); border-radius: 4px; padding: .5em .7em;
  box-shadow: 0 3px 10px #0005; white-space: pre; width: max-content; }
.token:hover .tip, .token:focus .tip { display: flex; gap: 1.4em; }
.tip table { border-collapse: collapse; } .tip th { text-align: left; font-weight: 600; padding: 0 0 .2em; }
.tip td { padding: 0 .9em 0 0; } .tip td + td { text-align: right; padding: 0; font-variant-numeric: tabular-nums; }
.tip code { font: .95em ui-monospace, monospace; } .sampled { font-weight: 700; }
.scale { display: inline-block; width: 7em; height: .8em; vertical-align: middle; border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, rgba(var(--doubt), .85)); }
"""
DARKEST = 5.0  # surprise, −log p in nats, of the darkest shade


def pieces(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Text of each token. A character that spans several tokens is shown at the last one, "·" at the others."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.decode_bytes([i])) or "·" for i in ids]


def _shown(piece: str) -> str:
    """A token's text in a table, with visible white space, escaped for HTML."""
    return html.escape(piece.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))


def _table(title: str, top: list[tuple[int, float]], sampled: int, tokenizer: Tokenizer) -> str:
    """Table of the likeliest tokens, (id, log-probability), with the sampled one in bold."""
    rows = "".join(
        f"<tr{' class=sampled' * (i == sampled)}><td><code>{_shown(tokenizer.decode([i]))}</code></td>"
        f"<td>{math.exp(logprob):.1%}</td></tr>"
        for i, logprob in top
    )
    return f"<table><tr><th colspan=2>{title}</th></tr>{rows}</table>"


def _token(token: Token, piece: str, tokenizer: Tokenizer) -> str:
    """A token's span, with the mark of its pauses before it."""
    tables = _table("after the pauses" if token.pauses else "likeliest", token.top, token.id, tokenizer)
    mark = ""
    if token.pauses:
        if token.top_without:
            tables = _table("before the pauses", token.top_without, token.id, tokenizer) + tables
        mark = f'<span class=pause title="{token.pauses} pauses">❚❚ {token.pauses}</span>'
    shade = 0.85 * min(-token.logprob / DARKEST, 1)
    text = html.escape(piece).replace("\n", "<i>↵</i>\n") if token.end != "eot" else "<i>end</i>"
    return (f'{mark}<span class=token tabindex=0 style="--d:{shade:.2f}">{text}'
            f'<span class=tip>{tables}</span></span>')  # fmt: skip


def page(title: str, prompts: list[str], generations: list[Generation], tokenizer: Tokenizer) -> str:
    """The page as self-contained HTML. generations: of Engine.generate with trace=True."""
    parts = []
    for prompt, generation in zip(prompts, generations):
        tokens = generation.tokens
        texts = pieces([token.id for token in tokens if token.end != "eot"], tokenizer)
        spans = [_token(token, text, tokenizer) for token, text in zip_longest(tokens, texts, fillvalue="")]
        mean = sum(token.logprob for token in tokens) / max(1, len(tokens))
        facts = f"{len(tokens)} tokens, {generation.pauses} pauses, surprise {-mean:.2f} nats per token"
        parts.append(f'<p class=facts>{facts}</p><div class=text><span class=prompt>{html.escape(prompt)}</span>'
                     f'{"".join(spans)}</div>')  # fmt: skip
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{html.escape(title)}</title>
<style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<p class=legend>Shade: how unlikely the token was, from certain <span class=scale></span> to {math.exp(-DARKEST):.1%} or
less. <span class=pause>❚❚ n</span>: n pauses precede the token. Hover over a token to see the likeliest ones.</p>
{"".join(parts)}
</html>
"""

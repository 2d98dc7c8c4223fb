"""HTML page of a generation: the log-probability of each token, the place of every pause, and what pauses changed."""

import codecs
import html
import math
from itertools import zip_longest

from nanopause.engine import Generation, Token
from nanopause.tokenizer import Tokenizer

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #6b6b6b; --line: #ccc;
  --doubt: 200, 80, 20; --up: #0a62c9; --down: #b3126b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --faint: #9a9a9a; --line: #444;
    --doubt: 240, 130, 50; --up: #6cb6ff; --down: #ff8ac4; }
}
body { font: 16px/2 Georgia, serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto 14rem; padding: 0 1rem; }
h1 { font-size: 1.1rem; } h1, .legend, .facts, .tip, .changes { font-family: system-ui, sans-serif; }
.legend, .facts { font-size: .8rem; line-height: 1.7; color: var(--faint); } .facts { margin: 0 0 .4rem; }
.summary { font: 600 .95rem/1.5 system-ui, sans-serif; }
.text { white-space: break-spaces; overflow-wrap: anywhere; border-top: 1px solid var(--line); padding: .6rem 0 1rem; }
.prompt, .token i { color: var(--faint); } .token i { font-style: normal; }
.token { position: relative; background: rgba(var(--doubt), var(--d)); }
.token:hover, .token:focus { outline: 2px solid var(--ink); }
.up { border-bottom: var(--c) solid var(--up); } .down { border-bottom: var(--c) solid var(--down); }
.changed { outline: 1px solid var(--ink); border-radius: 2px; }
.pause { font: 600 .66rem system-ui, sans-serif; border: 1px solid var(--ink); border-radius: 3px; padding: 0 .25em;
  margin: 0 .1em; vertical-align: .1em; white-space: nowrap; }
.thin { border: 0; margin: 0; padding: 0; position: relative; }
.thin::before { content: ""; position: absolute; left: -2.5px; top: -.15em; border: 2.5px solid transparent;
  border-top: 5px solid var(--faint); border-bottom: 0; }
.tip { display: none; position: absolute; z-index: 1; top: 1.7em; left: 0; font-size: .78rem; line-height: 1.4;
  color: var(--ink); background: var(--paper); border: 1px solid var(--ink); border-radius: 4px; padding: .5em .7em;
  box-shadow: 0 3px 10px #0005; white-space: pre; width: max-content; }
.token:hover .tip, .token:focus .tip { display: flex; gap: 1.4em; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; padding: 0 .9em .2em 0; }
td { padding: 0 .9em 0 0; } .n { text-align: right; padding: 0; font-variant-numeric: tabular-nums; }
code { font: .95em ui-monospace, monospace; } .sampled { font-weight: 700; }
.changes { font-size: .8rem; line-height: 1.5; margin: 0 0 2rem; } .changes code { white-space: pre; }
.scale { display: inline-block; width: 7em; height: .8em; vertical-align: middle; border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, rgba(var(--doubt), .85)); }
"""
DARKEST = 5.0  # surprise, −log p in nats, of the darkest shade
THICKEST = 2.0  # change of log p, in nats, of the thickest underline
N_CHANGES = 8  # most rows of a table of changes


def pieces(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Text of each token. A character that spans several tokens is shown at the last one, "·" at the others."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.decode_bytes([i])) or "·" for i in ids]


def change(token: Token) -> float | None:
    """Nats by which the pauses raised the token's log-probability; None if there are no pauses or no comparison."""
    return token.logprob - token.logprob_without if token.pauses and not math.isnan(token.logprob_without) else None


def is_changed(token: Token) -> bool:
    """Whether the pauses changed the likeliest token."""
    return bool(token.pauses and token.top_without) and token.top[0][0] != token.top_without[0][0]


def _shown(piece: str) -> str:
    """A token's text in a table, with visible white space, escaped for HTML."""
    return html.escape(piece.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))


def _cell(id: int, logprob: float, tokenizer: Tokenizer) -> str:
    """Table cells of a token and its probability."""
    return f"<td><code>{_shown(tokenizer.decode([id]))}</code></td><td class=n>{math.exp(logprob):.1%}</td>"


def _table(title: str, top: list[tuple[int, float]], sampled: int, tokenizer: Tokenizer) -> str:
    """Table of the likeliest tokens, (id, log-probability), with the sampled one in bold."""
    rows = "".join(f"<tr{' class=sampled' * (i == sampled)}>{_cell(i, logprob, tokenizer)}</tr>" for i, logprob in top)
    return f"<table><tr><th colspan=2>{title}</th></tr>{rows}</table>"


def _token(token: Token, piece: str, is_first: bool, tokenizer: Tokenizer) -> str:
    """A token's span, after the mark of its pauses: with their number before the first token, where they follow the
    prompt, else a mark without width, as there may be one at every letter."""
    tables = _table("after the pauses" if token.pauses else "likeliest", token.top, token.id, tokenizer)
    if token.pauses and token.top_without:
        tables = _table("before the pauses", token.top_without, token.id, tokenizer) + tables
    mark = ""
    if token.pauses:
        mark = f'<span class="pause thin" title="{token.pauses} pauses"></span>'
        mark = f'<span class="pause" title="{token.pauses} pauses">❚❚ {token.pauses}</span>' if is_first else mark
    classes, style = "token", f"--d:{0.85 * min(-token.logprob / DARKEST, 1):.2f}"
    if moved := change(token):
        classes += " up" if moved > 0 else " down"
        style += f";--c:{5 * min(abs(moved) / THICKEST, 1):.1f}px"
    classes += " changed" * is_changed(token)
    text = html.escape(piece).replace("\n", "<i>↵</i>\n") if token.end != "eot" else "<i>end</i>"
    return (f'{mark}<span class="{classes}" tabindex=0 style="{style}">{text}'
            f'<span class=tip>{tables}</span></span>')  # fmt: skip


def _changes(prompt: str, tokens: list[Token], texts: list[str], tokenizer: Tokenizer) -> str:
    """Table of the tokens where the pauses changed the likeliest token, largest change of log-probability first."""
    changed = [i for i, token in enumerate(tokens) if is_changed(token)]
    largest = sorted(changed, key=lambda i: -abs(change(tokens[i]) or 0))[:N_CHANGES]
    if not largest:
        return ""
    rows = "".join(
        f"<tr><td><code>{_shown((prompt + ''.join(texts[:i]))[-24:])}</code></td>"
        f"{_cell(*tokens[i].top_without[0], tokenizer)}<td></td>{_cell(*tokens[i].top[0], tokenizer)}<td></td>"
        f"<td><code>{_shown(texts[i])}</code></td><td class=n>{change(tokens[i]):+.2f}</td></tr>"
        for i in largest
    )
    title = "The largest" if len(largest) < len(changed) else "All"
    return (f"<table class=changes><tr><th>{title} {len(largest)} changes: text</th><th colspan=3>likeliest before</th>"
            f"<th colspan=3>after the pauses</th><th>sampled</th><th>nats</th></tr>{rows}</table>")  # fmt: skip


def _summary(tokens: list[Token]) -> str:
    """What the pauses changed, in one line."""
    moved = [x for x in map(change, tokens) if x is not None]
    if not moved:
        return "no pauses" if not any(token.pauses for token in tokens) else "pauses whose effect was not measured"
    n_changed = sum(map(is_changed, tokens))
    return (f"pauses at {len(moved)} places changed the likeliest token at {n_changed}, and the log-probability of the "
            f"sampled token by {sum(moved) / len(moved):+.2f} nats on average ({min(moved):+.2f} to "
            f"{max(moved):+.2f})")  # fmt: skip


def page(title: str, prompts: list[str], generations: list[Generation], tokenizer: Tokenizer) -> str:
    """The page as self-contained HTML. generations: of Engine.generate with trace=True."""
    parts = []
    for prompt, generation in zip(prompts, generations):
        tokens = generation.tokens
        texts = pieces([token.id for token in tokens if token.end != "eot"], tokenizer)
        spans = [
            _token(token, text, i == 0, tokenizer)
            for i, (token, text) in enumerate(zip_longest(tokens, texts, fillvalue=""))
        ]
        mean = sum(token.logprob for token in tokens) / max(1, len(tokens))
        facts = f"{len(tokens)} tokens, surprise {-mean:.2f} nats per token, {generation.pauses} pauses"
        facts += f"; {_summary(tokens)}" * (generation.pauses > 0 and len(generations) > 1)
        parts.append(f'<p class=facts>{facts}</p><div class=text><span class=prompt>{html.escape(prompt)}</span>'
                     f'{"".join(spans)}</div>{_changes(prompt, tokens, [*texts, "end"], tokenizer)}')  # fmt: skip
    every = [token for generation in generations for token in generation.tokens]
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{html.escape(title)}</title>
<style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<p class=summary>{_summary(every).capitalize()}.</p>
<p class=legend>Shade: how unlikely the token was, from certain <span class=scale></span> to {math.exp(-DARKEST):.1%} or
less. <span class=pause>❚❚ n</span>: n pauses after the prompt;
&nbsp;<span class="pause thin"></span>&nbsp;: pauses before a later token. They made the sampled token
<span class=up style="--c:3px">likelier</span> or <span class=down style="--c:3px">less likely</span>: the thicker, the
more, up to {THICKEST:g} nats. <span class=changed>Framed</span>: they changed the likeliest token. Hover over a token
to see the likeliest ones.</p>
{"".join(parts)}
</html>
"""

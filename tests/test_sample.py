"""sample.py: prompts in, text, JSON or a page out."""

import html.parser
import io
import json
import re
import sys
from itertools import count

import pytest
import torch
import transformers

from nanopause import checkpoint
from nanopause.config import load_config
from nanopause.engine import Engine, Generation, Token
from nanopause.errors import UserError
from nanopause.generation.runner import Runner
from nanopause.model import GPT
from nanopause.policy import BelowConfidence
from nanopause.scripts import sample
from nanopause.tokenizer import PretrainedTokenizer, load_tokenizer
from nanopause.trace import page

BYTES = load_tokenizer("bytes")


def save_run(folder, *settings):
    """A checkpoint of an untrained model that generates letters."""
    config = load_config(["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=64", "--zero_init=False",
                          *settings])  # fmt: skip
    torch.manual_seed(0)
    model = GPT(config.gpt(BYTES.vocab_size))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[ord("a") : ord("z")].normal_(std=1.5)
    checkpoint.save(folder, 1, model, [], config)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder)
    return folder


@pytest.fixture
def run(out_dir, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={out_dir}", "--max_new_tokens=6", *arguments])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        sample.main()
        return capsys.readouterr()

    return run


def test_several_prompts_are_printed_in_their_order(run):
    printed = run(
        "--prompt=First", "--prompt=Second", "--prompt=Third", "--batch_size=2", "--pauses=3", "--show_pauses"
    )
    assert re.fullmatch(
        r"--- 1 of 3\nFirst<\|pause\|>×3[a-z]{6}\n--- 2 of 3\nSecond<\|pause\|>×3[a-z]{6}\n"
        r"--- 3 of 3\nThird<\|pause\|>×3[a-z]{6}\n",
        printed.out,
    )
    assert re.search(r"18 tokens, \d+ tokens/s, 9 pauses, which added about -?[\d.]+ of \d+ ms", printed.err)


@pytest.fixture
def a_token_is_a_second(monkeypatch):
    """A clock for the operation that sample.py times."""
    now, append = [0.0], Runner.append

    def timed(runner, tokens, counts):
        now[0] += tokens.shape[1]
        return append(runner, tokens, counts)

    monkeypatch.setattr(Runner, "append", timed)
    monkeypatch.setattr(sample.time, "perf_counter", lambda: now[0])


@pytest.mark.parametrize("options, added", [
    (["--pauses=5"], 3 * 5),
    (["--pauses=5", "--pause_when=below_confidence", "--threshold=1", "--pause_budget=10"], 3 * 5 + 5),
])  # fmt: skip
def test_what_pauses_added(run, a_token_is_a_second, options, added):
    """To three prompts, and to the step in which all pause again."""
    printed = run("--prompt=First", "--prompt=Second", "--prompt=Third", "--batch_size=3", *options)
    assert f"which added about {1000 * added:.1f} of" in printed.err


def test_every_kind_of_pass_with_pauses_is_timed(out_dir, a_token_is_a_second):
    engine = Engine(checkpoint.load(out_dir, torch.device("cpu"))[0], BYTES)
    engine.n_paused_prompts, engine.n_paused_decodes = 1, 10
    assert sample.added_seconds(engine, BelowConfidence(0.5, 3), [8, 10]) == 11 * 3


def test_an_interrupted_text_has_its_time(run, monkeypatch):
    now, add = count(), sample.Printer.add

    def add_three(printer, token):
        add(printer, token)
        if len(printer.generations[0].tokens) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(sample.Printer, "add", add_three)
    assert "\n3 tokens, 3 tokens/s, 0 pauses\n" in run("--prompt=a").err


def test_prompts_of_a_file_and_of_standard_input_as_json(run, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("Eins\n\nZwei …\r\n", "utf-8")
    from_file = run(f"--prompt_file={tmp_path / 'prompts.txt'}", "--json", "--temperature=0").out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Eins\nZwei …\n"))
    assert run("--prompt_file=-", "--json", "--temperature=0").out == from_file
    rows = [json.loads(line) for line in from_file.splitlines()]
    assert [row["prompt"] for row in rows] == ["Eins", "Zwei …"]
    for row in rows:
        assert row["text"] == BYTES.decode(row["ids"]) and row["end"] == "length"
        assert row["pauses"] == [0] * 6 and len(row["logprobs"]) == 6


def test_a_conversation_at_a_terminal(run, monkeypatch):
    """Empty lines are none, a prompt that is too long does not end it, and the same one gets another text."""
    terminal = io.StringIO(f"One\n\n{'x' * 65}\nOne\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    printed = run("--prompt_file=-", "--temperature=3")
    first, second = re.fullmatch(r"One(.*)\nOne(.*)\n", printed.out).groups()
    assert first != second
    assert "error: prompt 0 and its pauses are 65 + 0 tokens" in printed.err and "12 tokens" in printed.err


def test_number_of_pauses_is_reported(run, tmp_path):
    assert "warning" not in (err := run("--prompt=a").err) and "pauses:" not in err
    assert f"warning: {sys.argv[1][10:]} was never trained with pauses" in run("--prompt=a", "--pauses=2").err
    for arguments, n, text in (
        (["--task=parity_4", "--pauses=3"], 3, "pauses: 3, as in finetuning; --pauses=0 generates without\n"),
        (["--pause_rate=0.1"], 0, "pauses: none, as training had no fixed number of them after a prompt; --pauses=10"),
    ):
        save_run(tmp_path / str(n), *arguments)
        printed = run(f"--out_dir={tmp_path / str(n)}", "--prompt=a")
        assert text in printed.err and f" {n} pauses" in printed.err and "warning" not in printed.err
        assert "pauses:" not in run(f"--out_dir={tmp_path / str(n)}", "--prompt=a", "--pauses=0").err


def test_a_text_that_fills_the_context_is_reported(run):
    printed = run("--prompt=a", f"--prompt={'x' * 61}")
    assert re.findall("text .*", printed.err) == ["text 2 ends because it fills the context of 64 tokens"]


def test_control_characters_are_escaped_at_a_terminal_only(run, monkeypatch):
    assert run("--prompt=a\x1b[2J\tb\x9b\r\x7fä").out.startswith("a\x1b[2J\tb\x9b\r\x7fä")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("--prompt=a\x1b[2J\tb\x9b\r\x7fä").out.startswith("a\\x1b[2J\tb\\x9b\\r\\x7fä")
    monkeypatch.setattr(BYTES, "decode_bytes", lambda ids: b"\x07")
    assert run("--prompt=a").out == "a" + 6 * "\\x07" + "\n"


TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}<assistant>"


def test_chat(run, tmp_path, monkeypatch):
    """A conversation keeps its history until it no longer fits; other prompts are one message each."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer = BYTES.of_transformers()
    with pytest.raises(UserError, match="the tokenizer bytes has no chat template: leave out --chat"):
        run("--prompt=a", "--chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    prompts, stream = [], Engine.stream

    def recorded(engine, inputs, *arguments, **options):
        prompts.extend(map(BYTES.decode, inputs))
        return stream(engine, inputs, *arguments, **options)

    monkeypatch.setattr(Engine, "stream", recorded)
    terminal = io.StringIO("One\nTwo\nThree\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(PretrainedTokenizer, "decode", lambda tokenizer, ids: "answer")
    printed = run(f"--out_dir={tmp_path}", "--chat")
    assert prompts[:2] == ["<user>One<assistant>", "<user>One<assistant>answer<user>Two<assistant>"]
    assert len(prompts) == 3 and "the conversation is too long, so it begins again: repeat" in printed.err
    assert "One" not in printed.out
    printed = run(f"--out_dir={tmp_path}", "--chat", "--prompt=Hello", "--prompt=You")
    assert printed.out.startswith("--- 1 of 2\nHello\n")
    assert prompts[3:] == ["<user>Hello<assistant>", "<user>You<assistant>"]


def test_no_prompts_and_no_tokens(run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    assert run(f"--prompt_file={tmp_path / 'empty.txt'}", "--json").out == ""
    assert run("--prompt=a", "--prompt=b", "--max_new_tokens=0").out == "--- 1 of 2\na\n--- 2 of 2\nb\n"
    rows = run("--prompt=a", "--prompt=b", "--max_new_tokens=0", "--json").out.splitlines()
    assert [json.loads(row)["text"] for row in rows] == ["", ""]


def test_pauses_of_prompts_of_very_different_lengths_are_timed(run):
    assert "10 pauses, which added" in run("--prompt=ab", *["--prompt=" + 64 * "x"] * 10, "--pauses=10",
                                           "--stop_when_useless").err  # fmt: skip


def test_the_most_pauses_that_have_room_are_timed(run):
    assert "1 tokens" in (said := run("--prompt=a", "--pauses=63").err) and "63 pauses, which added" in said


def test_prompt_styles(run):
    filled = run("--prompt=Why?", "--filler=. ", "--n_filler=4", "--json")
    assert json.loads(filled.out)["prompt"] == "Why?. . . . " and "filler: '. ' × 4 makes 8 tokens\n" in filled.err
    with pytest.raises(UserError, match="max_length is 64"):  # the longer prompt has no room here
        run("--prompt=Why?", "--prompt_style=stepwise", "--json")
    asked = sample.STEPWISE.format(prompt="Why?")
    assert asked.startswith("Why?\n") and asked.index("background") < asked.index("solutions") < asked.index("best")


def test_policies_from_the_command_line(run):
    row = json.loads(run("--prompt=x", "--pauses=2", "--pause_when=below_confidence", "--threshold=1", "--json").out)
    assert row["pauses"] == [2] * 6
    row = json.loads(run("--prompt=x", "--pauses=2", "--pause_when=below_confidence", "--threshold=1", "--json",
                         "--pause_budget=5").out)  # fmt: skip
    assert row["pauses"] == [2, 2, 0, 0, 0, 0]
    row = json.loads(run("--prompt=x", "--pauses=2", "--pause_when=on_request", "--json").out)
    assert row["pauses"] == [0] * 6
    assert "pausing left on after 1 times" in run("--prompt=x", "--pauses=2", "--stop_when_useless").err


@pytest.mark.parametrize("arguments, text", [
    (["--pause_when=on_request"], "add --pauses=5"),
    (["--threshold=0.3"], "threshold=0.3 is of below_confidence: add --pause_when=below_confidence"),
    (["--pauses=2", "--pause_budget=9"], "pause_budget=9 is of below_confidence and on_request: add --pause_when"),
    (["--stop_when_useless"], "add --pauses=5"),
    (["--prompt=x", "--prompt_file=y"], "leave one out"),
    (["--prompt=x", "--pauses=64"], "1 \\+ 64 tokens, and max_length is 64"),
    (["--batch_size=0"], "batch_size=0 must be 1 to"),
    (["--max_new_tokens=-1"], "max_new_tokens=-1 must be 0 to"),
    (["--n_filler=-1"], "n_filler=-1 must be 0 to"),
    (["--prompt_file=LATIN"], "LATIN is not UTF-8 text"),
])  # fmt: skip
def test_bad_input_is_one_sentence(run, arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LATIN").write_bytes("ä".encode("latin-1"))
    with pytest.raises(UserError, match=text):
        run(*arguments, "--trace=t.html")
    assert not (tmp_path / "t.html").exists()


class Reader(html.parser.HTMLParser):
    """The tokens of a page, their classes and shades, the pauses, and the rows of the tables of each token and of each
    text."""

    def __init__(self, text):
        super().__init__()
        self.tokens, self.classes, self.shades, self.pauses, self.rows, self.changes, self.open = ([] for _ in range(7))
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "p", "html"):
            self.open.append((tag, attributes.get("class")))
        kind, *others = (attributes.get("class") or "-").split()
        if kind == "token":
            self.tokens.append("")
            self.classes.append(others)
            self.shades.append(float(attributes["style"].partition(";")[0].removeprefix("--d:")))
        if kind == "pause" and ("div", "text") in self.open:
            self.pauses.append(attributes["title"])
        if tag == "tr":
            (self.rows if ("span", "tip") in self.open else self.changes).append("")

    def handle_endtag(self, tag):
        if tag not in ("p", "html"):
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        names = [name for _, name in self.open]
        if "tip" in names:
            self.rows[-1] += data + " "
        elif "changes" in names:
            self.changes[-1] += data + " "
        elif any((name or "").startswith("token") for name in names):
            self.tokens[-1] += data


def test_the_page_says_what_the_tokens_say(run, tmp_path):
    run(
        "--prompt=<b>&",
        "--pauses=2",
        "--pause_when=below_confidence",
        "--threshold=1",
        f"--trace={tmp_path / 'a.html'}",
    )
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "http" not in text and "<script" not in text and "&lt;b&gt;&amp;" in text
    read = Reader(text)
    assert len(read.tokens) == len(read.pauses) == 6 and all(re.fullmatch("[a-z]", token) for token in read.tokens)
    assert len(read.rows) == 6 * 2 * (1 + 5)

    top = [(ord("<"), -0.105), (10, -2.3)]
    tokens = [
        Token(0, ord("<"), 3, -0.105, -3.0, None, top, top[::-1]),
        Token(0, 10, 0, -2.5, -2.5, None, top, top),
        Token(0, 0xC3, 0, -0.1, -0.1, None, top, top),  # ä in two tokens
        Token(0, 0xA4, 0, -9.0, -9.0, None, top, top),
        Token(0, BYTES.eot_id, 0, 0.0, 0.0, "eot", top, top),
    ]
    read = Reader(text := page("title", ["prompt"], [Generation(tokens)], BYTES))
    assert read.tokens == ["<", "↵\n", "·", "ä", "end"]
    assert read.pauses == ["3 pauses"] and "❚❚ 3" in text
    assert read.classes == [["up", "changed"], [], [], [], []] and "--c:5.0px" in text
    assert "Pauses at 1 places changed the likeliest token at 1, and the log-probability of the sampled" in text
    assert "by +2.90 nats on average (+2.90 to +2.90)" in text
    assert read.changes == ["All 1 changes: text likeliest before after the pauses sampled nats ",
                            "prompt ↵ 10.0% < 90.0% < +2.90 "]  # fmt: skip
    assert read.shades == [0.02, 0.42, 0.02, 0.85, 0.0]
    assert read.rows[:6] == ["before the pauses ", "↵ 10.0% ", "< 90.0% ", "after the pauses ", "< 90.0% ", "↵ 10.0% "]

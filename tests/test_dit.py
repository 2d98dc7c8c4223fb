"""DIT: chosen targets, pauses before them and gradients, compared with the equations for one example at a time."""

import contextlib
import importlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_finetune import BYTES, SMALL, E, P, example, finetune, go_back, one_in_two_processes_and_in_parts, write
from test_train import rows, sentence, weights

from nanopause import finetune as finetuning
from nanopause import pauses as pauses_module
from nanopause.config import Config, load_config
from nanopause.errors import UserError
from nanopause.finetune import TargetPauses, TaskBatches, encode, pack
from nanopause.model import GPT, GPTConfig
from nanopause.pauses import IGNORE, after_words, insert_before, lowest_likelihood
from nanopause.scripts import train
from nanopause.scripts.train import summed_loss

X = IGNORE
SHAPE = GPTConfig(n_layer=2, n_embd=32, n_head=2, block_size=128, zero_init=False)
TEXTS = [("what is it?", " a pause"), ("no", " x"), ("three and four make", " seven, no less"), ("q", " 12")]
PAIRS = [encode(example(*text), BYTES, 128) for text in TEXTS]


@pytest.fixture(scope="module")
def model():
    """Random weights, with logits far from uniform."""
    torch.manual_seed(1)
    model = GPT(SHAPE).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def inside(placement="dit", m=3, **options):
    return TargetPauses(Config(task="gsm8k", placement=placement, pauses=m, **options), BYTES)


# The equations, one example at a time


def log_likelihoods(model, tokens, n_prefix):
    """ℓ_k = log p(y_k | prefix, y_<k) for every target."""
    logits = model(torch.tensor([tokens]))[0]
    return [float(logits[t - 1].detach().log_softmax(0)[tokens[t]]) for t in range(n_prefix, len(tokens))]


def with_pauses_before(tokens, n_prefix, chosen, n):
    made = list(tokens[:n_prefix])
    for k, token in enumerate(tokens[n_prefix:]):
        made += [P] * (n * (k in chosen)) + [token]
    return made


def expected(model, pair, m, n):
    """Inputs and targets of training."""
    tokens, n_prefix = pair.tokens.tolist(), pair.n_prefix
    likelihood = log_likelihoods(model, tokens, n_prefix)
    chosen = sorted(range(len(likelihood)), key=lambda k: (likelihood[k], k))[:m]
    made = with_pauses_before(tokens, n_prefix, chosen, n)
    targets = [token if token != P and t >= n_prefix else X for t, token in enumerate(made)][1:]
    return made[:-1], targets


def documents(batch):
    split = [x[0].tensor_split(batch.ends[:-1]) for x in (batch.inputs, batch.targets, *batch.layout.values())]
    return [[part.tolist() for part in document] for document in zip(*split)]


def check(model, inside, pairs=PAIRS, attention="causal", m=3, n=1, finetuning=finetuning):
    """Check tokens, targets, positions and intervals of every document of a packed batch."""
    batch = finetuning.pack(pairs, P, attention)
    got = inside.chosen_by(model, batch, 2)
    start = 0
    for pair, (inputs, targets, positions, lo, hi) in zip(pairs, documents(got), strict=True):
        if attention == "causal":
            assert (inputs, targets) == expected(model, pair, m, n)
        N = len(inputs)
        assert positions == list(range(N)) and lo == [start] * N
        seen = range(1, N + 1) if attention == "causal" else [max(t, pair.n_prefix) for t in range(1, N + 1)]
        assert hi == [start + t for t in seen]
        start += N
    assert got.n_live == batch.n_live == sum(t != X for t in got.targets[0].tolist())
    assert got.n_pauses == sum(n * min(m, live) for live in batch.lives) == got.inputs.eq(P).sum()


@pytest.mark.parametrize("m, n", [(1, 1), (3, 1), (3, 2), (50, 1), (0, 1)])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_pauses_are_before_the_least_likely_targets(model, attention, m, n):
    check(model, inside(m=m, consecutive=n), attention=attention, m=m, n=n)


def test_planted_unlikely_targets_are_chosen(model):
    """The same ones from padded and packed rows."""
    rng = np.random.default_rng(0)
    values, hard = torch.full((5, 40), -0.1), []
    for row, length in enumerate((40, 23, 3, 31, 8)):
        values[row, length:] = torch.inf
        hard.append(sorted(rng.permutation(length)[:4].tolist()))
        values[row, hard[row]] = -9.0 - torch.rand(len(hard[row]))
    chosen = lowest_likelihood(values, 4)
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == hard
    live = values < torch.inf
    document = torch.arange(5)[:, None].expand(5, 40)[live]
    assert torch.equal(lowest_likelihood(values[live][None], 4, document[None])[0], chosen[live])
    assert torch.equal(lowest_likelihood(torch.zeros(2, 6), 2), torch.tensor(2 * [[1, 1, 0, 0, 0, 0]]).bool())


FAULTS = {  # bugs of the code released with the paper, each injected into a copy of ours
    "scores unshifted logits": [("part.targets, red", "part.inputs.where(part.targets != IGNORE, IGNORE), red")],
    "takes the likeliest": [("-torch.cat(losses)", "torch.cat(losses)")],
    "row 0's logits for all rows": [
        ("        return log_likelihoods, lowest",
         "        here = batch.layout['positions'][0].clamp(max=batch.ends[0] - 1)\n"
         "        return log_likelihoods, lowest"),
        ("lowest_likelihood(log_likelihoods,", "lowest_likelihood(log_likelihoods[:, here],"),
    ],
    "a label of -100 indexes a column": [
        ("part.targets, red", "part.targets.remainder(model.config.vocab_size), red"),
        ("torch.where(batch.targets == IGNORE, torch.inf, -torch.cat(losses))", "-torch.cat(losses)[None]"),
    ],
    "later insertions drift": [("n * before", "n * (before > 0)")],
    "leftmost tokens are dropped": [("inputs[None], targets=targets[None]",
                                     "inputs[None, -len(place):], targets=targets[None, -len(place):]")],
    "the loss covers the prompt": [("max(0, n_prefix - 1)", "0")],
    "none": [],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(model, fault, monkeypatch, tmp_path):
    sources = {module: Path(module.__file__).read_text() for module in (pauses_module, finetuning)}
    for old, new in FAULTS[fault]:
        assert [source.count(old) for source in sources.values()] in ([0, 1], [1, 0]), old
        sources = {module: source.replace(old, new) for module, source in sources.items()}
    (tmp_path / "mutant_pauses.py").write_text(sources[pauses_module])
    copy = sources[finetuning].replace("from nanopause.pauses import", "from mutant_pauses import")
    (tmp_path / "mutant_finetune.py").write_text(copy)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mutant_pauses", "mutant_finetune"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    mutant = importlib.import_module("mutant_finetune")
    assert mutant.lowest_likelihood is not lowest_likelihood
    chooser = mutant.TargetPauses(Config(task="gsm8k", placement="dit", pauses=3), BYTES)
    with contextlib.nullcontext() if fault == "none" else pytest.raises(AssertionError):
        check(model, chooser, finetuning=mutant)


# Training


@pytest.mark.parametrize("pause_loss", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_gradients_equal_the_equations(model, n, pause_loss):
    """In float64, one example at a time: loss of the targets or, with pause_loss, of every next token."""
    loss, n_live = 0.0, 0
    for pair in PAIRS:
        inputs, targets = expected(model, pair, 3, n)
        if pause_loss:
            targets = [t if t != X or k < pair.n_prefix - 1 else P for k, t in enumerate(targets)]
        log_p = model(torch.tensor([inputs]))[0].log_softmax(-1)
        loss = loss - sum(log_p[k, t] for k, t in enumerate(targets) if t != X)
        n_live += sum(t != X for t in targets)
    explicit = torch.autograd.grad(loss, list(model.parameters()))
    batch = inside(consecutive=n, pause_loss=pause_loss).chosen_by(model, pack(PAIRS, P, "causal"), 2)
    assert batch.n_live == n_live
    total = sum(summed_loss(model, part, 0.0) for part in batch.split(3))
    assert total.item() == pytest.approx(loss.item(), rel=1e-12)
    for got, truth in zip(torch.autograd.grad(total, list(model.parameters())), explicit):
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss(model, gamma):
    batch = pack(PAIRS, P, "causal")
    log_p = model(batch.inputs, **batch.layout).log_softmax(-1)
    live = batch.targets != IGNORE
    p = log_p[live].gather(1, batch.targets[live][:, None]).exp()
    truth = ((1 - p) ** gamma * -p.log()).sum()
    got = summed_loss(model, batch, gamma)
    assert got.item() == pytest.approx(truth.item(), rel=1e-9)
    weights = list(model.parameters())
    for ours, expected in zip(torch.autograd.grad(got, weights), torch.autograd.grad(truth, weights)):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


def test_dit_step_has_two_forwards_and_one_backward(monkeypatch, data_dir, tmp_path, capsys):
    """Counted in train.py, per micro-batch."""
    counts = {"forward": 0, "backward": 0}
    forward, backward = GPT.forward, torch.Tensor.backward

    def counted_forward(self, *args, **options):
        counts["forward"] += self.training
        return forward(self, *args, **options)

    def counted_backward(self, *args, **options):
        counts["backward"] += 1
        return backward(self, *args, **options)

    monkeypatch.setattr(GPT, "forward", counted_forward)
    monkeypatch.setattr(torch.Tensor, "backward", counted_backward)
    monkeypatch.setattr(train, "evaluate", lambda *_: train.Scores(1.0, 1.0, 0.5))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # would affect other tests
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    for placement, forwards in (("dit", 2), ("ran", 1)):
        counts.update(forward=0, backward=0)
        args = [*TINY, *SMALL, "--task=gsm8k", f"--data_dir={data_dir}", f"--placement={placement}", "--pauses=3",
                "--max_steps=4", f"--out_dir={tmp_path / placement}"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        train.main()
        assert counts == {"forward": 4 * forwards, "backward": 4}


# Baselines


def test_random_placement(model):
    pairs = 50 * [PAIRS[1]] + 50 * [PAIRS[2]]
    made = [TaskBatches(pairs, 100, P, "causal", seed, 0, 1, inside("ran", 2))[0] for seed in (0, 0, 1)]
    assert torch.equal(made[0].inputs, made[1].inputs) and not torch.equal(made[0].inputs, made[2].inputs)
    order = TaskBatches(pairs, 100, P, "causal", 0, 0, 1, inside("ran", 2)).chosen[0]
    places = {1: Counter(), 2: Counter()}
    for i, (inputs, targets, *_) in zip(order, documents(made[0])):
        pair, which = pairs[i], 1 if i < 50 else 2
        text = [token for token in inputs if token != P]
        assert text == pair.tokens[:-1].tolist() and inputs.count(P) == 2
        assert [t for t in targets if t != X] == pair.tokens[pair.n_prefix :].tolist()
        places[which].update(targets[k] for k, token in enumerate(inputs) if token == P and targets[k] != X)
    assert set(places[1]) == {*b" x", E} and len(places[2]) > 8  # every target is chosen


def test_after_words_placement():
    assert after_words([b"the", b" cat", b"s", b" sat", b"\n", b"on"]) == [1, 3, 4, 6]
    assert after_words([]) == [] and after_words([b" "]) == [] and after_words([b"a"]) == [1]
    batch = TaskBatches(PAIRS[2:3], 1, P, "causal", 0, 0, 1, inside("aaw", 0))[0]
    made = [token for token in batch.inputs[0].tolist()][PAIRS[2].n_prefix :]
    assert made == [*b" seven,", P, *b" no", P, *b" less", P]
    assert batch.targets[0, -1] == E and batch.n_pauses == 3


def test_insert_before_by_hand():
    inputs, targets = torch.tensor([1, 2, 3, 4]), torch.tensor([X, 3, 4, 9])
    chosen = torch.tensor([False, True, False, True])
    made = insert_before(inputs, targets, chosen, 2, 7, 2)
    assert made[0].tolist() == [1, 2, 7, 7, 3, 4, 7, 7] and made[1].tolist() == [X, X, X, 3, 4, X, X, 9]
    assert made[2].tolist() == [0, 1, 4, 5] and made[3].tolist() == [0, 1, 1, 1, 2, 3, 3, 3]
    assert insert_before(inputs, targets, chosen, 1, 7, 2, fill=7)[1].tolist() == [X, 7, 3, 4, 7, 9]


@pytest.mark.parametrize("placement, n", [("dit", 9), ("ran", 9), ("aaw", 4)])
def test_prefix_is_cut_to_leave_room_for_target_pauses(placement, n):
    words = example("why " * 40, " one two three.")
    chooser = inside(placement, 9)
    pair = encode(words, BYTES, 128, target_pauses=chooser)
    batch = TaskBatches([pair], 1, P, "causal", 0, 0, 1, chooser)[0]
    if placement == "dit":
        batch = chooser.chosen_by(lambda inputs, targets, **_: torch.rand(inputs.numel()), batch, 1)
    n = 3 if placement == "aaw" else n
    assert batch.inputs.shape[1] == 127 and batch.inputs.eq(P).sum() == n and pair.n_cut == 160 + n - (128 - 16)


# train.py


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("dit"))


def test_processes_micro_batches_and_resume_give_the_same_run(train, data_dir, tmp_path):
    args = (f"--data_dir={data_dir}", "--placement=dit", "--pauses=3", "--max_steps=8", "--checkpoint_interval=4")
    out = one_in_two_processes_and_in_parts(train, tmp_path, *args)
    expected = weights(out), [row["tokens"] for row in rows(out)]
    step = go_back(out)
    assert f"from step {step}" in finetune(train, out, *args, "--resume").stdout
    assert (weights(out), [row["tokens"] for row in rows(out)]) == expected
    sentence(finetune(train, out, *args, "--placement=ran", "--resume", check=False), "was made with placement=dit")


@pytest.mark.parametrize("args, text", [
    (["--task=gsm8k", "--consecutive=2"], "pause_loss and consecutive apply to pauses in a target"),
    (["--task=gsm8k", "--pause_loss", "--placement=sft"], "placement=sft has none"),
    (["--focal=2"], "focal=2.0 is for finetuning"),
    (["--task=gsm8k", "--focal=-1"], "focal=-1.0 must be at least 0"),
])  # fmt: skip
def test_inconsistent_settings_are_refused(args, text):
    with pytest.raises(UserError, match=text):
        load_config(args)


@pytest.mark.parametrize("task, rate", [("gsm8k", 1e-5), ("aqua", 3e-5), ("mbpp", 3e-5)])
def test_configs_have_the_papers_hyperparameters(task, rate):
    args = [str(ROOT / "config/dit.py"), f"--recipe={task}_dit"]
    config = load_config([*args, "--init_from=out/pause"])
    assert (config.task, config.placement, config.learning_rate, config.batch_size) == (task, "dit", rate, 4)
    assert (config.pauses, config.consecutive, config.prefix_pauses, config.pausing) == (5, 1, 0, True)
    sft = load_config([*args, "--init_from=out/pause", "--placement=sft"])
    assert (sft.prefix_pauses, sft.pausing) == (0, False)

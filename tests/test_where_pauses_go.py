"""What the pictures show is what training does: likelihoods, places of pauses, the lowest of all."""

import json
import sys

import numpy as np
import pytest
import torch
from test_dit import PAIRS, TEXTS, inside
from test_finetune import BYTES, example, write

from experiments import where_pauses_go
from experiments.where_pauses_go import Reading, lines_of, lowest, readings, width
from nanopause import checkpoint
from nanopause.config import Config
from nanopause.errors import UserError
from nanopause.finetune import encode, pack
from nanopause.model import GPT, GPTConfig
from nanopause.tasks import get_task, load

P = BYTES.pause_id
EXAMPLES = {10 * i: example(*text) for i, text in enumerate(TEXTS)}


def model_of(seed):
    """Random, and far from uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, block_size=128, zero_init=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of(1)


def expected(model, pair):
    """Every target's log-likelihood, from all logits."""
    log_p = model(torch.from_numpy(pair.tokens)[None])[0].log_softmax(-1)
    return np.array([float(log_p[t - 1, pair.tokens[t]].detach()) for t in range(pair.n_prefix, len(pair.tokens))])


def test_likelihoods_and_places_are_those_of_training(model, monkeypatch):
    monkeypatch.setattr(where_pauses_go, "BATCH", 3)
    seen = readings(model, BYTES, EXAMPLES, 3)
    assert list(seen) == list(EXAMPLES)
    trained = inside("dit", 3).chosen_by(model, pack(PAIRS, P, "causal"), 4)
    rows = trained.inputs[0].tensor_split(trained.ends[:-1])
    for reading, pair, row in zip(seen.values(), PAIRS, rows):
        assert "".join(reading.tokens) == BYTES.decode(pair.tokens[pair.n_prefix : -1].tolist()) + "<end>"
        np.testing.assert_allclose(reading.log_likelihoods, expected(model, pair), rtol=1e-4, atol=1e-5)
        drawn = pair.tokens[: pair.n_prefix].tolist()
        for token, chosen in zip(pair.tokens[pair.n_prefix :].tolist(), reading.chosen):
            drawn += [P] * int(chosen) + [token]
        assert drawn[:-1] == row.tolist() and reading.chosen.sum() == 3
    assert list(readings(model, BYTES, {0: example("q", " " + 200 * "x"), 1: example("q", " y")}, 3)) == [1]


def test_the_lowest(model):
    seen = readings(model, BYTES, EXAMPLES, 3)
    direct = [sorted(expected(model, pair)) for pair in PAIRS]
    lengths = [len(row) for row in direct]
    rows = lowest(seen.values())
    assert rows.shape == (4, min(20, max(lengths)))
    for row, truth in zip(rows, direct):
        n = min(len(truth), rows.shape[1])
        np.testing.assert_allclose(row[:n], truth[:n], rtol=1e-4, atol=1e-5)
        assert np.isnan(row[n:]).all()
    assert lowest(seen.values(), 2).shape == (4, 2)


def test_a_text_wraps():
    tokens = [" first", " second\n", "\n", "a" * 45, "漢字", " x", "<end>"]
    chosen = np.array([False, True, False, True, True, False, True])
    lines = list(lines_of(Reading(tokens, -np.arange(7.0), chosen), 20))
    assert "".join(text for line in lines for _, text, *_ in line) == "".join(tokens).replace("\n", "↵")
    assert [[text for _, text, *_ in line] for line in lines[:2]] == [[" first", " second↵"], ["↵"]]
    assert sum(bar for line in lines for *_, bar in line) == 4 and width("漢字") == 4
    for line in lines:
        end = 0
        for x, text, _, bar in line:  # each begins where the one before it ended, and a pause has two columns
            assert x == end + 2 * bar
            end = x + width(text)
        assert end <= 20


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["where_pauses_go.py", "--device=cpu", *map(str, args)])
    where_pauses_go.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two checkpoints, and a task's files."""
    folder = write(tmp_path_factory.mktemp("where"))
    for seed, name in ((1, "before"), (2, "after")):
        model = model_of(seed)
        config = Config(n_layer=2, n_embd=32, n_head=2, block_size=128, tokenizer="bytes", zero_init=False)
        checkpoint.save(folder / name, 1, model, [], config)
    return folder


def test_figures_and_numbers(runs, monkeypatch, tmp_path, capsys):
    checkpoints = f"--checkpoints=early={runs / 'before'},{runs / 'after' / 'step_00000001'}"
    run(monkeypatch, checkpoints, f"--data_dir={runs}", "--split=train", "--examples=2", "--limit=5", "--pauses=3",
        f"--out_dir={tmp_path}")  # fmt: skip
    for name in ("example_2", "lowest"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / f"{name}.svg").exists()
    results = json.loads((tmp_path / "results.json").read_text())
    names = ["early", str(runs / "after" / "step_00000001")]
    assert list(results["lowest"]) == list(results["examples"]["2"]) == names
    assert len(results["lowest"]["early"]["mean"]) == 15 and sum(results["examples"]["2"]["early"]["chosen"]) == 3
    examples, _ = load(get_task("gsm8k"), "train", runs, 5)
    direct = [sorted(expected(model_of(1), encode(each, BYTES, 128))) for each in examples]
    means = [np.mean([row[rank] for row in direct if rank < len(row)]) for rank in range(15)]
    np.testing.assert_allclose(results["lowest"]["early"]["mean"], means, rtol=1e-4)
    said = capsys.readouterr().out
    assert "example 2: Question: " in said and "early:" in said and said.count("❚❚") == 6
    run(monkeypatch, checkpoints, "--prefix=cost:", "--target= $5 or $6", f"--out_dir={tmp_path / 'own'}")
    drawn = json.loads((tmp_path / "own" / "results.json").read_text())["examples"]["0"]["early"]
    assert "".join(drawn["tokens"]) == " $5 or $6<end>" and sum(drawn["chosen"]) == 5


@pytest.mark.parametrize(
    "change, text",
    [
        ("--checkpoints=", "no checkpoint: name some by"),
        ("--checkpoints=nowhere", "nowhere holds no checkpoint"),
        ("--examples=", "no example to draw"),
        ("--examples=99", "--examples=99 must be 0 to"),
        ("--pauses=-1", "pauses=-1 must be 0 to"),
        (f"--prefix=q|--target= {200 * 'x'}", "the target of example 0 leaves no room for a prefix in the 128 tokens"),
        ("--target= a", "in place of a task's: give both"),
        ("--prefix=q", "in place of a task's: give both"),
        ("--checkpoints=a=here,a=there", "has two of one name: give each its own"),
    ],
)
def test_what_cannot_be_is_one_sentence(runs, monkeypatch, tmp_path, change, text):
    with pytest.raises(UserError) as error:
        run(monkeypatch, f"--checkpoints={runs / 'before'}", f"--data_dir={runs}", f"--out_dir={tmp_path / 'out'}",
            *change.split("|"))  # fmt: skip
    assert text in str(error.value) and not (tmp_path / "out").exists()

"""The counting tasks, their hints, and the arms of experiments/counting.py."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import scripts
import torch

from experiments import counting, runs
from nanopause.config import load_config
from nanopause.errors import UserError
from nanopause.finetune import TaskBatches, encode, load_pairs, pack
from nanopause.pauses import IGNORE
from nanopause.tasks import get_task, load
from nanopause.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
P, SPACE = BYTES.pause_id, ord(" ")


@pytest.fixture(scope="module")
def examples():
    return {split: load(get_task("parity_10"), split)[0] for split in ("train", "validation", "test")}


def test_splits_share_no_string(examples):
    strings = {split: [example.prefix for example in some] for split, some in examples.items()}
    everything = sum(strings.values(), [])
    assert len(set(everything)) == len(everything) <= 2**10
    assert all(len(some) > 10 and {*"".join(some)} == {"0", "1"} for some in strings.values())


@pytest.mark.parametrize("kind, modulus", [("parity", 2), ("mod3", 3)])
@pytest.mark.parametrize("n", [1, 7, 24])
def test_answers(kind, modulus, n):
    examples, _ = load(get_task(f"{kind}_{n}"), "train", limit=50)
    for example in examples:
        assert len(example.prefix) == n
        assert example.target == f" {example.prefix.count('1') % modulus}"
    assert load(get_task(f"{kind}_{n}"), "train", limit=50)[0] == examples


def pair(task, prefix, pauses=0, hints=None):
    task = get_task(task)
    (example,) = task.examples({"question": prefix, "answer": "1"})
    return encode(example, BYTES, 64, pauses, hints=task.hints.get(hints))


@pytest.mark.parametrize(
    "task, prefix, pauses, hints, targets",
    [  # of bits and pauses; the position before the answer's space predicts the space
        ("parity_4", "0110", 0, None, "... "),
        ("parity_4", "0110", 4, None, "....... "),
        ("parity_4", "0110", 4, "count", "....110 "),  # [Σ ≥ 1], [Σ ≥ 2], [Σ ≥ 3]
        ("parity_4", "1111", 4, "count", "....111 "),
        ("parity_4", "0110", 2, "count", "....1 "),  # [Σ ≥ 2]
        ("parity_4", "1000", 2, "count", "....0 "),
        ("parity_4", "0110", 1, "count", ".... "),
        ("parity_4", "0110", 0, "prefix_parity", "010 "),
        ("parity_4", "0111", 0, "prefix_count", "011 "),  # at least half of the bits so far
        ("parity_4", "1000", 0, "prefix_count", "110 "),
        ("parity_4_dots", "0110....", 0, "count", "....110 "),
    ],
)
def test_hints_are_targets(task, prefix, pauses, hints, targets):
    """The targets of a packed pair; the answer and the end of text follow in each."""
    batch = pack([pair(task, prefix, pauses, hints)], P, "causal")
    expected = [IGNORE if one == "." else ord(one) for one in targets] + [ord("1"), BYTES.eot_id]
    assert batch.targets[0].tolist() == expected
    assert batch.n_live == sum(target != IGNORE for target in expected)
    assert batch.inputs[0].tolist().count(P) == pauses


def test_hints_that_do_not_fit_are_one_sentence():
    task = get_task("parity_16")
    (example,) = task.examples({"question": "01" * 8, "answer": "0"})
    with pytest.raises(UserError, match="hints do not fit .* tokens: .*--tokenizer=bytes"):
        encode(example, load_tokenizer("gpt2"), 64, 4, hints=task.hints["count"])
    with pytest.raises(UserError, match="raise --block_size"):
        encode(example, BYTES, 16, 4, hints=task.hints["count"])  # the prefix is cut
    for arguments, text in (
        (["--task=parity_16", "--hints=count"], "no target with pauses=0.*--hints="),
        (["--task=parity_16", "--hints=nothing"], "choose count, prefix_parity, prefix_count"),
        (["--task=parity_16_dots", "--hints=prefix_parity"], "choose count"),
    ):
        with pytest.raises(UserError, match=text):
            load_pairs(load_config(arguments), "train", BYTES)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--hints=count"], "needs a task"),
        (["--hints=next_token"], "with --pause_rate or --placement=between"),
        (["--task=parity_16", "--placement=dit", "--pauses=2", "--hints=count"], "use --placement=appd"),
        (["--placement=between"], "--pauses=1"),
        (["--placement=between", "--pauses=1", "--task=parity_16"], "placement=between is not a placement of a task"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(arguments, text):
    with pytest.raises(UserError, match=text):
        load_config(arguments)


# The arms


def hinted(arm):
    """Targets of an arm's training that are not the text after its prefix."""
    config = counting.run_of(counting.Settings(), 8, arm, 0).config()
    (training, _), (held_out, _) = (load_pairs(config, split, BYTES) for split in ("train", "validation"))
    found = []
    for pairs in (training, held_out):
        batch = pack(pairs[:20], P, config.attention)
        ends = np.cumsum([one.n_prefix for one in pairs[:20]]), batch.ends
        assert len(ends[0]) == len(ends[1])
        place = batch.layout["positions"][0].numpy()
        n_prefix = np.repeat([one.n_prefix for one in pairs[:20]], batch.lengths)
        found.append(int((batch.targets[0].numpy()[place < n_prefix - 1] != IGNORE).sum()))
    return found


def test_hints_do_not_leak():
    """Training has targets in the prefix and at its pauses exactly where the arm has hints; validation never does."""
    for arm in counting.parity_arms(8) + counting.variants(8):
        slots = {"": 0, "prefix_parity": 7, "prefix_count": 7, "count": (8 if "dots" in arm.task else arm.pauses) - 1}
        assert hinted(arm) == [20 * slots[arm.hints], 0], arm.name
    assert {arm.hints for arm in counting.variants(8)} == {""}


def test_batches_are_those_of_all_arms():
    """A step has the same bits in the same order in every arm of parity and of the variants."""
    batches = []
    for arm in PARITY(12) + VARIANTS(12):
        config = counting.run_of(counting.Settings(), 12, arm, 3).config()
        pairs, _ = load_pairs(replace(config, limit=300), "train", BYTES)
        batch = TaskBatches(pairs, 64, P, config.attention, config.seed, 0, 1)[2]
        starts = [0, *batch.ends[:-1]]
        batches.append([batch.inputs[0, start : start + 12].tolist() for start in starts])
    assert all(batch == batches[0] for batch in batches)


def test_arms_are_alike():
    """All arms have the settings of the first, but for what they are to differ in."""
    settings = counting.Settings(n=[12], max_steps=20)
    arms = counting.parity_arms(12) + counting.variants(12)
    configs = {arm.name: asdict(counting.run_of(settings, 12, arm, 3).config()) for arm in arms}
    first = configs["none_parity"]
    for name, config in configs.items():
        differing = {key for key in config if config[key] != first[key]}
        wanted = {"out_dir", "task", "pauses", "hints", "init_from"}
        muon = {"optimizer", "matrix_learning_rate"}
        changed = {"none_larger": {"n_embd", "n_mlp"}, "none_muon": muon, "count_12_muon": muon}
        assert differing <= wanted | changed.get(name, set()), name
    assert first["max_steps"] == 20 and first["seed"] == 3


def test_the_experiment(experiment, tmp_path, monkeypatch):
    """All of it at a small size: runs, table, JSON, figure; run again it trains nothing."""
    kept = {"none_parity", "count_8", "none_count", "no_hints"}
    monkeypatch.setattr(counting, "variants", lambda n: [arm for arm in VARIANTS(n) if "_no" not in arm.name])
    monkeypatch.setattr(counting, "parity_arms", lambda n: [arm for arm in PARITY(n) if arm.name in kept])
    text, found = experiment(counting, "--n=8", "--max_steps=5")
    assert "PausePT_PauseFT" in text and "1 seed," in text
    assert {arm["name"] for arm in found} == kept | {arm.name for arm in counting.variants(8)}
    for arm in found:
        assert (arm["steps"], arm["batch_size"], arm["seeds"]) == (5, 128, 1)
        assert arm["parameters"] == found[0]["parameters"]
        assert all(len(figures["values"]) == 1 for figures in arm["accuracy"].values())
    (last,) = (arm for arm in found if arm["name"] == "PausePT_PauseFT")
    assert sorted(map(int, last["accuracy"])) == [0, 2, 4, 6, 7, 8, 9, 10, 12, 16]
    assert (tmp_path / "counting.png").stat().st_size > 10_000
    # evaluate.py finds the same.
    folder = tmp_path / "n8/PausePT_PauseFT/seed0"
    ended = scripts.run("evaluate.py", f"--out_dir={folder}", "--tasks=mod3_8", "--batch_size=64")
    assert ended.returncode == 0, ended.stderr
    (row,) = json.loads((folder / "evaluation/results.json").read_text())["results"]
    assert row["pauses"] == 8 and row["metrics"]["accuracy"]["value"] == last["accuracy"]["8"]["values"][0]
    # A run with other settings is not taken for this one.
    with pytest.raises(UserError, match="has a run with max_steps=5, not 6: choose another --out_dir"):
        experiment(counting, "--n=8", "--max_steps=6")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.jsonl")}
    experiment(counting, "--n=8", "--max_steps=5")
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.jsonl")}


PARITY, VARIANTS = counting.parity_arms, counting.variants


def test_a_run_that_fails_is_named(tmp_path):
    good = runs.Run(
        tmp_path / "good", tuple(counting.run_of(counting.Settings(max_steps=5), 8, PARITY(8)[0], 0).arguments)
    )
    bad = runs.Run(tmp_path / "bad", ("--task=parity_8", "--hints=nothing"))
    after = runs.Run(tmp_path / "after", good.arguments, bad)
    with pytest.raises(UserError, match="2 of 3 runs are not finished.*bad.*hints=nothing is not a hint"):
        runs.train_all([bad, good, after], counting.measure)
    assert good.measured() and not bad.measured() and not after.measured()
    assert torch.get_num_threads() >= 1

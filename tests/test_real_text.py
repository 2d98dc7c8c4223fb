"""experiments/real_text.py on a tiny corpus."""

from dataclasses import asdict

import pytest

from experiments import real_text


@pytest.fixture
def tiny(tiny_corpus, monkeypatch):
    """Arguments of a run that takes a second."""
    run_of = real_text.run_of
    shape = ("--n_layer=1", "--n_embd=32", "--n_head=2", "--batch_size=4", "--eval_blocks=2")

    def small(settings, arm, seed):
        run = run_of(settings, arm, seed)
        lengths = [f"--block_size={int(a.partition('=')[2]) // 8}" for a in run.arguments if "block_size" in a]
        return run._replace(arguments=(*run.arguments, *shape, *(lengths or ["--block_size=32"])))

    monkeypatch.setattr(real_text, "run_of", small)
    return f"--dataset={tiny_corpus}", "--max_steps=3"


def test_random_places(experiment, tiny):
    text, arms = experiment(real_text, *tiny, "--widths=32", "--seeds=2", name="random")
    standard, pause, with_pauses = arms
    assert "pauses in the input" in text and "2 seeds" in text
    assert len(standard["bpb"]["values"]) == 2
    gains = [a - b for a, b in zip(pause["bpb"]["values"], standard["bpb"]["values"])]
    assert pause["difference"]["values"] == gains
    # Blocks with pauses have less text, so their bits per byte are not those of the same text.
    assert standard["difference"] is with_pauses["difference"] is None
    assert pause["bpb"]["values"] != with_pauses["bpb"]["values"]


def test_between_tokens(experiment, tiny):
    text, arms = experiment(real_text, *tiny, "--between", name="between")
    assert [arm["name"] for arm in arms] == ["between/none", "between/last", "between/all"]
    assert len({arm["bpb"]["mean"] for arm in arms}) == 3


def test_arms_are_alike():
    """Runs of a width differ in their pauses alone, and have as much text a step."""
    settings = real_text.Settings()
    for arms in (real_text.random_arms(64), real_text.between_arms()):
        configs = [real_text.run_of(settings, arm, 1).config() for arm in arms]
        assert len({(config.text_length, config.batch_size) for config in configs}) == 1
        first, *rest = map(asdict, configs)
        for config in rest:
            differing = {key for key in config if config[key] != first[key]}
            assert differing <= {"out_dir", "pause_rate", "placement", "pauses", "hints", "block_size"}

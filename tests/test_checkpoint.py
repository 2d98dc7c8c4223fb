"""Checkpoints: which one is found, which ones are kept, what a crash or a stranger leaves behind."""

import json
import math

import pytest
import torch

from nanopause import checkpoint
from nanopause.config import Config
from nanopause.errors import UserError
from nanopause.model import GPT
from nanopause.optimizer import make_optimizers

CONFIG = Config(n_layer=1, n_embd=16, n_head=2)


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = GPT(CONFIG.gpt(258))
    optimizers = make_optimizers(model, CONFIG)
    model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def save(out_dir, step, state):
    return checkpoint.save(out_dir, step, *state, CONFIG)


def names(out_dir):
    return sorted(path.name for path in out_dir.iterdir())


def damage(folder):
    (folder / "model.safetensors").write_bytes(b"")


def test_the_newest_two_are_kept(tmp_path, state):
    for step in (1, 2, 3):
        save(tmp_path, step, state)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]
    assert (tmp_path / "latest").read_text() == "step_00000003"
    assert checkpoint.find(tmp_path, warn=pytest.fail).name == "step_00000003"


def test_going_back_keeps_what_is_intact(tmp_path, state):
    save(tmp_path, 2, state)
    damage(save(tmp_path, 3, state))
    warnings = []
    assert checkpoint.find(tmp_path, warnings.append).name == "step_00000002" and len(warnings) == 1
    save(tmp_path, 1, state)  # a run that went back to before both
    assert checkpoint.find(tmp_path, warn=pytest.fail).name == "step_00000001"
    save(tmp_path, 2, state)
    damage(tmp_path / "step_00000002")
    save(tmp_path, 2, state)  # over the damaged one
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]
    assert checkpoint.find(tmp_path, warn=pytest.fail).name == "step_00000002"


def test_leftovers_and_other_folders_are_left_out(tmp_path, state):
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_00000009.tmp").mkdir()
    assert checkpoint.find(tmp_path, warn=pytest.fail) is None
    save(tmp_path, 1, state)
    assert names(tmp_path) == ["latest", "step_00000001", "step_notes"]


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"sha256": {}}', '{"sha256": []}'])
def test_a_damaged_state_is_skipped(tmp_path, state, text):
    save(tmp_path, 1, state)
    (save(tmp_path, 2, state) / "checkpoint.json").write_text(text)
    assert checkpoint.find(tmp_path, warn=lambda _: None).name == "step_00000001"


def test_restore_gives_the_bits_back_and_takes_the_configs_rates(tmp_path, state):
    folder = save(tmp_path, 5, state)
    config = Config(n_layer=1, n_embd=16, n_head=2, learning_rate=0.5)
    model = GPT(config.gpt(258))
    optimizers, said = make_optimizers(model, config), []
    assert checkpoint.restore(folder, model, optimizers, config, said.append)["step"] == 5
    assert said == ["resume: learning_rate was 0.03 and is 0.5 from here on"]
    for name, tensor in state[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    for optimizer, saved in zip(optimizers, state[1]):
        moments = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
        kept = [value for entry in saved.state_dict()["state"].values() for value in entry.values()]
        assert len(moments) == len(kept) > 0 and all(torch.equal(a, b) for a, b in zip(moments, kept))
    assert {group["peak_lr"] for group in optimizers[0].param_groups} == {0.5}
    with pytest.raises(UserError, match="is beyond max_steps=4: raise --max_steps"):
        checkpoint.restore(folder, model, optimizers, Config(n_layer=1, n_embd=16, n_head=2, max_steps=4), said.append)


def test_other_data_is_refused(tmp_path, state):
    folder = checkpoint.save(tmp_path, 5, *state, CONFIG, data_sha256="a")
    assert checkpoint.restore(folder, *state, CONFIG, print, "a")["data_sha256"] == "a"
    with pytest.raises(UserError, match="was trained on another version of the data of pydocs: put that back to"):
        checkpoint.restore(folder, *state, CONFIG, print, "b")
    checkpoint.restore(save(tmp_path, 6, state), *state, CONFIG, print, "b")  # an earlier version saved no hash


def test_of_another_version(tmp_path, state):
    """What is new since then has its default; what is not known yet is refused."""
    folder = save(tmp_path, 1, state)
    text = json.loads((folder / "checkpoint.json").read_text())
    del text["config"]["focal"], text["tokens"]
    (folder / "checkpoint.json").write_text(json.dumps(text))
    assert checkpoint.find(tmp_path, warn=pytest.fail) == folder
    read = checkpoint.read_state(folder)
    assert (read["config"]["focal"], read["tokens"], read["config"]["n_embd"]) == (0.0, 0, 16)
    text["config"]["n_legs"] = 4
    (folder / "checkpoint.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="no checkpoint in .* is intact"):
        checkpoint.find(tmp_path, warn=lambda _: None)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, state):
    before = save(tmp_path, 1, state)
    state[0].head.weight.data[3, 3] = math.inf
    with pytest.raises(UserError, match="after step 2 there are weights that are not finite"):
        save(tmp_path, 2, state)
    assert checkpoint.find(tmp_path, warn=pytest.fail) == before


@pytest.mark.parametrize("key, value", [
    ("n_head", 0), ("n_head", "2"), ("n_embd", None), ("block_size", {}), ("n_layer", 2), ("n_kv_head", "x"),
])  # fmt: skip
def test_damaged_settings_are_one_sentence(tmp_path, state, key, value):
    folder = save(tmp_path, 1, state)
    about = json.loads((folder / "checkpoint.json").read_text())
    about["model"][key] = value
    (folder / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="checkpoint.json is damaged .*: use another checkpoint of"):
        checkpoint.load(folder, torch.device("cpu"))

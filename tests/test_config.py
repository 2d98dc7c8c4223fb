"""Config files compose, later wins, --key=value last; a mistake is named."""

import dataclasses
from pathlib import Path

import pytest

from nanopause import cli
from nanopause.config import Config, load_config
from nanopause.errors import UserError
from nanopause.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def config_file(tmp_path, text, name="mine.py"):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def test_later_wins_and_command_line_is_last(tmp_path):
    one = config_file(tmp_path, "import math\nn_layer = 2\nn_embd = 64\nlearning_rate = 1", "one.py")
    two = config_file(tmp_path, "n_layer = 3\n_hidden = 'not a key'", "two.py")
    config = load_config([one, two, "--seed=7", "--compile=False", "--resume"])
    assert (config.n_layer, config.n_embd, config.seed, config.compile, config.resume) == (3, 64, 7, False, True)
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.n_mlp == 256  # derived from what was composed, not from the defaults
    assert config.out_dir == "out/one-two"
    assert load_config([two, one, "--n_layer=5"]).n_layer == 5
    heads = config_file(tmp_path, "n_head = 6", "heads.py")  # fits no width but what another file sets
    assert load_config([heads, config_file(tmp_path, "n_embd = 96", "width.py")]).n_head == 6


def test_lists_have_commas(tmp_path):
    file = config_file(tmp_path, "rope_scaling = [8, 1.0, 4.0, 8192]")
    assert load_config([file]).rope_scaling == [8.0, 1.0, 4.0, 8192.0]
    assert load_config([file, "--rope_scaling=4"]).rope_scaling == [4.0]
    assert load_config(["--rope_scaling=8,1,4,64", "--seed=7"]).rope_scaling == [8.0, 1.0, 4.0, 64.0]
    assert load_config([file, "--rope_scaling=None"]).rope_scaling is None


def test_pause_and_standard_differ_in_nothing_but_the_pauses():
    pause, standard = (dataclasses.asdict(load_config([f"config/{name}.py"])) for name in ("pause", "standard"))
    assert {key for key in pause if pause[key] != standard[key]} == {"pause_rate", "out_dir"}
    assert (pause["pause_rate"], standard["pause_rate"]) == (0.1, 0.0)


@pytest.mark.parametrize("first", ["pause", "standard"])
def test_openwebtext_composes_with_either(first):
    config = load_config([f"config/{first}.py", "config/openwebtext.py"])
    assert config.pause_rate == (0.1 if first == "pause" else 0.0)
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (12, 12, 768, 1024)
    assert (config.dataset, config.tokenizer) == ("openwebtext", "gpt2")


def test_table_5_of_goyal_et_al():
    shape = lambda name: [getattr(load_config([f"config/{name}.py"]), key)  # noqa: E731
                          for key in ("n_layer", "n_head", "n_embd", "n_mlp", "block_size", "pause_rate")]  # fmt: skip
    assert shape("pause_130m") == [12, 12, 768, 3072, 2048, 0.1]
    assert shape("pause_1b") == [24, 32, 2048, 8092, 2048, 0.1]


def test_the_model_takes_the_tokenizers_vocabulary():
    assert Config().gpt(load_tokenizer("gpt2").vocab_size).vocab_size == 50304


@pytest.mark.parametrize(
    "arg, named",
    [
        ("--n_layr=3", "n_layer"),  # the nearest key is offered
        ("--n_layer=three", "three"),
        ("--norm=batch", "batch"),
        ("--compile=perhaps", "perhaps"),
        ("--vocab_size=3", "vocab_size"),
    ],
)
def test_a_wrong_argument_is_named(arg, named, capsys):
    with pytest.raises(SystemExit) as ended:
        load_config([arg])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["config/nowhere.py"], "config file config/nowhere.py does not exist"),
        (["--batch_size=0"], "batch_size=0 must be at least 1"),
        (["--pause_rate=-0.1"], "pause_rate=-0.1 must be 0 to 1"),
        (["--n_head=3"], "n_head=3"),
        (["--n_head=0"], "n_head=0 must be at least 1"),
        (["--n_kv_head=0"], "n_kv_head=0 must be at least 1"),
        (["--seed=-1"], "seed=-1 must be at least 0"),
        (["--pause_rate=inf"], "pause_rate=inf must be 0 to 1"),
        (["--learning_rate=nan"], "learning_rate=nan must be at least 0"),
        (["--grad_clip=-1"], "grad_clip=-1.0 must be at least 0"),
        (["--wsd_share=3"], "wsd_share=3.0 must be 0 to 1"),
        (["--beta1=1"], "beta1=1.0 must be"),
        (["--rope_scaling=8,1"], "rope_scaling=8.0,1.0 must be a factor, or"),
        (["--rope_scaling=0"], "rope_scaling=0.0 must be a factor, or"),
        (["--rope_scaling=8,4,1,64"], "low below high"),
    ],
)
def test_a_wrong_value_is_one_sentence(args, sentence):
    with pytest.raises(UserError) as error:
        load_config(args)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, named", [("n_layr = 3", "n_layr"), ("n_layer = 'three'", "three")])
def test_a_wrong_file_is_named(tmp_path, text, named, capsys):
    file = config_file(tmp_path, text)
    with pytest.raises(SystemExit):
        load_config([file])
    printed = capsys.readouterr().err
    assert named in printed and file in printed


def test_a_file_that_does_not_run_is_named(tmp_path):
    with pytest.raises(UserError, match="mine.py does not run: ZeroDivisionError"):
        load_config([config_file(tmp_path, "n_layer = 1 / 0")])


@pytest.mark.parametrize("columns", [80, 120])
def test_help_explains_every_key(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    about = "About it.\n    python train.py config/pause.py\nResume, explained by a sentence that is wrapped, and"
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"], f"{about}\nends here:\n    python train.py --resume")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "\n    python train.py config/pause.py\nResume, " in shown and "\n    python train.py --resume\n" in shown
    assert max(map(len, shown.splitlines())) <= columns
    for field in dataclasses.fields(Config):
        assert (f"--{field.name} " in shown) == (field.name != "vocab_size")
    titles = [words[0] for line in shown.splitlines() if (words := line.strip("╭─╮ ").split())[-1:] == ["options"]]
    assert titles == "options run data pause finetuning model optimization logging hardware".split()
    assert shown.index("model options") < shown.index("--n_layer ") < shown.index("optimization options")
    lines = [line.strip("│ ") for line in shown.splitlines()]
    cut = [a for a, b in zip(lines, lines[1:]) if len(a) < columns / 3 and b and a[-1:].islower() and b[0].islower()]
    assert not cut, f"lines end early: {cut}"


def test_help_of_keys_in_one_group(capsys):
    """Examples of a docstring stay one per line, and help texts are joined."""
    from nanopause.scripts import sample

    with pytest.raises(SystemExit):
        cli.parse(sample.Settings, ["--help"], "python sample.py", sample.__doc__)
    shown = capsys.readouterr().out
    assert "\n    python sample.py --prompt_file=-\n" in shown


def test_the_default_folder():
    """That of files, or of the task; one is also there without a command line, as training needs it."""
    assert Config().out_dir == load_config([]).out_dir == str(Path("out", "default"))
    assert load_config(["config/counting.py"]).out_dir == str(Path("out", "parity_16"))
    assert load_config(["config/pause.py", "--out-dir=out/default"]).out_dir == "out/default"

"""train.py end to end: in its own process, on real files, with signals, kills and full disks."""

import json
import math
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import scripts
from conftest import ROOT, TINY
from safetensors.numpy import load_file

from nanopause import flops, metrics, progress
from nanopause.config import Config, load_config
from nanopause.distributed import Processes, stop_signals
from nanopause.errors import UserError
from nanopause.scripts.train import train as run_training

PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def rows(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def weights(out_dir):
    folder = out_dir / (out_dir / "latest").read_text()
    return {name: array.tobytes() for name, array in load_file(folder / "model.safetensors").items()}


def start(out_dir, tiny_corpus, *args):
    return scripts.start("train.py", *TINY, f"--dataset={tiny_corpus}", f"--out_dir={out_dir}", *args)


def sentence(ended, text):
    """Assert exit code 1 and one error line that contains the text, without a traceback."""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ended.returncode == 1 and len(errors) == 1 and text in errors[0], ended.stderr
    assert "Traceback" not in ended.stderr


def test_run_writes_metrics_figure_and_checkpoint(train, tmp_path):
    out = tmp_path / "run"
    ended = train(out, "config/pause.py", "--max_steps=30", "--log_interval=10", "--eval_interval=20",
                  launcher=PYTHON)  # fmt: skip
    assert [row["step"] for row in rows(out)] == [10, 20, 30]
    last = rows(out)[-1]
    keys = "loss val_loss val_bpb val_loss_pauses val_bpb_pauses tokens tokens_per_second learning_rate".split()
    assert all(math.isfinite(last[key]) for key in keys)
    assert last["mfu"] is None or 0 < last["mfu"] <= 1
    assert last["tokens"] == 30 * 4 * 32
    assert last["loss"] < rows(out)[0]["loss"] and last["val_bpb"] < 5.5
    assert 0.05 < last["pause_share"] < 0.15
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "a sample:" in ended.stdout and "step 10: loss" in ended.stdout and "\x1b" not in ended.stdout
    assert "kernels: torch on cpu" in ended.stderr

    sample = ["sample.py", f"--out_dir={out}", "--prompt=the model", "--max_new_tokens=5"]
    plain = scripts.run(*sample)
    assert plain.stdout.startswith("the model") and "<|pause|>" not in plain.stdout
    shown = scripts.run(*sample, "--pauses=3", "--show_pauses")
    assert shown.stdout.startswith("the model<|pause|>×3") and shown.stdout.count("<|pause|>") == 1
    long = scripts.run(*sample, "--pauses=30")
    assert long.returncode == 1 and long.stderr.count("\n") == 1 and "lower the number of pauses" in long.stderr, (
        long.stderr
    )


def test_pauses_between_the_tokens_of_a_corpus(train, tmp_path):
    """Half of the positions are pauses, hints double the targets, and FLOPs are summed over a resumed run."""
    arguments = ["--placement=between", "--pauses=1", "--max_steps=4", "--log_interval=1", "--eval_interval=2"]
    for name, hints in (("last", ""), ("all", "next_token")):
        train(tmp_path / name, *arguments, f"--hints={hints}")
    train(tmp_path / "resumed", *arguments, "--max_steps=2", "--checkpoint_interval=1")
    train(tmp_path / "resumed", *arguments, "--resume")
    last, every, resumed = (rows(tmp_path / name) for name in ("last", "all", "resumed"))
    for row in last + every:
        assert row["pause_share"] == 0.5 and row["tokens"] == row["step"] * 4 * 32
    # The head computes logits at targets only: 2 · width · vocabulary FLOPs, three times as many in training.
    for i, (a, b) in enumerate(zip(last, every), 1):
        assert b["flops"] - a["flops"] == i * 3 * 2 * 32 * 258 * 4 * 16
    assert [row["flops"] for row in resumed] == [row["flops"] for row in last]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in last]
    assert math.isfinite(last[-1]["val_bpb_pauses"]) and last[-1]["loss"] != every[-1]["loss"]


def test_run_killed_twenty_times_is_bitwise_equal(train, tiny_corpus, tmp_path):
    args = ("config/pause.py", "--max_steps=900", "--checkpoint_interval=7", "--log_interval=20")
    train(tmp_path / "whole", *args)
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(20):
        process = start(out, tiny_corpus, *args, "--resume")
        for line in process.stdout:  # wait for the first step, so that most kills happen in training and saving
            if line.startswith("device:"):
                break
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
    done = int((out / "latest").read_text().removeprefix("step_"))
    assert 0 < done < 900, f"the kills must fall inside the run, but it is at step {done}"
    train(out, *args, "--resume")
    assert weights(out) == weights(tmp_path / "whole")
    same = lambda row: {key: row[key] for key in row if key not in ("tokens_per_second", "mfu")}  # noqa: E731
    assert list(map(same, rows(out))) == list(map(same, rows(tmp_path / "whole")))


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_saves_and_says_how_to_continue(train, tiny_corpus, tmp_path, name, code):
    args = ("--max_steps=100000", "--log_interval=1")
    process = start(tmp_path / "run", tiny_corpus, *args)
    for line in process.stdout:
        if line.startswith("step 5:"):
            os.kill(process.pid, signal.Signals[name])
            break
    rest = process.stdout.read() + process.stderr.read()
    process.join(60)
    assert process.exitcode == code and "Traceback" not in rest, rest
    step = int((tmp_path / "run" / "latest").read_text().removeprefix("step_"))
    assert step >= 5 and f"stopped by {name} after step {step}: the same command with --resume continues" in rest
    assert f"from step {step}" in train(tmp_path / "run", *args, "--resume", f"--max_steps={step + 2}").stdout


def test_a_second_ctrl_c_ends_at_once(tiny_corpus, tmp_path):
    """During a step that takes long: nothing is saved."""
    process = start(tmp_path / "run", tiny_corpus, "--max_steps=100000", "--log_interval=1", "--n_embd=256",
                    "--batch_size=10000")  # fmt: skip
    for line in process.stdout:
        if line.startswith("device:"):
            break
    time.sleep(1)
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert "press it again" in process.stderr.readline() + process.stderr.readline() + process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130 and time.monotonic() - begin < 30
    assert "interrupted" in process.stderr.read() and not (tmp_path / "run" / "latest").exists()


def test_signals_are_left_alone_where_they_cannot_be_caught():
    """In a thread, as some notebooks have it; and Ctrl-C where it is ignored, as in a worker process."""
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.SIG_IGN)

    def body():
        with stop_signals() as received:
            return received, signal.getsignal(signal.SIGTERM)

    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(body).result() == ([], before[0])
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before[0]
    finally:
        signal.signal(signal.SIGINT, before[1])


def test_training_in_a_plain_session(tiny_corpus, tmp_path):
    """Without train.py, sys.argv or a folder's name, in the main thread and in another one."""
    shape = {arg[2:].partition("=")[0]: arg.partition("=")[2] for arg in TINY}
    shape = {key: int(value) if value.isdigit() else value for key, value in shape.items()}
    code = f"""
from threading import Thread
from nanopause import Config, train
config = Config(**{shape | {"dataset": str(tiny_corpus), "max_steps": 2, "pause_rate": 0.1}})
train(config)
thread = Thread(target=train, args=(Config(**vars(config) | {{"out_dir": "other"}}),))
thread.start()
thread.join()
"""
    ended = subprocess.run([sys.executable, "-c", code, "--max_steps=x"], cwd=tmp_path, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])})  # fmt: skip
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    for folder in ("out/default", "other"):
        assert (tmp_path / folder / "loss.png").exists() and (tmp_path / folder / "latest").exists()


def test_resume_of_nothing(train, tiny_corpus, tmp_path):
    """At a terminal a mistyped folder is refused; a job's command may contain --resume from its first start on."""
    args = [sys.executable, "train.py", *TINY, f"--dataset={tiny_corpus}", f"--out_dir={tmp_path / 'run'}",
            "--max_steps=1", "--resume"]  # fmt: skip
    _, terminal = pty.openpty()
    ended = subprocess.run(args, cwd=ROOT, stdin=terminal, capture_output=True, text=True)
    sentence(ended, "holds no run: check --out_dir")
    assert not (tmp_path / "run").exists()
    ended = train(tmp_path / "run", "--max_steps=1", "--resume")
    assert f"resume: there is no checkpoint in {tmp_path / 'run'}, so this run starts at step 0" in ended.stdout


def test_the_last_validation_is_bounded(train, tmp_path):
    out = tmp_path / "run"
    args = ("config/pause.py", "--max_steps=2", "--eval_interval=1", "--eval_blocks=6")
    ended = train(out, *args, "--final_eval_blocks=6")
    assert rows(out)[0]["val_loss"] != rows(out)[1]["val_loss"]
    train(tmp_path / "whole", *args)
    assert rows(out)[0] == rows(tmp_path / "whole")[0] | {
        key: rows(out)[0][key] for key in ("tokens_per_second", "mfu")
    }
    assert rows(out)[1]["val_loss"] != rows(tmp_path / "whole")[1]["val_loss"]
    assert ended.stdout.count("with pauses") == ended.stdout.count("less context per token") == 2


def losses_differ(a, b):
    """The largest difference of any loss of two runs."""
    keys = ("loss", "val_loss", "val_loss_pauses")
    return max(abs(x.get(key, 0) - y.get(key, 0)) for x, y in zip(rows(a), rows(b), strict=True) for key in keys)


SHORT = ("config/pause.py", "--max_steps=20", "--log_interval=1", "--eval_interval=10")


def test_two_processes_or_micro_batches_give_the_losses_of_one(train, tmp_path):
    """With Muon, and AdamW for what is not a matrix."""
    args = (*SHORT, "--optimizer=muon", "--learning_rate=0.01")
    train(tmp_path / "one", *args)
    train(tmp_path / "two", *args, launcher=TORCHRUN)
    train(tmp_path / "parts", *args, "--micro_batch_size=3")
    assert losses_differ(tmp_path / "one", tmp_path / "two") <= 1e-5
    assert losses_differ(tmp_path / "one", tmp_path / "parts") <= 1e-5
    assert losses_differ(tmp_path / "two", tmp_path / "parts") > 0  # separate runs, not copies


def test_existing_run_is_not_overwritten(train, tmp_path):
    train(tmp_path / "run", "--max_steps=2")
    before = weights(tmp_path / "run")
    again = train(tmp_path / "run", "--max_steps=2", "--seed=5", check=False)
    sentence(again, "already holds a run: add --resume")
    assert weights(tmp_path / "run") == before


def test_damaged_checkpoint_is_reported_and_skipped(train, tmp_path):
    out = tmp_path / "run"
    train(out, "--max_steps=20", "--checkpoint_interval=10")
    whole = weights(out)
    with open(out / "step_00000020" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    ended = train(out, "--max_steps=20", "--checkpoint_interval=10", "--resume")
    assert "step_00000020 is damaged (model.safetensors does not have its sha256)" in ended.stdout
    assert "from step 10" in ended.stdout and weights(out) == whole
    (out / "step_00000020" / "optimizer.pt").unlink()
    (out / "step_00000010" / "checkpoint.json").write_text('{"step"')
    ended = train(out, "--max_steps=20", "--resume", check=False)
    assert "optimizer.pt is missing" in ended.stdout and "checkpoint.json is cut short" in ended.stdout
    sentence(ended, "no checkpoint in")


@pytest.mark.parametrize("arg, text", [("--n_layer=1", "n_layer=2, not 1"), ("--seed=2", "seed=1337, not 2")])
def test_resume_with_another_model_or_data_order_is_refused(train, tmp_path, arg, text):
    train(tmp_path / "run", "--max_steps=1")
    sentence(train(tmp_path / "run", arg, "--resume", check=False), text)


def test_non_finite_steps_are_skipped_and_end_the_run(train, tmp_path):
    out = tmp_path / "run"
    train(out, "--max_steps=10", "--checkpoint_interval=10")
    good = weights(out)
    explode = ("--max_steps=100", "--learning_rate=3e38", "--warmup_steps=0", "--resume")
    ended = train(out, *explode, "--checkpoint_interval=50", check=False)
    assert ended.stdout.count("skipped") == 5
    sentence(ended, "not finite 5 steps in a row")
    sentence(train(out, *explode, "--checkpoint_interval=1", check=False), "they are not saved")
    assert weights(out) == good


def test_full_disk_is_one_sentence_and_keeps_checkpoints(train, tmp_path):
    """A file-size limit simulates the full disk: a write fails in the middle of a file."""
    out = tmp_path / "run"
    train(out, "--max_steps=10", "--checkpoint_interval=10")
    good = weights(out)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    ended = train(out, "--max_steps=20", "--checkpoint_interval=5", "--resume", check=False, launcher=PYTHON,
                  preexec_fn=limit)  # fmt: skip
    sentence(ended, "step_00000015")
    assert weights(out) == good and not list(out.glob("*.tmp"))
    train(out, "--max_steps=20", "--resume")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_losses_equal_eager(train, tmp_path):
    args = ("config/pause.py", "--max_steps=3", "--log_interval=1")
    train(tmp_path / "eager", *args)
    train(tmp_path / "compiled", *args, "--compile=True", launcher=PYTHON)
    for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4


def test_tensorboard_receives_the_metrics(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", "--max_steps=4", "--log_interval=2", "--tracker=tensorboard")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]


def test_a_resumed_run_continues_the_run_of_wandb(tmp_path, monkeypatch):
    ids, logged = [], []

    def init(**options):
        ids.append(options["id"])
        return SimpleNamespace(id=options["id"] or "a1b2")

    fake = SimpleNamespace(init=init, log=lambda row, step: logged.append(row), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(tracker="wandb", out_dir=str(tmp_path / "run"))
    for step in (1, 2):
        log = metrics.Metrics(config, start=step - 1)
        log.log({"step": step, "loss": math.nan})
        log.finish()
    assert ids == [None, "a1b2"] and logged == [{"step": 1}, {"step": 2}]  # without a loss that is not a number


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, monkeypatch, broken):
    def fail(*_, **__):
        raise RuntimeError("api_key not configured (no-tty)")

    fake = SimpleNamespace(init=lambda **_: None, log=lambda row, step: None, finish=lambda: None)
    setattr(fake, broken, fail)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    said = []
    log = metrics.Metrics(Config(tracker="trackio", out_dir=str(tmp_path / "run")), start=0, warn=said.append)
    log.log({"step": 1})
    log.log({"step": 2})
    log.finish()
    assert len(said) == 1 and "tracker=trackio does not work, and the run goes on without it: RuntimeError" in said[0]
    assert [row["step"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_numbers_that_are_not_finite_are_null_in_the_metrics(tmp_path):
    config, file = Config(out_dir=str(tmp_path)), tmp_path / "metrics.jsonl"
    log = metrics.Metrics(config, start=0)
    log.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    log.log({"step": 2, "loss": 1.5, "mfu": None})
    text = '{"step": 1, "loss": null, "grad_norm": null, "tokens": 5}\n{"step": 2, "loss": 1.5, "mfu": null}\n'
    assert file.read_text() == text
    assert metrics.read(file) == log.rows == [{"step": 1, "tokens": 5}, {"step": 2, "loss": 1.5}]
    assert metrics.Metrics(config, start=2).rows == log.rows and file.read_text() == text
    metrics.plot(log.rows, tmp_path / "loss.png", "a run", "less text")


def test_without_a_terminal_what_takes_long_prints_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.3)
    monkeypatch.setattr(progress, "EVERY", 0.3)
    with progress.Ticker(3, enabled=True) as ticker:
        ticker.begin("loading the data")
        time.sleep(1)
        with ticker.during("validation"):
            ticker.update("validation: 50%")
            time.sleep(1)
        monkeypatch.setattr(progress, "FIRST", 9)
        ticker.begin("drawing loss.png")
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loading the data … ") and sum("validation: 50% … " in line for line in lines) >= 2
    assert "drawing" not in "".join(lines)


def test_no_mfu_above_100_percent(tiny_corpus, tmp_path, monkeypatch, capsys):
    """The peak was measured while the machine was busy: it is not shown, and the next run measures again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flops, "_measure", lambda device, dtype: (1.0, 8))
    config = load_config([*TINY, f"--dataset={tiny_corpus}", f"--out_dir={tmp_path / 'run'}", "--max_steps=2",
                          "--log_interval=1"])  # fmt: skip
    run_training(config)
    printed = capsys.readouterr().out
    assert [row["mfu"] for row in rows(tmp_path / "run")] == [None, None]
    assert "step 1: loss" in printed and "MFU" not in printed
    assert json.loads((tmp_path / "nanopause" / "peak_flops.json").read_text()) == {}


def test_half_of_a_launch_in_the_environment_is_one_sentence(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2 is in the environment, but RANK is not: start with torchrun"):
        Processes("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")
    assert Processes("cpu").is_main


@pytest.mark.parametrize(
    "args, text",
    [
        (["--tokenizer=latin"], "tokenizer 'latin' is not known"),
        (["--dataset=nowhere"], "nowhere/bytes has no meta.json: prepare"),
        (["--device=tpu"], "device='tpu' cannot be used"),
        (["--block_size=100000"], "lower --block_size"),
        (["config/missing.py"], "config/missing.py does not exist"),
    ],
)
def test_invalid_input_is_one_sentence(train, tmp_path, args, text):
    sentence(train(tmp_path / "run", *args, check=False), text)
    assert not (tmp_path / "run").exists()

"""experiments/grid.py with submitit's own processes and small shell commands as jobs; Slurm's programs are scripts."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import submitit

from experiments import grid
from experiments.grid_job import Settings
from nanopause.errors import UserError
from nanopause.progress import Ticker


class Shell:
    """A job of one or two shell commands. The last has to make the file `done`, one before it `trained`."""

    def __init__(self, name, *commands, **settings):
        self.settings, self.name, self.shell = Settings(out_dir="out", **settings), name, commands
        self.folder = Path("out", name)
        self.log = self.folder / "log.txt"

    def __str__(self):
        return self.name

    def commands(self):
        files = [self.folder / name for name in ("trained", "done")[-len(self.shell) :]]
        commands = [["sh", "-c", f"cd {self.folder}; {command}"] for command in self.shell]
        return [] if files[-1].exists() else list(zip(commands, files))

    def score(self):
        return "accuracy 50.0 %"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs jobs in a folder from which the project cannot be imported."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)

    def run(jobs, gpus):
        with Ticker(len(jobs), enabled=True) as ticker:
            return grid.run(jobs, gpus, ticker)

    yield run
    for each, handler in before.items():
        signal.signal(each, handler)


def test_every_gpu_has_one_job_at_a_time_and_failures_are_named(run, capsys):
    begin, end = (f"echo {sign} $CUDA_VISIBLE_DEVICES >> ../events; " for sign in "+-")
    both = "touch ../both$CUDA_VISIBLE_DEVICES; while [ $(ls ../both* | wc -l) = 1 ]; do sleep 0.1; done; "
    jobs = [Shell(f"good{i}", begin + both * (i < 2) + "sleep 0.5; " + end + "touch done") for i in range(4)]
    jobs.insert(2, Shell("bad", "echo error: no luck; echo later; exit 3"))
    jobs.insert(3, Shell("killed", "kill -9 $PPID"))
    jobs.insert(4, Shell("early", "exit 0", "touch done"))  # as train.py after a SIGTERM from elsewhere
    jobs.insert(5, Shell("two", "touch trained", "test -e trained && touch done"))
    failed = run(jobs, ["4", "GPU-6"])
    busy, most, used = [], 0, set()
    for sign, gpu in map(str.split, Path("out/events").read_text().splitlines()):
        assert (gpu in busy) == (sign == "-")
        busy.append(gpu) if sign == "+" else busy.remove(gpu)
        most, used = max(most, len(busy)), used | {gpu}
    assert most == 2 and used == {"4", "GPU-6"}
    assert failed.pop("bad") == "error: no luck (out/bad/log.txt)" and failed.pop("early") == (
        "was stopped (out/early/log.txt)"
    )
    assert list(failed) == ["killed"] and failed["killed"].startswith("its process ended early (/")
    printed = capsys.readouterr().out
    assert printed.count(": done after") == 5 and "good3: done after" in printed and "accuracy 50.0 %" in printed
    assert "bad: failed after" in printed and "bad: starts on GPU" in printed
    assert Path("out/bad/log.txt").read_text().startswith("$ sh -c 'cd out/bad; echo error: no luck")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_jobs_after_they_have_saved(run, number):
    save = "trap 'sleep 2; touch saved; exit 0' TERM; touch started; while :; do sleep 0.1; done"
    jobs = [Shell("first", save), Shell("second", "touch done")]

    def interrupt():
        while not (jobs[0].folder / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(jobs, [""])
    assert (jobs[0].folder / "saved").exists() and not jobs[1].folder.exists()


def test_slurm(run, monkeypatch, tmp_path, capsys):
    programs = {
        "sbatch": 'cp "$1" sbatch.sh; SLURM_JOB_ID=$$ CUDA_VISIBLE_DEVICES=7 sh "$1" > /dev/null 2>&1 &\n'
                  'echo "Submitted batch job $$"',
        "srun": 'shift 5; exec "$@"',
        "sacct": "",
        "scancel": "echo $1 >> cancelled",
    }  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    slurm = {"slurm_partition": "long", "slurm_hours": 3}
    jobs = [Shell(f"job{i}", "echo $CUDA_VISIBLE_DEVICES > gpu; touch done", **slurm) for i in range(2)]
    assert run(jobs, grid.slots(jobs[0].settings)) == {}
    assert [(job.folder / "gpu").read_text() for job in jobs] == ["7\n", "7\n"]  # Slurm's choice stays
    script = Path("sbatch.sh").read_text()
    for line in ("partition=long", "gpus-per-node=1", "time=180", "job-name=nanopause"):
        assert f"#SBATCH --{line}\n" in script

    # An interruption cancels what is queued or running.
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 41\n")
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        run([Shell("queued", "touch done", **slurm)], [None])
    assert Path("cancelled").read_text() == "41\n"

    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition: long >&2; exit 1\n")
    with pytest.raises(UserError, match="^refused cannot be submitted: sbatch: error: invalid partition: long$"):
        run([Shell("refused", "touch done", **slurm)], [None])


def test_without_slurm_or_submitit_it_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--slurm_partition=long: there is no srun on this machine"):
        grid.executor_of(Settings(out_dir=str(tmp_path), slurm_partition="long"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"submitit is not installed: pip install -e '.\[experiments\]'"):
        grid.executor_of(Settings(out_dir=str(tmp_path)))


def test_slots(monkeypatch):
    monkeypatch.setattr(grid.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert grid.slots(Settings()) == ["4", "6", "7"] and grid.slots(Settings(device="cpu")) == [""]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert grid.slots(Settings()) == ["0", "1", "2"]
    assert set(grid.slots(Settings(slurm_partition="long"))) == {None}

"""metrics.jsonl, trackers (wandb, trackio, tensorboard), and loss.png."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from nanopause.config import Config
from nanopause.errors import UserError
from nanopause.files import replace_file


def read(file: Path) -> list[dict]:
    """The rows of a metrics.jsonl, up to the first line that is incomplete because the run was killed."""
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line) | {})
            rows[-1]["step"]
        except (ValueError, TypeError, KeyError):
            break
    return rows


def _open_tracker(config: Config) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """A tracker's functions: log a row, and finish. Raises UserError if its package is not installed."""
    name, run = config.tracker, Path(config.out_dir).name
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(config.out_dir)

            def log(row):
                for key, value in row.items():
                    writer.add_scalar(key, value, row["step"])

            return log, writer.close
        if name == "wandb":
            import wandb as tracker
        else:
            import trackio as tracker
    except ImportError:
        raise UserError(f"--tracker={name} needs a package that is not installed: pip install {name}") from None
    tracker.init(project="nanopause", name=run, config=asdict(config))
    return lambda row: tracker.log(row, step=row["step"]), tracker.finish


class Metrics:
    """Appends rows to out_dir/metrics.jsonl and logs them to the tracker. Rows of steps after `start`, which a resumed
    run repeats, are dropped."""

    def __init__(self, config: Config, start: int):
        none = (lambda row: None, lambda: None)
        self._log, self._finish = none if config.tracker == "none" else _open_tracker(config)
        self.file = Path(config.out_dir) / "metrics.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read(self.file) if row["step"] <= start]
        replace_file(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def log(self, row: dict) -> None:
        """row: at least {"step": …}."""
        self.rows.append(row)
        with open(self.file, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        self._log(row)

    def finish(self) -> None:
        self._finish()


def plot(rows: list[dict], file: Path, title: str) -> None:
    """loss.png: training loss and validation loss, with and without pauses, in nats per token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    curves = {
        "loss": ("training", {"color": "0.6", "linewidth": 1}),
        "val_loss": ("validation", {"color": "black", "marker": "o", "markersize": 4}),
        "val_loss_pauses": (
            "validation, with pauses",
            {"color": "tab:red", "marker": "s", "markersize": 4, "linestyle": "--"},
        ),
    }
    for key, (label, style) in curves.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    final = [row for row in rows if "val_bpb" in row][-1:]
    for row in final:
        title += f": {row['val_bpb']:.3f} validation bits per byte after {row['step']} steps"
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)

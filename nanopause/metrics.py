"""metrics.jsonl, trackers (wandb, trackio, tensorboard), and loss.png."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

from nanopause.config import Config
from nanopause.errors import UserError
from nanopause.files import replace_file


def read(file: Path) -> list[dict]:
    """The rows of a metrics.jsonl, up to the first line that is incomplete because the run was killed. Numbers that are
    null in the file, as they were not finite, are left out."""
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line, parse_constant=lambda _: None)
            row["step"]
        except (ValueError, TypeError, KeyError):
            break
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def _tracker_module(name: str) -> ModuleType:
    """Raises UserError if the tracker's package is not installed."""
    try:
        return import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise UserError(f"--tracker={name} needs a package that is not installed: pip install {name}") from None


def _open_tracker(module: ModuleType, config: Config) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """A tracker's functions: log a row, and finish. A resumed run continues the same run of the tracker."""
    out_dir = Path(config.out_dir)
    if config.tracker == "tensorboard":
        writer = module.SummaryWriter(config.out_dir)

        def log(row: dict) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, row["step"])

        return log, writer.close
    options = {"project": "nanopause", "name": out_dir.name, "config": asdict(config), "resume": "allow"}
    if config.tracker == "wandb":  # which knows a run by its id; trackio by its name
        file = out_dir / "wandb_id"
        run = module.init(**options, id=file.read_text() if file.exists() else None)
        replace_file(file, run.id)
    else:
        module.init(**options)
    return lambda row: module.log(row, step=row["step"]), module.finish


class Metrics:
    """Appends rows to out_dir/metrics.jsonl and logs them to the tracker. Rows of steps after `start`, which a resumed
    run repeats, are dropped. A tracker that fails is reported through `warn` and not used again."""

    def __init__(self, config: Config, start: int, warn: Callable[[str], None] = print):
        module = None if config.tracker == "none" else _tracker_module(config.tracker)
        self.file = Path(config.out_dir) / "metrics.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read(self.file)
        lines = self.file.read_text(errors="replace").splitlines() if self.rows else []
        kept = [line + "\n" for row, line in zip(self.rows, lines) if row["step"] <= start]
        self.rows = [row for row in self.rows if row["step"] <= start]
        replace_file(self.file, "".join(kept))
        self._name, self._warn, self._tracker = config.tracker, warn, None
        if module:
            self._tracker = self._attempt(_open_tracker, module, config)

    def _attempt(self, function: Callable, *arguments: object) -> object:
        """Call a tracker's function."""
        try:
            return function(*arguments)
        except Exception as error:
            self._warn(f"warning: --tracker={self._name} does not work, and the run goes on without it: "
                       f"{type(error).__name__}: {error}")  # fmt: skip
            self._tracker = None

    def log(self, row: dict) -> None:
        """row: at least {"step": …}. A number that is not finite is null in the file."""
        is_finite = {key: not isinstance(value, float) or math.isfinite(value) for key, value in row.items()}
        with open(self.file, "a") as stream:
            stream.write(json.dumps({key: value if is_finite[key] else None for key, value in row.items()}) + "\n")
        self.rows.append({key: value for key, value in row.items() if is_finite[key] and value is not None})
        if self._tracker:
            self._attempt(self._tracker[0], self.rows[-1])

    def finish(self) -> None:
        if self._tracker:
            self._attempt(self._tracker[1])


def plot(rows: list[dict], file: Path, title: str, about_pauses: str) -> None:
    """loss.png: training loss and validation loss, with and without pauses, in nats per token. about_pauses: for the
    legend."""
    from matplotlib.figure import Figure  # without pyplot, which would change the plots of a notebook

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    curves = {
        "loss": ("training", {"color": "0.6", "linewidth": 1}),
        "val_loss": ("validation", {"color": "black", "marker": "o", "markersize": 4}),
        "val_loss_pauses": (
            f"validation, with pauses\n({about_pauses})",
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

"""Progress display: one live line in a terminal, plain lines elsewhere."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

FIRST, EVERY = 3.0, 30.0  # seconds of an activity before its first line without a terminal, and between later ones


class Ticker:
    """Progress of a run of `total` steps. Prints only if `enabled`, which is set in the main process."""

    def __init__(self, total: int, enabled: bool):
        # soft_wrap: output to a pipe must not be wrapped.
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self._bar = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            TextColumn("eta"), TimeRemainingColumn(), console=self.console, disable=not (self.live and enabled),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)
        self._activity, self._begin, self._due = "", 0.0, 0.0
        self._watcher, self._ended = None, threading.Event()

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(text, markup=False)
        self._due = perf_counter() + EVERY

    def begin(self, activity: str) -> None:
        """Show what the program does from now on. Without a terminal a line is printed if it takes longer than FIRST
        seconds, and then every EVERY seconds."""
        self.update(activity)
        self._begin = perf_counter()
        self._due = self._begin + FIRST
        if self._watcher is None and not (self.live or self.console.quiet):
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def update(self, activity: str) -> None:
        """Change the text of what the program does."""
        self._activity = activity
        self._bar.update(self._task, description=activity)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Like `begin`, for the duration of a block."""
        before = self._activity
        self.begin(activity)
        yield
        self.update(before)
        self._begin = perf_counter()
        self._due = self._begin + EVERY

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            if self._activity and perf_counter() > self._due:
                self.say(f"{self._activity} … {perf_counter() - self._begin:.0f} s")

    def show(self, table: Table) -> None:
        """Print a table; without a terminal up to 200 columns wide."""
        (self.console if self.live else Console(width=200, quiet=self.console.quiet)).print(table, soft_wrap=False)

    def step(self, done: int, text: str, logged: bool) -> None:
        """Show that `done` steps are completed. Without a terminal a line is printed only if `logged`."""
        self.update(text)
        self._begin = perf_counter()
        self._bar.update(self._task, completed=done)
        if logged and not self.live:
            self.say(text)

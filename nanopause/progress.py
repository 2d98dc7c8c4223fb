"""Progress display: one live line in a terminal, plain lines elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


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

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(text, markup=False)

    def show(self, table: Table) -> None:
        """Print a table; without a terminal up to 200 columns wide."""
        (self.console if self.live else Console(width=200, quiet=self.console.quiet)).print(table, soft_wrap=False)

    def step(self, done: int, text: str, logged: bool) -> None:
        """Show that `done` steps are completed. Without a terminal a line is printed only if `logged`."""
        self._bar.update(self._task, completed=done, description=text)
        if logged and not self.live:
            self.say(text)

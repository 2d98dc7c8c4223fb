"""One short script per corpus."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
# The folder of prepared corpora: data/ of a clone, or of the working directory where nanopause is installed as a wheel.
DATA = _HERE if (_HERE.parent / "pyproject.toml").exists() else Path("data").absolute()

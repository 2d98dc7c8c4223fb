"""nanopause: pause tokens for language models, from pretraining to inference.

model = nanopause.load("out/pause")
print(model.generate("Return a", pauses=10))
nanopause.train(nanopause.Config(max_steps=100, pause_rate=0.1, out_dir="out/mine"))
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {"load": "nanopause.api", "Config": "nanopause.config", "load_config": "nanopause.config",
            "train": "nanopause.scripts.train"}  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name at its first use, as torch takes seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module 'nanopause' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

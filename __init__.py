"""The package nanopause.scripts: train.py, sample.py, evaluate.py, config/ and data/. See pyproject.toml."""

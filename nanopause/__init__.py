"""nanopause: pause tokens for language models, from pretraining to inference."""

__version__ = "0.1.0"

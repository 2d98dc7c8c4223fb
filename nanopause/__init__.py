"""nanopause: pause tokens for language models, from pretraining to inference."""

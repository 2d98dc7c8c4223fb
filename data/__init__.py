"""One short script a corpus."""

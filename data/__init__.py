"""One short script per corpus."""

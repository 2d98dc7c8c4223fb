"""Speed and memory of nanopause beside baselines: `python -m bench NAME [--quick]`.

`all` runs every bench that measures time and writes bench/results/<device>/<name>.json; `report` writes
docs/benchmarks.md and the figures. A timed bench is a module with the functions `shapes` and `measure`.
"""

"""Speed and memory of nanopause beside baselines: `python -m bench NAME [--quick]`.

`all` runs every bench that measures time; `report` writes docs/benchmarks.md and the figures. Each bench is one module
with a function `main`, whose arguments become the command's options. Results are written to
bench/results/<device>/<name>.json.
"""

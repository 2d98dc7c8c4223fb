"""How fast the parts are, beside everyone else's: `python -m bench NAME [--quick]`, or `all` for every one that times
something. `report` makes figures and tables of what they found, `compare` sets two findings side by side.

A bench is a module of this folder. Its name is its file's; what it runs is its function `main(quick: bool = False)`,
whose further arguments, if any, become options of the command. `harness.py` is what all of them share: candidates take
turns in one process (A B A B), a candidate that computes something else is listed as wrong and not timed, and what was
measured goes to bench/results/<device>/<name>.json. `--quick` measures fewer and smaller shapes, and writes
<name>.quick.json beside: it never replaces a full result. Nor does a run in which something failed, which writes
<name>.failed.json.
"""

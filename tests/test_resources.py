"""The kernels compiled for GPUs that need not be there: bench/resources.py."""

import importlib
import json
import os
import subprocess
import sys
from itertools import product

import pytest
from conftest import ROOT

from bench import resources
from bench.harness import RESULTS

FILE = RESULTS / "compiled" / "resources.json"
MODULES = {
    "kernels.attention": ("_forward", "_backward_q", "_backward_kv"),
    "kernels.decode": ("_decode", "_combine"),
    "kernels.linear_cross_entropy": ("_log_sums", "_sum_tiles", "_dlogits", "_gradients"),
}


def test_kernels_compile_and_keep_nothing_on_the_stack(record_property):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-m", "bench", "resources", "--quick"], cwd=ROOT, text=True,
                           capture_output=True, env=environment)  # fmt: skip
    record_property("compiled without a GPU", ended.stdout)
    assert ended.returncode == 0, ended.stderr
    assert "kernels compiled, 0 of them" in ended.stdout


def test_results_cover_every_configuration(monkeypatch):
    """What the launchers choose now is what `python -m bench resources` compiled."""
    chosen, rows = set(), json.loads(FILE.read_text())["rows"]
    for module, names in MODULES.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(module), name, Recorder(name, chosen))
    for arch, case in product(resources.TARGETS, resources.cases(quick=False)):
        Recorder.where = arch, *case.values()
        for module in MODULES:
            monkeypatch.setattr(importlib.import_module(module), "architecture", lambda _, arch=arch: arch)
        resources.launch(case)
    compiled = {
        (row["arch"], *row["case"].values(), row["kernel"], row["warps"], row["stages"], *sorted(row["blocks"].items()))
        for row in rows
    }
    assert chosen == compiled, "run `python -m bench resources`: the tiles have changed"
    assert not [row for row in rows if resources.fault(row)]


class Recorder:
    """In the place of a kernel: keeps the options of its launches, and runs nothing."""

    where = ()

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        def launch(*_, num_warps=4, num_stages=None, **options):
            blocks = sorted((name, value) for name, value in options.items() if name.startswith("BLOCK"))
            self.launches.add((*self.where, self.name, num_warps, num_stages, *blocks))

        return launch


@pytest.mark.parametrize("change, fault", [
    ({}, None),
    ({"stack": 8}, "8 bytes of registers on the stack"),
    ({"shared": 300_000}, "300000 bytes of shared memory, 232448 at most"),
    ({"matrix": ["HMMA"]}, "no HGMMA"),
    ({"matrix": ["HMMA"], "arch": "sm_80", "shared": 1000}, None),
])  # fmt: skip
def test_faults(change, fault):
    row = {"arch": "sm_90", "case": {"precision": "bfloat16", "D": 64}, "kernel": "_forward", "stack": 0,
           "shared": 200_000, "matrix": ["HGMMA"]}  # fmt: skip
    assert resources.fault(row | change) == fault

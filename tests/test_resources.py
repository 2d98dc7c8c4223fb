"""The kernels compiled for GPUs that need not be present: bench/resources.py."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import resources


def python(*arguments: str) -> str:
    """The output of a Python process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_kernels_compile_without_spills(record_property):
    printed = python("-m", "bench", "resources", "--quick")
    record_property("compiled without a GPU", printed)
    assert "kernels compiled, 0 with a fault" in printed


def test_committed_json_has_the_configurations_that_the_launchers_choose():
    """All four architectures, every case. After a change of tile sizes, run: python -m bench resources."""
    table = json.loads((resources.RESULTS / "compiled" / "resources.json").read_text())["rows"]
    assert not [row for row in table if resources.fault(row)]
    code = """if True:
        import itertools, json
        from bench import resources
        chosen = [resources.rows_of(*each, compiled=False)
                  for each in itertools.product(resources.TARGETS, resources.cases(quick=False))]
        print(json.dumps(sum(chosen, [])))"""
    chosen = json.loads(python("-c", code))
    assert chosen == [{key: row[key] for key in chosen[0]} for row in table]


@pytest.mark.parametrize("change, fault", [
    ({}, None),
    ({"stack": 8}, "8 bytes of registers on the stack"),
    ({"shared": 300_000}, "300000 bytes of shared memory, 232448 at most"),
    ({"matrix": ["HMMA"]}, "no HGMMA"),
    ({"matrix": ["HMMA"], "arch": "sm_80", "shared": 1000}, None),
])  # fmt: skip
def test_faults_of_a_configuration(change, fault):
    row = {"arch": "sm_90", "case": {"precision": "bfloat16", "D": 64}, "kernel": "_forward", "stack": 0,
           "shared": 200_000, "matrix": ["HGMMA"]}  # fmt: skip
    assert resources.fault(row | change) == fault

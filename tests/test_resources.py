"""The kernels compiled for GPUs that need not be there: bench/resources.py."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import resources


def test_kernels_compile_and_keep_nothing_on_the_stack(record_property):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-m", "bench", "resources", "--quick"], cwd=ROOT, text=True,
                           capture_output=True, env=environment)  # fmt: skip
    record_property("compiled without a GPU", ended.stdout)
    assert ended.returncode == 0, ended.stderr
    assert "kernels compiled, 0 of them" in ended.stdout


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

"""Registers, shared memory and spills of the Triton kernels on sm_80, sm_90, sm_100 and gfx942, without a GPU.

The launchers run on the CPU with every launch intercepted: Triton compiles the kernel for the target with the arguments
and options of the launch. Registers on the stack and shared memory above the limit are faults, and on sm_90 a matrix
kernel of a usual width without HGMMA instructions.
"""

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from pathlib import Path

import torch

from bench.harness import RESULTS, version
from nanopause.files import replace_file

# Backend, architecture, threads per warp, and bytes of shared memory per program.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
# Powers of two, and the next smaller multiples of 8, whose tiles are padded and masked.
EVEN, UNEVEN = (16, 32, 64, 128, 256), (8, 24, 56, 120, 248)
MATRIX_KERNELS = ("_forward", "_backward_q", "_backward_kv", "_log_sums", "_dlogits", "_gradients")


def cases(quick: bool) -> list[dict]:
    """Arguments of the launchers. D: head width; G: key heads, of 4; rows: queries of a decode step; C: model width."""
    # float16 compiles as bfloat16 does and float32 is padded as they are, so some widths are enough.
    widths_of = {"bfloat16": EVEN + UNEVEN, "float16": (64, 128), "float32": (*EVEN, 56, 248), "tfloat32": (*EVEN, 56)}
    widths = [("bfloat16", 64)] if quick else [(p, D) for p, widths in widths_of.items() for D in widths]
    channels = [("bfloat16", 768)] if quick else [(p, C) for p in widths_of for C in (768, 760)]
    return [
        *({"operation": "attention", "precision": p, "D": D, "G": G, "mask": mask}
          for p, D in widths for G in (4, 1) for mask in ("causal", "intervals")),
        *({"operation": "decode", "precision": p, "D": D, "rows": rows} for p, D in widths for rows in (16, 32, 64)),
        *({"operation": "loss", "precision": p, "C": C} for p, C in channels),
    ]  # fmt: skip


@contextmanager
def intercepted_launches(arch: str, compiled: bool):
    """Yields a list to which each launch appends (kernel name, options, kernel compiled for arch or None)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget(*TARGETS[arch][:3]))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    launches, run = [], JITFunction.run

    def intercept(self, *args, grid, warmup, **options):
        self.device_caches.clear()  # holds kernels of other targets
        kernel = run(self, *args, grid=grid, warmup=True, **options) if compiled else None
        launches.append((self.fn.__name__, options, kernel))

    JITFunction.run = intercept
    triton.runtime.driver.set_active(Driver())
    try:
        yield launches
    finally:
        JITFunction.run = run


def launch(case: dict) -> None:
    """Call the launchers of a case on small tensors; a compiled kernel depends on their dtype and strides only."""
    # import_module, because the package's attributes of these names are functions
    attention, loss = (import_module(f"nanopause.kernels.{name}") for name in ("attention", "linear_cross_entropy"))
    tfloat32 = case["precision"] == "tfloat32"
    dtype = torch.float32 if tfloat32 else getattr(torch, case["precision"])
    torch.set_float32_matmul_precision("high" if tfloat32 else "highest")
    if case["operation"] == "loss":
        x, weight = torch.zeros(256, case["C"], dtype=dtype), torch.zeros(128, case["C"], dtype=dtype)
        targets, live = torch.zeros(256, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        loss._linear_cross_entropy._init_fn(x, weight, targets, -100)
        loss._backward._init_fn(torch.ones(()), None, x, weight, targets, torch.zeros(256), targets, live)
        return
    T, S = (case["rows"], 1024) if case["operation"] == "decode" else (256, 256)
    q, k = (torch.zeros(2, n, h, case["D"], dtype=dtype) for n, h in ((T, 4), (S, case.get("G", 4))))
    lo = None if case.get("mask") == "causal" else torch.zeros(2, T, dtype=torch.int32)
    out, lse = attention._attention._init_fn(q, k, k, lo, lo, 1.0)
    if case["operation"] == "attention":
        attention._attention_backward._init_fn(out, q, k, k, out, lse, lo, lo, 1.0)


def usage(kernel) -> dict:
    """Bytes of shared memory and stack, registers per thread, and kinds of matrix instructions of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        patterns = r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)", r"\bv_mfma"
    else:
        text = "".join(cuobjdump(kernel.asm["cubin"], option) for option in ("-res-usage", "-sass"))
        patterns = r"REG:(\d+)", r"STACK:(\d+)", r"\b(HGMMA|HMMA|UTCHMMA)\b"
    registers, stack = (int(re.search(pattern, text)[1]) for pattern in patterns[:2])
    matrix = sorted(set(re.findall(patterns[2], text)))
    return {"shared": kernel.metadata.shared, "registers": registers, "stack": stack, "matrix": matrix}


def cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout


def rows_of(arch: str, case: dict, compiled: bool = True) -> list[dict]:
    """The configurations that the launchers choose for a case, one row per kernel; if compiled, with their usage."""
    for name in ("attention", "decode", "linear_cross_entropy"):
        import_module(f"nanopause.kernels.{name}").architecture = lambda _: arch
    with intercepted_launches(arch, compiled) as launches:
        launch(case)
    rows = []
    for name, options, kernel in launches:
        blocks = {key: value for key, value in options.items() if key.startswith("BLOCK")}
        row = {"arch": arch, "case": case, "kernel": name, "blocks": blocks, "warps": options.get("num_warps"),
               "stages": options.get("num_stages"), "max_registers": options.get("maxnreg")}  # fmt: skip
        rows.append(row | usage(kernel) if compiled else row)
    return rows


def fault(row: dict) -> str | None:
    """Why a configuration must not be offered, or None."""
    case = row["case"]
    limit = TARGETS[row["arch"]][3]
    if row["stack"]:
        return f"{row['stack']} bytes of registers on the stack"
    if row["shared"] > limit:
        return f"{row['shared']} bytes of shared memory, {limit} at most"
    usual = case.get("D") in (16, 32, 64, 128) or case.get("C") == 768
    needs_hgmma = row["arch"] == "sm_90" and row["kernel"] in MATRIX_KERNELS and usual
    if needs_hgmma and case["precision"] in ("bfloat16", "float16") and "HGMMA" not in row["matrix"]:
        return "no HGMMA"
    return None


def main(quick: bool = False) -> None:
    """Compile the kernels for GPUs that need not be present: registers, shared memory, spills.

    Args:
        quick: One width in bfloat16, two architectures, and no JSON; the full run takes half an hour on two cores.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default; set to avoid a warning
    targets = ("sm_90", "gfx942") if quick else TARGETS
    # In new processes, because Triton reads TRITON_INTERPRET at import.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pending = [pool.apply_async(rows_of, each) for each in product(targets, cases(quick))]
        rows = [row for result in pending for row in result.get()]
    faults = [f"{row['arch']} {row['kernel']} {row['case']}: {fault(row)}" for row in rows if fault(row)]
    print(f"{len(rows)} kernels compiled, {len(faults)} with a fault", *faults, sep="\n")
    if not quick:
        lines = ",\n".join(map(json.dumps, rows))  # one row per line, so that a change is a short diff
        content = f'{{"triton": "{version("triton")}", "rows": [\n{lines}\n]}}\n'
        replace_file(RESULTS / "compiled" / "resources.json", content)

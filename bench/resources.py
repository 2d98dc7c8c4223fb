"""Registers, shared memory and stack of the Triton kernels, in every configuration that their launchers choose.

No GPU is needed. The launchers run as they are, and their launches are caught: Triton compiles each kernel for a GPU
that is not there, with the arguments and options of the launch. A configuration that keeps registers on the stack is
not to be offered; on Hopper the matrix kernels are to use its asynchronous product, HGMMA, at the usual widths.
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
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.harness import RESULTS, console, version
from nanopause.files import replace_file

# Shared memory of a program, in bytes.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
# Powers of two, and the next widths below them: their tiles are padded, their loads masked, and so are they smaller.
EVEN, UNEVEN = (16, 32, 64, 128, 256), (8, 24, 56, 120, 248)
PRECISIONS = ("bfloat16", "float16", "float32", "tfloat32")


def cases(quick: bool) -> list[dict]:
    """What the launchers are called with. D: width of a head; G: heads with keys, of 4; rows: queries of a decode step;
    C: width of the model."""
    if quick:
        widths, channels = [("bfloat16", 64)], [("bfloat16", 768)]
    else:
        # float16 compiles as bfloat16 does, and float32 pads as they do: they are here for some widths only.
        some = {"float16": (64, 128), "float32": (*EVEN, 56, 248), "tfloat32": (*EVEN, 56)}
        widths = [(p, D) for p in PRECISIONS for D in some.get(p, EVEN + UNEVEN)]
        channels = [(p, C) for p in PRECISIONS for C in (768, 760)]
    return [
        *({"operation": "attention", "precision": p, "D": D, "G": G, "mask": mask}
          for p, D in widths for G in (4, 1) for mask in ("causal", "intervals")),
        *({"operation": "decode", "precision": p, "D": D, "rows": rows} for p, D in widths for rows in (16, 32, 64)),
        *({"operation": "loss", "precision": p, "C": C} for p, C in channels),
    ]  # fmt: skip


@contextmanager
def caught_launches(arch: str, compiled: bool = True):
    """Yields a list that gets (name, options, kernel compiled for arch or None) of launches, which are not started."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    backend, version, warp, _ = TARGETS[arch]

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget(backend, version, warp))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    caught, run = [], JITFunction.run

    def catch(self, *args, grid, warmup, **options):
        self.device_caches.clear()  # of another arch
        kernel = run(self, *args, grid=grid, warmup=True, **options) if compiled else None
        caught.append((self.fn.__name__, options, kernel))

    JITFunction.run = catch
    triton.runtime.driver.set_active(Driver())
    try:
        yield caught
    finally:
        JITFunction.run = run


def launch(case: dict) -> None:
    """Call the launchers of a case on small tensors; what a compiled kernel depends on is their dtype and strides."""
    # kernels.attention and kernels.linear_cross_entropy are the functions of these names.
    attention, loss = import_module("kernels.attention"), import_module("kernels.linear_cross_entropy")
    dtype = torch.float32 if case["precision"] == "tfloat32" else getattr(torch, case["precision"])
    torch.set_float32_matmul_precision("high" if case["precision"] == "tfloat32" else "highest")
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
    """What a compiled kernel takes, and the matrix instructions in it."""
    used = {"shared": kernel.metadata.shared}
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        used["registers"], used["stack"] = (
            int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return used | {"matrix": sorted(set(re.findall(r"\bv_mfma", code)))}
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text, code = (
            subprocess.run([tools / "cuobjdump", option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    used["registers"], used["stack"] = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return used | {"matrix": sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA)\b", code)))}


def rows_of(arch: str, case: dict, compiled: bool = True) -> list[dict]:
    """What the launchers choose for a case, a row a kernel, and if compiled what that takes."""
    for name in ("attention", "decode", "linear_cross_entropy"):
        import_module(f"kernels.{name}").architecture = lambda _: arch
    with caught_launches(arch, compiled) as caught:
        launch(case)
    rows = []
    for name, options, kernel in caught:
        blocks = {key: value for key, value in options.items() if key.startswith("BLOCK")}
        row = {"arch": arch, "case": case, "kernel": name, "blocks": blocks, "warps": options.get("num_warps"),
               "stages": options.get("num_stages"), "max_registers": options.get("maxnreg")}  # fmt: skip
        rows.append(row | usage(kernel) if compiled else row)
    return rows


def fault(row: dict) -> str | None:
    """What is wrong with a row, if anything."""
    case, limit = row["case"], TARGETS[row["arch"]][3]
    if row["stack"]:
        return f"{row['stack']} bytes of registers on the stack"
    if row["shared"] > limit:
        return f"{row['shared']} bytes of shared memory, {limit} at most"
    matrix = row["kernel"] in ("_forward", "_backward_q", "_backward_kv", "_log_sums", "_dlogits", "_gradients")
    usual = case["precision"] in ("bfloat16", "float16") and (
        case.get("D") in (16, 32, 64, 128) or case.get("C") == 768
    )
    if row["arch"] == "sm_90" and matrix and usual and "HGMMA" not in row["matrix"]:
        return "no HGMMA"
    return None


def main(quick: bool = False) -> None:
    """Compile the kernels for GPUs that need not be there: registers, shared memory, stack.

    Args:
        quick: One width in bfloat16, and no file; the whole takes half an hour on two cores.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does anyway, without its announcement
    # Processes of their own: the interpreter is chosen at import, and a target is a process's.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        work = list(product(TARGETS, cases(quick)))
        results = [pool.apply_async(rows_of, each) for each in work]
        results = track((result.get() for result in results), "compiling", len(work), console=Console(stderr=True))
        rows = [row for result in results for row in result]
    screen, table = console(), Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("arch", "kernel", "case", "blocks"):
        table.add_column(column)
    numbers = ("warps", "stages", "registers", "shared", "stack")
    for column in numbers:
        table.add_column(column, justify="right")
    table.add_column("matrix")
    for row in rows:
        case = " ".join(map(str, list(row["case"].values())[1:]))
        blocks = "×".join(map(str, row["blocks"].values()))
        table.add_row(
            row["arch"],
            row["kernel"],
            case,
            blocks,
            *("" if row[n] is None else str(row[n]) for n in numbers),
            " ".join(row["matrix"]),
        )
    screen.print(table)
    faults = [f"{row['arch']} {row['kernel']} {row['case']}: {fault(row)}" for row in rows if fault(row)]
    screen.print(f"{len(rows)} kernels compiled, {len(faults)} of them not to be offered", *faults, sep="\n")
    if not quick:
        file = RESULTS / "compiled" / "resources.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(map(json.dumps, rows))
        replace_file(file, f'{{"triton": "{version("triton")}", "rows": [\n{lines}\n]}}\n')
        screen.print(f"written: {file}")

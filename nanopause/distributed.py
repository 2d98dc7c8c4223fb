"""The processes of a torchrun launch, or the single process without torchrun."""

import os

import torch
import torch.distributed as dist

from nanopause.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of a --device setting: "auto" is a GPU where there is one; "cuda" is this process's GPU.

    Raises UserError if the device cannot be used."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither a CPU nor a CUDA or ROCm GPU")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used ({str(error).splitlines()[0]}): use --device=cpu or "
                        f"another GPU") from None  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Processes:
    """rank: index of this process, 0 … count − 1. device: the device of this process.

    `sum` and `wait` use gloo on the CPU, so that no GPU stream waits for them; DDP reduces gradients with the backend
    of the device. Raises UserError if the device cannot be used.
    """

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = choose_device(device)
        if self.count > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Sums over all processes, in float64."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Barrier: return when all processes have called it."""
        self.sum(0)

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

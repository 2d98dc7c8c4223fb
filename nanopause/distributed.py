"""The processes that torchrun started, or the one that python did."""

import os

import torch
import torch.distributed as dist

from nanopause.errors import UserError


class Processes:
    """rank: this process's number of `count`. device: its own.

    Small numbers are agreed on through the CPU (gloo), so that no GPU stream waits; gradients go the device's way.
    """

    def __init__(self, device: str):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            if self.device.type not in ("cpu", "cuda"):
                raise RuntimeError("it is neither a CPU nor a GPU of CUDA or ROCm")
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
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
        """Until all processes are here."""
        self.sum(0)

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

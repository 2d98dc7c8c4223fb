"""The processes of a torchrun launch, or the single process without torchrun; and the signals that stop a run."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
    of the device. Raises UserError if the device cannot be used, or the environment describes only a part of a launch.
    """

    def __init__(self, device: str):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
                if name not in os.environ:
                    raise UserError(f"WORLD_SIZE={self.count} is in the environment, but {name} is not: start with "
                                    f"torchrun, or remove it with `unset WORLD_SIZE`")  # fmt: skip
        self.rank = int(os.environ["RANK"]) if self.count > 1 else 0
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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list of the SIGTERM and SIGINT (Ctrl-C) signals received inside the block, for a run that saves before it
    stops. The second SIGINT raises KeyboardInterrupt, as without this block. Only the main thread can receive signals,
    and ones that are ignored stay ignored."""
    received, handlers = [], {}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, handlers[number])
            # os.write: print is not safe in a signal handler.
            os.write(2, b"\nCtrl-C: stopping after this step; press it again to stop at once\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                handlers[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

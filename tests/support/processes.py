"""Processes that start in a fraction of a second, one or several together as torchrun would start them.

They are forked from a server that has imported PyTorch and has never computed anything, so that each is as fresh as one
that a shell starts.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

START_METHOD = multiprocessing.get_start_method()  # how the processes start their data workers, as from a shell
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # run_net.py's, too late once PyTorch has been imported
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.elastic.multiprocessing.errors", "torchvision", "timm", "fvcore"]
)
TIMEOUT = 300  # seconds after which a process counts as hanging
_STARTED: list[BaseProcess] = []


def kill_all() -> None:
    """End the processes that a failed test has left behind."""
    for process in _STARTED:
        if process.is_alive():
            process.kill()
        process.join()
    _STARTED.clear()


class Run:
    """`function(*args)` in `num_processes` processes of one world; what they write goes to files in `folder`."""

    def __init__(
        self, folder: Path, function: Callable[..., int | None], *args: object, num_processes: int = 1
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"console_{rank}.txt" for rank in range(num_processes)]
        environment = {"OMP_NUM_THREADS": "1"}
        if num_processes > 1:
            environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.processes: list[BaseProcess] = []
        for rank, file in enumerate(self.files):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
            file.write_text("")
            process = CONTEXT.Process(target=_child, args=(file, environment | ranks, START_METHOD, function, args))
            process.start()
            self.processes.append(process)
        _STARTED.extend(self.processes)

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self.processes[0].pid

    def wait(self) -> list[int]:
        """The processes' exit statuses (-9: killed by SIGKILL). None may hang."""
        for process in self.processes:
            process.join(TIMEOUT)
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, self.console()
        return [process.exitcode for process in self.processes]

    def console(self, rank: int | None = None) -> str:
        """What one process, or all of them, wrote to stdout and stderr."""
        return "".join(file.read_text() for file in (self.files if rank is None else [self.files[rank]]))

    def wait_for(self, text: str, *, rank: int = 0) -> None:
        """Return once a process has written `text`."""
        end = time.monotonic() + TIMEOUT
        while text not in self.console(rank):
            assert time.monotonic() < end, self.console()
            assert self.processes[rank].is_alive(), self.console()
            time.sleep(0.01)


def run_net(folder: Path, argv: list, *, num_processes: int = 1, setup: Callable[[], None] | None = None) -> Run:
    """tools/run_net.py, started. `setup` is called in every process first, to inject a fault."""
    return Run(folder, _run_net, [str(word) for word in argv], setup, num_processes=num_processes)


def run_net_well(folder: Path, argv: list, *, num_processes: int = 1) -> Run:
    """tools/run_net.py, finished without an error."""
    run = run_net(folder, argv, num_processes=num_processes)
    assert run.wait() == [0] * num_processes, run.console()
    return run


def _run_net(argv: list[str], setup: Callable[[], None] | None) -> int:
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import run_net as command

    if setup is not None:
        setup()
    return command.main(argv)


def _child(console: Path, environment: dict, start_method: str, function: Callable, args: tuple) -> None:
    os.environ.update(environment)
    file = os.open(console, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method(start_method, force=True)
    import torch

    torch.set_num_threads(1)
    status = function(*args)
    sys.stdout.flush()
    sys.exit(status or 0)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]

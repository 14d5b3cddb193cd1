"""What a network or an attention takes on this machine, measured in a process of its own under a limit of memory.

A process of its own, because the most memory that a process ever had cannot be set back; a limit, because what does
not fit must end with a message and take nothing else with it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import DitkitError, from_json, to_json

if TYPE_CHECKING:
    from .models import ModelConfig

__all__ = ["BACKENDS", "Taken", "attention", "available", "network"]

BACKENDS = ("default", "math", "flash")
"""Which kernel `scaled_dot_product_attention` runs: torch's choice, the matrix written out, or the one without it."""
_WAIT = 600  # seconds


@dataclass(frozen=True)
class Taken:
    """What was measured: seconds of one call (the median), and bytes that it needed at once beyond what was there."""

    seconds: float
    bytes: int


def available(root: Path = Path("/")) -> int:
    """Bytes of memory that are free for a new process: of the machine, or of the control groups that this process is
    in (a container's limit, version 1 or 2), whichever are fewer.

    root: where proc and sys are. Raises DitkitError where the system does not say.
    """
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        raise DitkitError("this system does not say how much memory is free (/proc/meminfo)") from None
    return min([free, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the limit of each control group leaves, of this process and of the groups around it, where there is one."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)  # 0::/a/b, or 4:memory:/a/b (man 7 cgroups)
        if not controllers:
            mount, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # inside a container the path may be the host's, of which only the end of the way up is there
        for folder in (inner := PurePosixPath(path.lstrip("/")), *inner.parents):
            here = root / mount / folder
            try:
                most, taken = ((here / name).read_text().strip() for name in (limit, used))
                rows = dict(line.split(" ", 1) for line in (here / "memory.stat").read_text().splitlines())
                if most != "max":
                    # files in the cache count as used and are let go of when memory is needed
                    yield max(0, int(most) - int(taken) + int(rows.get(cache, 0)))
            except (OSError, ValueError):  # a group without a limit has no such files
                continue


def network(
    config: ModelConfig, batch: int, *, training: bool, limit: int, backend: str = "default", calls: int = 3
) -> Taken:
    """A step of training (forward, backward, AdamW) or of sampling (forward) of a batch, in float32.

    limit: bytes that may be taken. Raises DitkitError where they do not do, or the process ends otherwise.
    """
    job = {"model": to_json(config), "batch": batch, "training": training}
    return _measured({**job, "backend": backend, "calls": calls}, limit)


def attention(shape: tuple[int, ...], *, training: bool, limit: int, backend: str = "default", calls: int = 3) -> Taken:
    """Attention alone, of float32 q, k and v [b heads tokens channels], with its backward pass if `training`."""
    return _measured({"shape": shape, "training": training, "backend": backend, "calls": calls}, limit)


def _measured(job: dict[str, Any], limit: int) -> Taken:
    command = [sys.executable, "-m", "ditkit.guarded"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    content = json.dumps({**job, "limit": limit})
    try:
        done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=_WAIT, env=environment)
    except subprocess.TimeoutExpired:
        raise DitkitError(f"the measurement took longer than {_WAIT} s: make it smaller") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise DitkitError(f"the measurement failed: {last}") from None
    if "refused" in found:
        raise DitkitError(found["refused"])
    return Taken(**found)


def _work(job: dict[str, Any]) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    if "shape" in job:
        q, k, v = (torch.randn(job["shape"], generator=generator).requires_grad_(job["training"]) for _ in range(3))

        def attend() -> object:
            with torch.set_grad_enabled(job["training"]):
                out = F.scaled_dot_product_attention(q, k, v)
            if job["training"]:
                out.sum().backward()
            return out

        return attend
    from . import models  # noqa: F401  the registry must know them; attention alone does without

    config = from_json(job["model"], "the measurement")
    model, cond = config.build(), config.example(job["batch"])
    x = torch.randn(job["batch"], *config.shape, generator=generator)
    t = torch.full((job["batch"],), 0.5)
    if not job["training"]:
        return lambda: _forward(model, x, t, cond)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step() -> None:
        model(x, t, cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def _forward(model: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return model(x, t, cond)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS (held now), VmHWM (the most ever held), VmSize (addresses)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _warm() -> None:
    """A step of a network of one number: what libraries load at first use is no part of a measurement."""
    weight = torch.ones(1, 1, requires_grad=True)
    (F.layer_norm(torch.ones(1, 1) @ weight, (1,)).square().mean() + weight.sum()).backward()
    torch.optim.AdamW([weight], lr=0.1).step()


def _main() -> None:
    import resource

    from torch.nn.attention import SDPBackend, sdpa_kernel

    job = json.loads(sys.stdin.read())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    kernels = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    _warm()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + job["limit"], hard))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (man 5 proc)
    before = _status("VmRSS")
    try:
        with sdpa_kernel(kernels[job["backend"]]) if job["backend"] in kernels else nullcontext():
            work, times = _work(job), []
            for _ in range(job["calls"]):
                begun = time.perf_counter()
                work()
                times.append(time.perf_counter() - begun)
    except (RuntimeError, MemoryError) as error:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "alloc" in words or "memory" in words.lower() or isinstance(error, MemoryError):
            words = f"it needs more than the {job['limit'] / 2**20:,.0f} MiB that it was given"
        print(json.dumps({"refused": words}))
        return
    print(json.dumps({"seconds": statistics.median(times), "bytes": max(0, _status("VmHWM") - before)}))


if __name__ == "__main__":
    _main()

"""What a result was measured on, without anything that names the machine or its owner."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil

from stockpot import __version__

_LIBRARIES = ("ik-llama-cpp-python", "llama-cpp-python", "numpy", "uvicorn", "fastapi")
BUSY_CPU_PERCENT = 15.0
"""Above this share of all processors something else is at work and times say little."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts for result files."""

    cpu: str
    processors: int
    memory_bytes: int
    system: str
    python: str
    stockpot: str
    libraries: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Idleness:
    """What the processors were doing before anything was measured: percent of all of them, and how many
    processes wanted one in the last minute."""

    cpu_percent: float
    load_average: float

    @property
    def quiet(self) -> bool:
        """Whether a measurement now is worth something."""
        return self.cpu_percent <= BUSY_CPU_PERCENT

    def sentence(self) -> str:
        """For people, with the advice that belongs to it."""
        state = f"{self.cpu_percent:.0f}% of the processors busy, load average {self.load_average:.1f}"
        if self.quiet:
            return f"The machine is quiet: {state}."
        return f"Something else runs here: {state}. Stop it and measure again; these times will not hold."


def describe_machine() -> Machine:
    """The facts of this machine and environment."""
    return Machine(
        cpu=_cpu_model(),
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        stockpot=__version__,
        libraries={name: version for name in _LIBRARIES if (version := _version(name))},
    )


def measure_idleness(seconds: float = 1.0) -> Idleness:
    """Watch the processors for `seconds`."""
    return Idleness(psutil.cpu_percent(interval=seconds), psutil.getloadavg()[0])


def machine_json(machine: Machine) -> dict[str, object]:
    """As it stands in result files."""
    return asdict(machine)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    numbers = [facts[key] for key in ("cpu family", "model") if key in facts]
    return f"{name} (family/model {'/'.join(numbers)})" if numbers else name


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

"""How busy the device is and how much memory the process holds, without slowing the loop.

A background thread asks NVML (package pynvml) or, without it, `nvidia-smi`, every few seconds; the loop
reads the last answer. Without a GPU, or when the answer stops coming, the keys are absent.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

GIB = 1 << 30
Sample = dict[str, float]
QUERY = {
    "utilization.gpu": ("gpu_util", 1.0),
    "memory.used": ("gpu_mem_gib", 1 / 1024),
    "power.draw": ("gpu_power_w", 1.0),
}
"""nvidia-smi's field -> our key and the factor to our unit (it gives percent, MiB, watts)."""


class DeviceMeter:
    """Samples one GPU (`gpu`: its UUID, as GPU-..., or index; None: no GPU) until closed."""

    def __init__(self, gpu: Optional[str], interval_s: float = 5.0):
        self._sample: Sample = {}
        self._closed = threading.Event()
        self._thread: Optional[threading.Thread] = None
        ask = None if gpu is None else _source(gpu)
        if ask is not None:
            self._thread = threading.Thread(target=self._run, args=(ask, interval_s), daemon=True)
            self._thread.start()

    def read(self) -> Sample:
        """gpu_util (percent), gpu_mem_gib, gpu_power_w as last sampled, and the process's memory."""
        return {**self._sample, **process_memory()}

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, ask: Callable[[], Sample], interval_s: float) -> None:
        while True:
            self._sample = ask()
            if not self._sample or self._closed.wait(interval_s):
                return


def process_memory(status: Path = Path("/proc/self/status")) -> Sample:
    """Resident memory of this process now and at most, from the kernel."""
    names = {"VmRSS": "mem_gib", "VmHWM": "mem_peak_gib"}
    found = {}
    for line in status.read_text().splitlines():
        field, _, value = line.partition(":")
        if field in names:
            found[names[field]] = int(value.split()[0]) * 1024 / GIB
    return found


def _source(gpu: str) -> Optional[Callable[[], Sample]]:
    """A function that samples the GPU, by the cheapest way that this machine has."""
    try:
        return _nvml(gpu)
    except ImportError:
        pass
    if shutil.which("nvidia-smi") is None:
        return None
    return lambda: nvidia_smi(gpu)


def _nvml(gpu: str) -> Callable[[], Sample]:
    nvml = importlib.import_module("pynvml")
    readings: dict[str, Callable[[Any], float]] = {
        "gpu_util": lambda handle: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "gpu_mem_gib": lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
        "gpu_power_w": lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }

    def ask() -> Sample:
        sample: Sample = {}
        try:
            nvml.nvmlInit()  # counted: only the first call costs something
            by_uuid = gpu.startswith("GPU-")
            find = nvml.nvmlDeviceGetHandleByUUID if by_uuid else nvml.nvmlDeviceGetHandleByIndex
            handle = find(gpu if by_uuid else int(gpu))
        except nvml.NVMLError:
            return sample
        for key, read in readings.items():
            try:
                sample[key] = read(handle)
            except nvml.NVMLError:  # this GPU does not tell
                continue
        return sample

    return ask


def nvidia_smi(gpu: str) -> Sample:
    """One sample; empty when there is none to be had."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "-i", gpu]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    sample = {}
    for (key, factor), text in zip(QUERY.values(), done.stdout.split(",")):
        try:
            sample[key] = float(text) * factor
        except ValueError:  # "[N/A]"
            continue
    return sample

"""Device meter: nvidia-smi and pynvml are stood in for by programs that answer in their format."""

import os
import resource
import sys
import time
import types

import pytest

from strop.obs import device
from strop.obs.device import DeviceMeter, nvidia_smi, process_memory


@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    """`nvidia-smi` that logs its arguments and prints a given answer."""

    def make(answer, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\necho "{answer}"\nexit {code}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setitem(sys.modules, "pynvml", None)  # not importable
        return tmp_path / "calls"

    return make


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("97, 10240, 412.50", {"gpu_util": 97.0, "gpu_mem_gib": 10.0, "gpu_power_w": 412.5}),
        ("97, 512, [N/A]", {"gpu_util": 97.0, "gpu_mem_gib": 0.5}),
    ],
)
def test_nvidia_smi_is_read(fake_smi, answer, expected):
    calls = fake_smi(answer)
    assert nvidia_smi("GPU-abc") == expected
    assert calls.read_text() == (
        "--query-gpu=utilization.gpu,memory.used,power.draw --format=csv,noheader,nounits -i GPU-abc\n"
    )


def test_an_nvidia_smi_that_fails_gives_no_keys_and_is_not_asked_again(fake_smi):
    calls = fake_smi("NVIDIA-SMI has failed", code=9)
    meter = DeviceMeter("0", interval_s=0.01)
    meter._thread.join(timeout=10)
    assert set(meter.read()) == {"mem_gib", "mem_peak_gib"}
    assert len(calls.read_text().splitlines()) == 1
    meter.close()


def test_sampling_runs_beside_the_loop(fake_smi):
    calls = fake_smi("50, 1024, 100")
    meter = DeviceMeter("0", interval_s=0.05)
    deadline = time.monotonic() + 20
    while (not calls.exists() or len(calls.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    start = time.perf_counter()
    for _ in range(100):
        sample = meter.read()
    assert (time.perf_counter() - start) / 100 < 0.002  # reading never waits for the sampler
    assert (sample["gpu_util"], sample["gpu_mem_gib"], sample["gpu_power_w"]) == (50.0, 1.0, 100.0)
    meter.close()
    after = len(calls.read_text().splitlines())
    assert after >= 3
    time.sleep(0.2)
    assert len(calls.read_text().splitlines()) == after


def test_without_a_gpu_there_are_no_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for gpu in (None, "0"):
        meter = DeviceMeter(gpu)
        assert set(meter.read()) == {"mem_gib", "mem_peak_gib"}
        meter.close()


def test_nvml_by_uuid_and_what_a_gpu_does_not_tell(monkeypatch):
    class NVMLError(Exception):
        pass

    def no_power(handle):
        raise NVMLError

    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: ("uuid", uuid)
    nvml.nvmlDeviceGetHandleByIndex = lambda index: ("index", index)
    nvml.nvmlDeviceGetUtilizationRates = lambda h: types.SimpleNamespace(gpu=80 if h == ("index", 1) else 70)
    nvml.nvmlDeviceGetMemoryInfo = lambda h: types.SimpleNamespace(used=3 << 30)
    nvml.nvmlDeviceGetPowerUsage = no_power
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device._source("1")() == {"gpu_util": 80.0, "gpu_mem_gib": 3.0}
    assert device._source("GPU-x")() == {"gpu_util": 70.0, "gpu_mem_gib": 3.0}


def test_process_memory_agrees_with_the_kernels_other_accounts():
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    got = process_memory()
    with open("/proc/self/statm") as f:
        rss_gib = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    assert got["mem_gib"] == pytest.approx(rss_gib, abs=0.01)
    assert got["mem_peak_gib"] == pytest.approx(peak_gib, abs=0.01)

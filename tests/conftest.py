"""Quiet, offline, single-process settings for every test, and the skipping of GPU tests where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

# Read by the libraries when they are imported, hence set before anything else here is.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A busy machine makes any example slow. pytest's own timeout ends a test that hangs.
settings.register_profile("e3rl", deadline=None)
settings.load_profile("e3rl")

GPU_TESTS = Path(__file__).parent / "gpu"
NO_GPU = "needs a CUDA device and this machine has none"
skipped_gpu_tests = pytest.StashKey[int]()


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def everyday_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a real chat model's tokenizer, special tokens and template (`tests.models`)."""
    from tests.models import everyday_llama

    return everyday_llama(tmp_path_factory.mktemp("everyday") / "everyday")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks everything in tests/gpu, or marked `gpu`, as skipped where CUDA is missing."""
    of_gpu = [item for item in items if item.get_closest_marker("gpu") or GPU_TESTS in item.path.parents]
    if not of_gpu or has_cuda():
        return
    for item in of_gpu:
        item.add_marker(pytest.mark.skip(reason=NO_GPU))
    config.stash[skipped_gpu_tests] = len(of_gpu)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(skipped_gpu_tests, 0)
    if count:
        terminalreporter.write_line(f"{count} GPU tests skipped: each {NO_GPU}.", yellow=True)

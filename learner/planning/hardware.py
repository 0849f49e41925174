"""What machines can do: presets with published figures, files that `--measure` wrote, and changes to either."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from common.config import ConfigError
from common.config.base import StrictModel
from common.config.loading import describe, parse_assignment, read_yaml


class Hardware(StrictModel):
    """A GPU with its share of a machine, or a machine without GPUs. Rates are peaks, in one direction, in 10**9 bytes.

    On a machine without GPUs `gpu_memory_gib` is 0, a device is all of its cores, and what a GPU's link would carry is
    copied in memory.
    """

    name: str
    device: Literal["gpu", "cpu"] = "gpu"
    gpu_memory_gib: float = Field(ge=0.0, le=1e5)
    bfloat16_tflops: float = Field(gt=0.0, le=1e6, description="Dense, of a device.")
    float32_tflops: float = Field(gt=0.0, le=1e6)
    memory_gb_per_second: float = Field(gt=0.0, le=1e6, description="Of a device's memory.")
    gpus_per_node: int = Field(ge=1, le=1024)
    nvlink_gb_per_second: float = Field(gt=0.0, le=1e5, description="Of a device to others of its node.")
    network_gb_per_second: float = Field(gt=0.0, le=1e5, description="Of a device to other nodes.")
    pcie_gb_per_second: float = Field(gt=0.0, le=1e5, description="Between a device and its host's memory.")
    host_memory_gib: float = Field(gt=0.0, le=1e6, description="Of a node.")
    host_copy_gb_per_second: float = Field(gt=0.0, le=1e5, description="One process copies in the host's memory.")
    disk_write_gb_per_second: float = Field(gt=0.0, le=1e5, description="Of the run directory's disk, all together.")
    disk_read_gb_per_second: float = Field(gt=0.0, le=1e5)
    cores: int = Field(ge=1, le=65536, description="Of a node.")
    digest_gb_per_second: float = Field(gt=0.0, le=1e5, description="BLAKE2b of a checkpoint, on the driver's node.")
    load_gb_per_second: float = Field(gt=0.0, le=1e5, description="vLLM loads weights from the host's memory.")
    engine_step_seconds: float = Field(ge=0.0, le=10.0, description="Of an engine step beyond the model's own work.")
    engine_response_seconds: float = Field(
        ge=0.0, le=10.0, description="Of each response in an engine step: scheduling, sampling, the monitor."
    )
    microbatch_seconds: float = Field(ge=0.0, le=100.0, description="Of a micro-batch beyond the model's own work.")

    def tflops(self, dtype: str) -> float:
        return self.float32_tflops if dtype == "float32" else self.bfloat16_tflops


def _gpu(
    name: str,
    memory: float,
    tflops: float,
    float32: float,
    bandwidth: float,
    nvlink: float,
    network: float,
    pcie: float,
) -> Hardware:
    """A GPU of a machine of eight. What is no argument here is assumed, not published: it is the installation's."""
    return Hardware(
        name=name,
        gpu_memory_gib=memory,
        bfloat16_tflops=tflops,
        float32_tflops=float32,
        memory_gb_per_second=bandwidth,
        gpus_per_node=8,
        nvlink_gb_per_second=nvlink,
        network_gb_per_second=network,
        pcie_gb_per_second=pcie,
        host_memory_gib=1900.0,
        host_copy_gb_per_second=10.0,
        disk_write_gb_per_second=5.0,
        disk_read_gb_per_second=10.0,
        cores=96,
        digest_gb_per_second=5.0,
        load_gb_per_second=5.0,
        engine_step_seconds=0.004,
        engine_response_seconds=1e-5,
        microbatch_seconds=0.05,
    )


PRESETS: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("a100", 79.1, 312.0, 19.5, 2039.0, 300.0, 25.0, 32.0),
        _gpu("h100", 79.1, 989.0, 67.0, 3350.0, 450.0, 50.0, 64.0),
        _gpu("h200", 139.7, 989.0, 67.0, 4800.0, 450.0, 50.0, 64.0),
        _gpu("b200", 178.3, 2250.0, 80.0, 8000.0, 900.0, 50.0, 64.0),
        _gpu("l40s", 44.4, 362.0, 91.6, 864.0, 32.0, 12.5, 32.0),
    )
}
"""Source: NVIDIA's data sheets of the GPUs (SXM; the L40S has PCIe alone) and of DGX A100, H100, H200 and B200: TFLOPS
without sparsity, links in one direction, a network adapter a GPU (the L40S's is assumed). Memory is what CUDA reports,
which is less than the 80, 80, 141, 180 and 48 GB of the data sheets."""


def read_hardware(items: Sequence[str]) -> Hardware:
    """A preset's name or a YAML file, then changes `name=value`. Raises ConfigError."""
    if not items or "=" in items[0]:
        raise ConfigError(f"--hardware begins with one of {', '.join(PRESETS)} or a file that --measure wrote")
    first, *changes = items
    if first in PRESETS:
        values = PRESETS[first].model_dump()
    elif Path(first).is_file():
        values = read_yaml(Path(first))
    else:
        near = difflib.get_close_matches(first.lower(), PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--hardware {first}: no such file, and no preset: there are {', '.join(PRESETS)}{hint}. Others are given "
            "as changes (--hardware h100 gpu_memory_gib=94) or as a file; --measure FILE writes one of this machine"
        )
    result: Hardware = validated(Hardware, values, changes, f"--hardware {first}")
    return result


def validated(kind: Any, values: dict[str, Any], changes: Sequence[str], where: str) -> Any:
    """A model of `kind` from `values` and changes `name=value`. Raises ConfigError that begins with `where`."""
    for change in changes:
        name, separator, _ = change.partition("=")
        if not separator or "." in name:
            raise ConfigError(f"{where}: {change!r} is not of the form name=value")
        values |= parse_assignment(change)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in describe(error).splitlines())) from error


def write_hardware(hardware: Hardware, path: Path) -> None:
    """As YAML that `read_hardware` reads back."""
    path.write_text(yaml.safe_dump(hardware.model_dump(), sort_keys=False), encoding="utf-8")

"""`python -m learner.plan`: what a run needs of memory, how long its steps take and what saturates first."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import ConfigError, RunConfig, build_config
from common.config.loading import changed, merge, read_assignments, read_yaml
from learner.planning.against import Comparison, compare
from learner.planning.assumptions import read_assumptions
from learner.planning.capacity import make_plan
from learner.planning.hardware import PRESETS, read_hardware, write_hardware
from learner.planning.setup import Setup
from learner.planning.shape import read_shape
from learner.planning.table import as_json, print_comparison, print_plan
from learner.policy.model_directory import with_absolute_model
from learner.run.errors import InputError, PartError

OK, FAILED, BAD_INPUT = 0, 1, 2

EPILOG = """\
examples
  the 8B model on one machine of eight GPUs, with its config.json from a file
      python -m learner.plan --config deploy/configs/qwen3_8b_deepmath.yaml --model-config config.json --hardware h100
  on 64 replicas and 64 ranks, asynchronous
      python -m learner.plan --config ... --hardware h100 --replicas 64 --ranks 64 --transport nccl --max-staleness 1
  other figures and assumptions than the built-in ones
      python -m learner.plan --config ... --hardware h100 gpu_memory_gib=94 --assume mean_response_tokens=4000

  this machine's figures, then the check against a run of it
      python -m learner.plan --measure here.yaml --measure-engine --config deploy/configs/demo.yaml
      python -m learner.plan --hardware here.yaml --against runs/demo

exit status: 0 planned, 1 a measurement failed, 2 bad input, or a plan that does not fit (it is printed all the same)
"""


def parser() -> argparse.ArgumentParser:
    """The command line's definition."""
    result = argparse.ArgumentParser(
        prog="python -m learner.plan", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    result.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the run's settings")
    result.add_argument(
        "--set", action="append", default=[], metavar="a.b.c=value", dest="assignments", help="change one setting"
    )
    result.add_argument("--model-config", type=Path, metavar="FILE", help="config.json of a model that is not here")
    result.add_argument(
        "--hardware",
        nargs="+",
        default=["h100"],
        metavar="NAME [figure=value]",
        help=f"{', '.join(PRESETS)} or a YAML file, and changes to it (default: h100)",
    )
    result.add_argument(
        "--assume", nargs="+", action="extend", default=[], metavar="name=value", help="change assumptions"
    )
    result.add_argument("--replicas", type=int, help="instead of rollout.engine.replicas")
    result.add_argument("--ranks", type=int, help="instead of learner.ranks")
    result.add_argument("--tensor-parallel", type=int, help="instead of rollout.engine.tensor_parallel_size")
    result.add_argument(
        "--transport", choices=("host", "disk", "gloo", "nccl", "ipc"), help="instead of sync.transport"
    )
    result.add_argument("--max-staleness", type=int, help="instead of max_staleness; 0: synchronous loop")
    result.add_argument("--in-flight", choices=("keep", "recompute", "wait", "abort"), help="instead of sync.in_flight")
    result.add_argument(
        "--offload", choices=("none", "optimizer"), default="none", help="what if AdamW's state were in host memory"
    )
    result.add_argument(
        "--measure", type=Path, metavar="FILE", help="measure this machine, in a minute, and write its figures to FILE"
    )
    result.add_argument(
        "--measure-engine",
        action="store_true",
        help="with --measure: also what an engine step and a micro-batch of the model cost, by starting a replica",
    )
    result.add_argument(
        "--against",
        type=Path,
        metavar="RUN",
        help="compare with a run's directory; its config.yaml is taken without --config",
    )
    result.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, tokens")
    return result


def read_config(options: argparse.Namespace) -> RunConfig:
    """The configuration with the command line's changes; the counts of parts go through its own checks."""
    changes = read_assignments(options.assignments)
    counts: dict[str, Any] = {}
    if options.replicas is not None:
        counts = merge(counts, {"rollout": {"engine": {"replicas": options.replicas}}})
    if options.max_staleness is not None:
        counts = merge(counts, {"max_staleness": options.max_staleness})
    if options.ranks is not None:
        counts = merge(counts, {"learner": {"ranks": options.ranks}})
    path = options.config or (options.against and options.against / "config.yaml")
    if path is None:
        raise ConfigError("--config FILE is needed")
    return build_config(merge(changed(read_yaml(path), changes), counts))


def read_setup(options: argparse.Namespace) -> Setup:
    """Raises ConfigError and InputError."""
    if options.tensor_parallel is not None and options.tensor_parallel < 1:
        raise ConfigError(f"--tensor-parallel: at least 1 (found {options.tensor_parallel})")
    config = read_config(options)
    return Setup(
        config=config,
        shape=read_shape(config.model, options.model_config),
        hardware=read_hardware(options.hardware),
        tensor_parallel=options.tensor_parallel or config.rollout.engine.tensor_parallel_size,
        transport=options.transport or config.sync.transport,
        max_staleness=config.max_staleness,
        in_flight=options.in_flight or config.sync.in_flight,
        offload=options.offload,
    )


def measure(options: argparse.Namespace) -> None:
    """Write this machine's figures. Raises ConfigError, InputError and PartError."""
    from learner.planning.measure import measure_machine

    if options.measure.is_dir() or not options.measure.parent.is_dir():
        raise ConfigError(f"--measure: {options.measure} can't be written: a file in a directory that is there")
    hardware = measure_machine(options.measure.parent)
    if options.measure_engine:
        from learner.planning.measure_run import measure_engine, measure_microbatch

        config = with_absolute_model(read_config(options))
        microbatch = measure_microbatch(config)
        with tempfile.TemporaryDirectory() as logs:
            step, each = measure_engine(config, read_shape(config.model), hardware, Path(logs))
        costs = {"engine_step_seconds": step, "engine_response_seconds": each, "microbatch_seconds": microbatch}
        hardware = hardware.model_copy(update=costs)
    write_hardware(hardware, options.measure)
    print(options.measure.read_text(), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.measure is not None:
            measure(options)
            return OK
        if options.measure_engine:
            raise ConfigError("--measure-engine goes with --measure FILE")
        setup, assumptions = read_setup(options), read_assumptions(options.assume)
        rows: list[Comparison] = []
        if options.against is not None:
            plan, rows = compare(setup, assumptions, options.against)
        else:
            plan = make_plan(setup, assumptions)
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except PartError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if options.json:
        compared = {"compared": [asdict(row) for row in rows]} if rows else {}
        print(json.dumps(as_json(plan) | compared, indent=2))
    else:
        print_plan(plan, Console())
        if rows:
            print_comparison(rows, Console())
    for problem in plan.problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    return BAD_INPUT if plan.problems else OK


if __name__ == "__main__":
    sys.exit(main())

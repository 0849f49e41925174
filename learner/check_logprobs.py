"""The command line of the log-prob check: `python -m learner.check_logprobs --config FILE`.

Starts the run's replicas and learner ranks, lets both say how likely the same tokens are, and tells whether they differ
by more than rounding. Leaves no run behind.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import ConfigError, RunConfig
from common.config.loading import build_config, changed, read_assignments, read_yaml
from learner.run.errors import InputError, PartError

if TYPE_CHECKING:
    from learner.evaluation.logprob_check import Comparison, Result
    from learner.run.display import Display

AGREE, DIFFER, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
CLOSE_SECONDS = 60.0

EPILOG = """\
examples:
  check the demo's model
      python -m learner.check_logprobs --config deploy/configs/demo.yaml
  check another one with more responses, and keep the figures
      python -m learner.check_logprobs --config my.yaml --prompts 16 --json gaps.json

exit status: 0 the gap is rounding, 1 it is not or a part failed, 2 bad configuration or input, 130 stopped with Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    """The command line's definition."""
    result = argparse.ArgumentParser(
        prog="python -m learner.check_logprobs",
        description="Compare the log-probs of engines and learner, under the same weights and after one weight sync.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--config", type=Path, metavar="FILE", required=True, help="YAML file with the run's settings")
    result.add_argument(
        "--set", action="append", default=[], metavar="a.b.c=value", dest="assignments", help="change one setting"
    )
    result.add_argument(
        "--prompts", type=_positive, default=4, help="prompts, each with rollout.responses_per_group responses (4)"
    )
    result.add_argument(
        "--learning-rate", type=float, default=1e-3, help="of the one training step before the sync (1e-3)"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    log_directory = Path(tempfile.mkdtemp(prefix="e3rl-check-"))
    keep = True
    try:
        config = build_config(changed(read_yaml(options.config), read_assignments(options.assignments)))
        result = _run(config, options, log_directory)
        if options.json is not None:
            options.json.write_text(json.dumps(result.as_json(), indent=2) + "\n")
        keep = not result.agrees
    except (ConfigError, InputError) as error:
        keep = False
        return _fail(BAD_INPUT, str(error))
    except OSError as error:
        return _fail(DIFFER, f"{error.filename}: {error.strerror}")
    except PartError as error:
        return _fail(DIFFER, f"{error}\nlogs: {log_directory}")
    except KeyboardInterrupt:
        keep = False
        return _fail(INTERRUPTED, "stopped")
    finally:
        if not keep:
            shutil.rmtree(log_directory, ignore_errors=True)
    return AGREE if result.agrees else DIFFER


def _run(config: RunConfig, options: argparse.Namespace, log_directory: Path) -> "Result":
    # Heavy packages come in only now, so that help and errors of the configuration come at once.
    from learner.evaluation.logprob_check import checked_config
    from learner.policy.model_directory import ensure_model, with_absolute_model
    from learner.run.cluster import ray_cluster
    from learner.run.display import Display
    from learner.run.errors import part
    from learner.run.quiet import quiet_output

    with quiet_output(log_directory) as terminal:
        display = Display(terminal)
        display.start()
        try:
            ensure_model(config, lambda phase, done, total: display.phase(f"warm start: {phase}", done, total))
            prompts = _prompts(config, options.prompts, display)
            config = checked_config(with_absolute_model(config), options.learning_rate)
            display.phase("starting Ray")
            with part("Ray"), ray_cluster(config, log_directory):
                result = asyncio.run(_check(config, prompts, log_directory, display))
            show(result, display, log_directory)
        finally:
            display.stop()
    return result


def _prompts(config: RunConfig, count: int, display: "Display") -> list[Any]:
    from learner.environments.data import read_rows, tokenise
    from learner.environments.problems import check_tokenizer
    from learner.policy.model_directory import load_tokenizer

    rows = read_rows(config, "train", note=display.message)
    tokenizer = load_tokenizer(config)
    check_tokenizer(config, tokenizer)
    return tokenise(rows, tokenizer, config, "train", display.message).prompts[:count]


async def _check(config: RunConfig, prompts: list[Any], log_directory: Path, display: "Display") -> "Result":
    from learner.evaluation.logprob_check import check
    from learner.policy.probe import ProbeGroup
    from learner.run.errors import part
    from learner.run.training_run import load_rollouts

    rollouts, learner = load_rollouts(), ProbeGroup(config, log_directory)
    try:
        display.phase("starting the replicas and the learner")
        with part("start"):
            await asyncio.gather(rollouts.start(config, log_directory), learner.start())
        with part("check"):
            return await check(config, rollouts, learner, prompts, display.phase)
    finally:
        display.phase("stopping the replicas and the learner")
        async with asyncio.timeout(CLOSE_SECONDS):
            await asyncio.gather(rollouts.close(), learner.close(), return_exceptions=True)


def show(result: "Result", display: "Display", log_directory: Path) -> None:
    """A table of all gaps, and the verdict."""
    from rich.table import Table

    table = Table(title="|engine's - learner's log-prob| of a token, in nats")
    for column in ("weights", "tokens of", "tokens", "mean", "p50", "p90", "p99", "p99.9", "max", ""):
        table.add_column(column, justify="left" if column in ("weights", "tokens of", "") else "right")
    for comparison in result.comparisons:
        for cells in _lines(comparison):
            table.add_row(*cells)
        table.add_section()
    display.show(table)
    if result.checksum is not None:
        display.message(f"weights that were synced: checksum {result.checksum}, the same in every replica")
    if result.agrees:
        display.message("the gap is rounding: engines and learner agree")
    for cause in result.causes:
        display.message(f"NOT ROUNDING: {cause}")
    if result.causes:
        display.message(f"logs: {log_directory}")


def _lines(comparison: "Comparison") -> list[list[str]]:
    rows = []
    for part, gaps in comparison.parts.items():
        figures = [gaps.mean, gaps.p50, gaps.p90, gaps.p99, gaps.p999, gaps.max]
        verdict = "" if not gaps.tokens else "rounding" if gaps.within(comparison.limits) else "TOO FAR"
        rows.append(["", part, f"{gaps.tokens:,}", *(f"{figure:.1e}" for figure in figures), verdict])
    noise = comparison.noise
    figures = [noise.mean, noise.p50, noise.p90, noise.p99, noise.p999, noise.max]
    shown = [f"{figure:.1e}" for figure in figures]
    rows.append(["", "(learner's own)", f"{noise.tokens:,}", *shown, ""])
    limits = comparison.limits
    bound = ["", *(f"{limits[name]:.1e}" if name in limits else "" for name in ("mean", "", "", "p99", "", "max")), ""]
    rows.append(["", "(limit)", *bound])
    rows[0][0] = comparison.name
    return rows


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _fail(status: int, message: str) -> int:
    print(f"{'' if status == INTERRUPTED else 'error: '}{message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

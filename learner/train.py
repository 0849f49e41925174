"""The command line of training: `python -m learner.train --config FILE`.

Heavy packages are imported only once the configuration is known to be good, so that help and errors come at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import ConfigError, RunConfig, build_config, dump_yaml
from common.config.loading import changed, read_assignments, read_yaml, renamed
from learner.errors import InputError, Interrupted, PartError
from learner.run_directory import CONFIG, directory_of, write_dry_run

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
examples:
  train a tiny model on the CPU and evaluate it
      python -m learner.train --config deploy/configs/demo.yaml
  the same with other settings, under another name
      python -m learner.train --config deploy/configs/demo.yaml --name fast \\
          --set steps=8 --set learner.optimizer.learning_rate=1e-4
  see what a configuration comes to, without starting anything
      python -m learner.train --config deploy/configs/qwen3_4b_deepmath.yaml --dry-run
  continue a run that was stopped or killed
      python -m learner.train --config deploy/configs/demo.yaml --resume
  go on from its newest checkpoint under another name, with other settings
      python -m learner.train --config deploy/configs/demo.yaml --fork gentler --set learner.optimizer.epsilon=1e-6
  train, then train the baselines with as many generated tokens, and compare
      python -m learner.train --config deploy/configs/demo.yaml --compare

exit status: 0 finished, 1 a part failed, 2 bad configuration or input, 130 stopped with Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    """The command line's definition."""
    result = argparse.ArgumentParser(
        prog="python -m learner.train",
        description="Train a language model with erasable reinforcement learning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = result.add_argument_group("configuration")
    what.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the run's settings")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b.c=value",
        dest="assignments",
        help="change one setting; may be given several times, the value is YAML",
    )
    what.add_argument("--name", help="the run's name; its files are in runs/NAME")
    how = result.add_argument_group("what to do")
    how.add_argument("--dry-run", action="store_true", help="check, write and print the configuration; start nothing")
    how.add_argument("--resume", action="store_true", help="continue the run of that name from its newest checkpoint")
    how.add_argument(
        "--fork", metavar="NAME", help="go on from that run's newest checkpoint, as a new run NAME with other settings"
    )
    how.add_argument(
        "--compare",
        action="store_true",
        help="afterwards run GRPO and the temperature control at equal tokens",
    )
    return result


def read_config(options: argparse.Namespace) -> RunConfig:
    """The configuration that the command line asks for; with `--fork` still under the name of the run to fork.

    `--resume --name X` and `--fork NEW --name X` without a file take the stored one.
    """
    if options.fork and (options.resume or options.compare):
        raise ConfigError("--fork begins a new run: it does not go with --resume or --compare")
    changes = read_assignments(options.assignments)
    if options.name:
        changes["name"] = options.name
    path = options.config
    if path is None:
        if not ((options.resume or options.fork) and options.name):
            raise ConfigError(
                "--config FILE is needed (or --name NAME with --resume or --fork, which takes the stored one)"
            )
        path = Path(str(changes.get("runs_directory", "runs"))) / options.name / CONFIG
    return build_config(changed(read_yaml(path), changes))


def derived_sizes(config: RunConfig) -> list[tuple[str, str]]:
    """What the settings come to, each with its unit and scope."""
    rollout, learner = config.rollout, config.learner
    responses, minibatches = config.responses_per_step, learner.minibatches_per_step
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    erased = rollout.erasure.erased_token_limit(rollout.max_response_tokens)
    per_step = responses * rollout.max_response_tokens + treated_erasures(config) * erased
    in_all = per_step * config.steps
    if config.token_budget is not None:
        # The step that reaches the budget is finished.
        in_all = min(in_all, config.token_budget - 1 + per_step)
    concurrent = rollout.engine.replicas * rollout.engine.max_concurrent_responses
    evaluation = config.evaluation.problems * config.evaluation.responses_per_problem
    return [
        (
            "responses per step",
            f"{responses} = {rollout.groups_per_step} groups x {rollout.responses_per_group}",
        ),
        (
            "treated responses per group",
            f"{config.treated_per_group}, {rollout.treatment.kind}, while the share applies",
        ),
        ("responses at a time", f"{concurrent} on {rollout.engine.replicas} replica(s)"),
        (
            "optimizer steps",
            f"{config.steps * minibatches} = {config.steps} steps x {minibatches} minibatches",
        ),
        ("responses per optimizer step and rank", f"{responses // (minibatches * learner.ranks)} on average"),
        (
            "longest sequence",
            f"{longest} tokens, {learner.tokens_per_microbatch // longest} to a micro-batch",
        ),
        ("generated tokens per step", f"at most {per_step:,}, erased ones included"),
        (
            "generated tokens in all",
            f"at most {in_all:,} for training",
        ),
        ("responses per evaluation", f"{evaluation}, plain and erasable each"),
        (
            "GPUs, where there are any",
            f"{rollout.engine.replicas + learner.ranks} = {rollout.engine.replicas} replica(s) + {learner.ranks} "
            "learner rank(s)",
        ),
    ]


def treated_erasures(config: RunConfig) -> int:
    """Responses of a step that can be erased from."""
    return (
        config.treated_per_group * config.rollout.groups_per_step if config.rollout.treatment.kind == "erasure" else 0
    )


def dry_run(config: RunConfig) -> None:
    """Print the resolved configuration and what it comes to; leave it in the run's directory if that is unused."""
    print(dump_yaml(config), end="")
    for name, value in derived_sizes(config):
        print(f"# {name}: {value}")
    written = write_dry_run(config)
    print(f"# written to {written}" if written else "# not written: the run's directory already holds a run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        config = read_config(options)
        source = directory_of(config) if options.fork else None
        if options.fork:
            config = renamed(config, options.fork)
        if options.dry_run:
            dry_run(config)
            return OK
    except (ConfigError, InputError) as error:
        return _fail(BAD_INPUT, str(error))
    except PartError as error:
        return _fail(FAILED, str(error))
    return _train(config, options, source)


def _train(config: RunConfig, options: argparse.Namespace, source: Path | None) -> int:
    resume_hint = f"continue with --resume (name: {config.name})"
    try:
        from learner import training_run
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "stopped before the run began")
    try:
        if options.compare:
            training_run.show_comparison(training_run.compare(config, resume=options.resume))
        else:
            training_run.train(config, resume=options.resume, source=source)
    except (ConfigError, InputError) as error:
        return _fail(BAD_INPUT, str(error))
    except training_run.RunFailedError as error:
        return _fail(FAILED, f"{error}\ntraceback: {error.log_path}")
    except PartError as error:
        return _fail(FAILED, str(error))
    except (Interrupted, KeyboardInterrupt):
        return _fail(INTERRUPTED, f"stopped; {resume_hint}")
    return OK


def _fail(status: int, message: str) -> int:
    prefix = "" if status == INTERRUPTED else "error: "
    print(f"{prefix}{message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

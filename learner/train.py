"""The command line of training: `python -m learner.train --config FILE`.

Heavy packages are imported only once the configuration is known to be good, so that help and errors come at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import ConfigError, RunConfig, build_config
from common.config.loading import changed, read_assignments, read_yaml, renamed
from learner.run.errors import InputError, Interrupted, PartError
from learner.run.run_directory import CONFIG, can_continue, directory_of

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
ALWAYS, AUTO = "always", "auto"

EPILOG = """\
examples:
  train a tiny model on the CPU and evaluate it
      python -m learner.train --config deploy/configs/demo.yaml
  the same with other settings, under another name
      python -m learner.train --config deploy/configs/demo.yaml --name fast \\
          --set steps=8 --set learner.optimizer.learning_rate=1e-4
  check a configuration, its model, data and reward, and see what it comes to, without starting an engine
      python -m learner.train --config deploy/configs/qwen3_4b_deepmath.yaml --dry-run
  continue a run that was stopped or killed
      python -m learner.train --config deploy/configs/demo.yaml --resume
  begin a run, or continue it if it was begun before: the command for a job that may be restarted
      python -m learner.train --config deploy/configs/demo.yaml --resume auto
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
    how.add_argument("--dry-run", action="store_true", help="check all that needs no engine and show what it comes to")
    how.add_argument(
        "--resume",
        nargs="?",
        const=ALWAYS,
        choices=(ALWAYS, AUTO),
        metavar=AUTO,
        help="continue the run of that name from its newest checkpoint; `--resume auto` begins it if there is none, so "
        "that whoever restarts a job can give the same command again",
    )
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
        if options.resume == AUTO and not path.is_file():
            raise ConfigError(f"--config FILE is needed: there is no {path} to continue, so that the run is to begin")
    return build_config(changed(read_yaml(path), changes))


def resumes(config: RunConfig, options: argparse.Namespace) -> bool:
    """Whether an earlier run is continued: if the command line says so, or leaves it to what is there."""
    return bool(options.resume == ALWAYS or (options.resume == AUTO and can_continue(config)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        config = read_config(options)
        source = directory_of(config) if options.fork else None
        if options.fork:
            config = renamed(config, options.fork)
        if options.dry_run:
            from learner.run.dry_run import dry_run

            wrong = dry_run(config, resume=resumes(config, options), compare=options.compare, source=source)
            return _fail(BAD_INPUT, "\nerror: ".join(wrong)) if wrong else OK
    except (ConfigError, InputError) as error:
        return _fail(BAD_INPUT, str(error))
    except PartError as error:
        return _fail(FAILED, str(error))
    return _train(config, options, source)


def _train(config: RunConfig, options: argparse.Namespace, source: Path | None) -> int:
    resume_hint = f"continue with --resume (name: {config.name})"
    try:
        from learner.run import training_run
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "stopped before the run began")
    try:
        if options.compare:
            # Each of the runs is continued that there is.
            training_run.show_comparison(training_run.compare(config, resume=options.resume is not None))
        else:
            training_run.train(config, resume=resumes(config, options), source=source)
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

"""Flags of `python -m rollout_server`, made from the settings. Imports nothing heavy, so that `--help` is fast."""

import argparse
import difflib
import os
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from common.config.erasure import ErasurePolicy
from common.config.loading import ConfigError
from rollout_server.http.server.settings import ENVIRONMENT_PREFIX, ServerSettings, load_settings

DESCRIPTION = """Serve erasable generation over HTTP, compatible with OpenAI's API.

Flags win over environment variables (E3RL_PORT for --port), which win over --config."""


class UsageError(Exception):
    """The server cannot start as it was asked to; the message is one line."""


def parser() -> argparse.ArgumentParser:
    """The flags, grouped as the settings are."""
    result = argparse.ArgumentParser(
        prog="python -m rollout_server",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings, named like the flags.")
    groups: dict[str, Any] = {}
    for name, field in ServerSettings.model_fields.items():
        extra = field.json_schema_extra
        title = str(extra["group"]) if isinstance(extra, dict) else "other"
        group = groups.get(title) or groups.setdefault(title, result.add_argument_group(title))
        flag = "--" + name.replace("_", "-")
        text = (field.description or "").replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif name == "api_key":
            options |= {"action": "append", "metavar": "KEY"}
        elif field.annotation is ErasurePolicy:
            options["metavar"] = "JSON"
        else:
            options["metavar"] = _metavar(name, field.annotation)
        if field.annotation is not ErasurePolicy and field.default not in (None, ()) and not field.is_required():
            text += f" (default: {str(field.default).lower() if field.annotation is bool else field.default})"
        group.add_argument(flag, help=text, **options)
    return result


def _metavar(name: str, annotation: Any) -> str:
    choices = [value for value in get_args(annotation) if isinstance(value, str)]
    if choices:
        return "{" + ",".join(choices) + "}"
    kinds = set(get_args(annotation)) or {annotation}
    if float in kinds:
        return "SECONDS" if name.endswith("_seconds") else "NUMBER"
    return "N" if int in kinds else name.rpartition("_")[2].upper()


def read_settings(arguments: list[str] | None = None) -> ServerSettings:
    """The settings that a command line, the environment and a file give.

    Raises:
        UsageError: with one line for the user.
        SystemExit: after `--help`, or for flags that do not exist.
    """
    flags = vars(parser().parse_args(arguments))
    config: Path | None = flags.pop("config")
    _check_environment()
    try:
        return load_settings(flags, config)
    except ValidationError as error:
        raise UsageError(_describe(error)) from error
    except ConfigError as error:
        raise UsageError(f"--config {' '.join(str(error).split())}") from error


def _check_environment() -> None:
    """A variable with our prefix that is no setting would have no effect: most likely it is misspelt."""
    known = {ENVIRONMENT_PREFIX + name.upper() for name in ServerSettings.model_fields}
    for name in sorted(os.environ):
        # As pydantic does, which takes a variable's name in any case.
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, 1)
            suggestion = f"did you mean {near[0]}?" if near else "--help lists the settings"
            raise UsageError(f"the environment variable {name} is no setting: {suggestion}")


def _describe(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_input=False):
        place = ".".join(str(part) for part in problem["loc"])
        flag = "--" + place.replace("_", "-") if place else ""
        if problem["type"] == "missing":
            problems.append(f"{flag} is needed (or {ENVIRONMENT_PREFIX}{place.upper()})")
        elif problem["type"] == "extra_forbidden":
            problems.append(f"unknown setting {place!r}")
        else:
            problems.append(f"{flag}: {problem['msg']}".removeprefix(": ").replace("Value error, ", ""))
    return "; ".join(problems)

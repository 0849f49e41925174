"""From a YAML file and `--set` options to a validated configuration, with messages that a user can act on."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from common.config.data import kind_as_source
from common.config.run import RunConfig

PRESETS: dict[str, dict[str, Any]] = {
    "e3rl": {},
    "paper": {
        "rollout": {
            "group_share": {"mode": "fixed", "share": 1.0},
            "treatment": {"kind": "erasure"},
            "erasure": {
                "segmentation": {"mode": "fixed", "length": 512},
                "window": 32,
                "weights": {"base": 1.0, "extreme": 1.0, "gradient": 1.0},
                "min_uncertainty": 0.0,
                "kappa": 1.0,
                "gamma": 0.1,
                "eta": 0.1,
                "max_erasures": 5,
            },
        },
        "learner": {"advantage": {"credit": {"kind": "uncertainty"}, "normalise": "segment"}},
    },
    # What found and mended wrong steps best on a pretrained model: see docs/erasure.md.
    "pretrained": {
        "rollout": {
            "erasure": {
                "segmentation": {"mode": "delimiter", "delimiter": "\n", "min_length": 16, "max_length": 128},
                "window": 1,
                "weights": {"base": 1.0, "extreme": 0.0, "gradient": 0.0},
                "min_uncertainty": 0.02,
                "kappa": 0.0,
                "gamma": 0.05,
                "retry_temperature": 0.5,
            },
        },
    },
    "grpo": {
        "rollout": {"group_share": {"mode": "fixed", "share": 0.0}},
        "learner": {"advantage": {"credit": {"kind": "uniform"}, "normalise": "sequence", "erased_weight": 0.0}},
    },
    # Differs from the run that it controls in how the treated share is generated, and so has no erased attempts.
    "temperature_control": {
        "rollout": {"treatment": {"kind": "temperature", "temperature": 0.5}},
        "learner": {"advantage": {"erased_weight": 0.0}},
    },
}
"""What each preset sets. `e3rl` is the defaults, `pretrained` erasure for a real model's text, the last two baselines.

`paper` is what is known of the paper: all responses erasable, segments of 512 tokens, all three parts of U, a moving
average, a penalty that grows; the values of window, weights and the like are ours. Its credit is not the paper's: that
is by attention, which the learner does not have, so `uncertainty` stands in its place.
"""


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error: PyYAML takes the last and drops the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands here a second time", node.value[number][0].start_mark
                )
        return super().construct_mapping(node, deep)


_UNION_TAGS = ("mode", "kind", "source")


class ConfigError(Exception):
    """A configuration that can't be run; the message says what is wrong, where, and what would be right."""


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid upon `under`, key by key. A change of a union's tag replaces the whole of that part."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _changes_kind(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _changes_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(tag in new and tag in old and new[tag] != old[tag] for tag in _UNION_TAGS)


def parse_assignment(assignment: str) -> dict[str, Any]:
    """`a.b.c=value` as a nested dictionary; the value is YAML."""
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {assignment!r} is not of the form a.b.c=value")
    try:
        value: Any = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment!r}: the value is not valid YAML: {error}") from error
    for key in reversed(keys):
        value = {key: value}
    result: dict[str, Any] = value
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings: expected a mapping, found {type(content).__name__}")
    return content


def read_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """What `--set` options ask for, applied in order."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        changes = merge(changes, parse_assignment(assignment))
    return changes


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A file's settings with a command line's `changes`. A preset among these wins over the file, too."""
    preset = changes.get("preset")
    asked_for = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return merge(merge(_one_spelling(settings), asked_for), _one_spelling(changes))


def _one_spelling(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with `data.kind` as `data.source`, so that what one says and the other changes is one setting."""
    try:
        return settings | {"data": kind_as_source(settings["data"])} if "data" in settings else settings
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def build_config(settings: dict[str, Any]) -> RunConfig:
    """The validated configuration; `settings["preset"]` changes the defaults below what `settings` says itself."""
    preset = settings.get("preset", "e3rl")
    under = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    merged = merge(under, _one_spelling(settings))
    if problems := list(_broken_text(merged)):
        raise ConfigError("\n".join(problems))
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error)) from error
    if problems := list(_taken_for_numbers(merged, config)):
        raise ConfigError("\n".join(problems))
    return config


def _broken_text(given: Any, place: str = "") -> Iterator[str]:
    """Complaints about halves of surrogate pairs (`\\ud800`), which YAML lets through and no file takes."""
    if isinstance(given, dict):
        for key, value in given.items():
            yield from _broken_text(value, f"{place}.{key}" if place else str(key))
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from _broken_text(value, f"{place}.{number}")
    elif isinstance(given, str) and any("\ud800" <= character <= "\udfff" for character in given):
        yield f"{place}: half of a surrogate pair is no character (found {given!a:.80})"


def _taken_for_numbers(given: Any, read: Any, place: str = "") -> Iterator[str]:
    """Complaints about booleans, which pydantic reads as 0 and 1 where a number is expected: YAML's `yes` is one."""
    if isinstance(given, dict):
        for key, value in given.items():
            inner = read[key] if isinstance(read, dict) else getattr(read, key)
            yield from _taken_for_numbers(value, inner, f"{place}.{key}" if place else str(key))
    elif isinstance(given, list):
        for number, (value, inner) in enumerate(zip(given, read, strict=True)):
            yield from _taken_for_numbers(value, inner, f"{place}.{number}")
    elif isinstance(given, bool) and not isinstance(read, bool):
        yield f"{place}: a number is expected (found {given})"


def load_config(path: Path, assignments: Iterable[str] = ()) -> RunConfig:
    """Read `path`, apply `--set` assignments in order, validate."""
    return build_config(changed(read_yaml(path), read_assignments(assignments)))


def variant(config: RunConfig, preset: str, name: str) -> RunConfig:
    """`config` as the baseline `preset` would run it: the preset's settings win over the configuration's."""
    settings = merge(config.model_dump(mode="json"), PRESETS[preset])
    return build_config(merge(settings, {"preset": preset, "name": name}))


def renamed(config: RunConfig, name: str) -> RunConfig:
    """The same configuration for a run of another name."""
    return build_config(config.model_dump(mode="json") | {"name": name})


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same configuration."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def describe(error: ValidationError) -> str:
    """One line a problem: where it is, what is wrong."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "configuration"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown setting"
        elif problem["type"] == "union_tag_not_found":
            message = f"name the kind too, with {problem['ctx']['discriminator']}: it has several"
        elif problem["type"] not in ("missing", "value_error"):
            message += f" (found {problem['input']!r})"
        lines.append(f"{place}: {message}")
    return "\n".join(lines)

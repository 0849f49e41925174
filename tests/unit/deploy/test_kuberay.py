"""The manifests for KubeRay: by schema, by the autoscaler and Serve of the installed Ray, and among themselves."""

import copy
import os
import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from common.config import load_config
from learner.train import parser, read_config
from rollout_server.http.server.ray_serve import DEPLOYMENT, application
from rollout_server.http.server.settings import ServerSettings
from tests.kuberay import RayJob, RayService, check

ROOT = Path(__file__).resolve().parents[3]
MANIFESTS = ROOT / "deploy" / "kuberay"
CRDS = os.environ.get("KUBERAY_CRDS")
"""KubeRay's own definitions, `helm-chart/kuberay-operator/crds` of its repository, if they are at hand."""

CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown field": lambda job: job["spec"].update(backofLimit=1),
    "unknown field of a pod": lambda job: container(job).update(imagePullPolice="Always"),
    "wrong type": lambda job: job["spec"].update(backoffLimit="10"),
    "number as a parameter": lambda job: cluster(job)["headGroupSpec"].update(rayStartParams={"num-cpus": 0}),
    "old Ray": lambda job: cluster(job).update(rayVersion="2.51.0"),
    "more than the most": lambda job: cluster(job)["workerGroupSpecs"][0].update(replicas=2),
    "no container": lambda job: cluster(job)["headGroupSpec"]["template"]["spec"].update(containers=[]),
    "lifetime without end": lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text()))


def resource(name: str) -> dict[str, Any]:
    """The one of KubeRay's."""
    [found] = [document for document in documents(name) if document["apiVersion"] == "ray.io/v1"]
    return found


def cluster(of: dict[str, Any]) -> dict[str, Any]:
    return of["spec"].get("rayClusterSpec") or of["spec"]["rayClusterConfig"]


def groups(of: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster(of)["headGroupSpec"], *cluster(of)["workerGroupSpecs"]]


def container(of: dict[str, Any]) -> dict[str, Any]:
    return cluster(of)["headGroupSpec"]["template"]["spec"]["containers"][0]


def validate(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        TypeAdapter(RayJob | RayService).validate_python(document)
    else:
        check(document)


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_a_manifest_fits_the_schemas(name: str):
    for document in documents(name):
        validate(document)


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_is_wrong_is_refused(change: str):
    job = copy.deepcopy(resource("rayjob"))
    CHANGES[change](job)
    with pytest.raises(ValidationError):
        validate(job)


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_rays_autoscaler_reads_the_cluster(name: str):
    """Ray's own view of the pods: 8 GPUs on a worker, nothing to work with on the head."""
    spec = cluster(resource(name))
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "e3rl", "namespace": "n"}, "spec": spec})
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpus"]["resources"] == {"CPU": 64, "GPU": 8, "memory": 512 * 2**30}
    assert (types["gpus"]["min_workers"], types["gpus"]["max_workers"]) == (1, 1)


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_ray_is_the_one_in_the_image(name: str):
    locked = re.search(r"^ray==(\S+)$", (ROOT / "deploy" / "locks" / "gpu.txt").read_text(), re.MULTILINE)
    assert cluster(resource(name))["rayVersion"] == locked[1]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_what_a_pod_mounts_is_there(name: str):
    claims = {document["metadata"]["name"] for document in documents("rayjob") if "Claim" in document["kind"]}
    for group in groups(resource(name)):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["name"]: mount["mountPath"] for one in pod["containers"] for mount in one["volumeMounts"]}
        assert mounted.keys() == volumes.keys()
        assert mounted["runs"] == "/runs"
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] in claims


def test_the_job_trains_and_continues_what_was_begun():
    spec = resource("rayjob")["spec"]
    python, module, name, *arguments = shlex.split(spec["entrypoint"])
    assert (python, module, name) == ("python", "-m", "learner.train")
    options = parser().parse_args(arguments)
    assert options.resume == "auto"
    assert options.config == Path("/config/run.yaml"), "where the config map is mounted"
    header = (MANIFESTS / "rayjob.yaml").read_text()
    options.config = ROOT / re.search(r"--from-file=run.yaml=(\S+)", header)[1]
    config = read_config(options)
    assert config.runs_directory == "/runs"
    workers = cluster(resource("rayjob"))["workerGroupSpecs"]
    gpus = sum(group["replicas"] * int(gpus_of(group)) for group in workers)
    assert config.rollout.engine.replicas + config.learner.ranks == gpus
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3


def gpus_of(group: dict[str, Any]) -> str:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


def test_serve_takes_the_services_config(monkeypatch: pytest.MonkeyPatch):
    service = resource("rayservice")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [one] = config.applications
    module, function = one.import_path.split(":")
    assert getattr(import_module(module), function) is application
    assert one.name == DEPLOYMENT
    # The key comes from a secret, by the environment of all pods.
    for group in groups(service):
        assert "E3RL_API_KEY" in {variable["name"] for variable in group["template"]["spec"]["containers"][0]["env"]}
    with pytest.raises(ValidationError, match="set an API key"):
        ServerSettings(**one.args)
    monkeypatch.setenv("E3RL_API_KEY", "a key for the endpoint".replace(" ", "-"))
    settings = ServerSettings(**one.args)
    assert settings.replicas == int(gpus_of(cluster(service)["workerGroupSpecs"][0]))
    assert config.http_options.request_timeout_s > settings.request_seconds
    grace = cluster(service)["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > settings.shutdown_seconds
    ports = {port["name"]: port["containerPort"] for port in container(service)["ports"]}
    assert ports["serve"] == config.http_options.port


def test_the_service_serves_what_the_job_trains():
    [one] = ServeDeploySchema.model_validate(
        yaml.safe_load(resource("rayservice")["spec"]["serveConfigV2"])
    ).applications
    config = load_config(ROOT / "deploy" / "configs" / "qwen3_8b_deepmath.yaml")
    assert one.args["model"] == f"/runs/{config.name}/policy"
    assert one.args["served_model_name"] == config.name


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS does not name the directory of KubeRay's definitions")
@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_a_manifest_fits_kuberays_own_definitions(name: str):
    definition = yaml.safe_load((Path(str(CRDS)) / f"ray.io_{name}s.yaml").read_text())
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = refusing_unknown_fields(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(schema).validate(resource(name))
    faulty = resource(name) | {"spec": resource(name)["spec"] | {"suspent": True}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(faulty)


def refusing_unknown_fields(schema: Any) -> Any:
    """A definition of Kubernetes' as JSON schema."""
    if isinstance(schema, list):
        return [refusing_unknown_fields(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: refusing_unknown_fields(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        result.setdefault("additionalProperties", False)
    return result

"""What KubeRay 1.7 takes, as strict models: its own fields that deploy/ uses, and its operator's rules for them.

KubeRay is no Python package: names, types and rules were read from its custom resource definitions and its operator. A
field that is not here is refused, so that a new one is looked up there first.

Pods are Kubernetes' own and are checked by its schema (`check_pod`).
"""

import re
from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

KUBERNETES = "1.34"


def check_pod(template: dict[str, Any]) -> dict[str, Any]:
    """Check a pod template as the API server does."""
    check({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template})
    if not template["spec"]["containers"]:
        raise ValueError("a pod has no container")
    return template


def check(resource: dict[str, Any]) -> None:
    """Check one of Kubernetes' own resources; unknown fields are refused. Raises ValueError."""
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(f"{resource['kind']}: {list(error.path)}: {error.message}") from error


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Count = Annotated[int, Field(ge=0, lt=2**31)]
Seconds = Annotated[int, Field(ge=1, lt=2**31)]
Pod = Annotated[dict[str, Any], AfterValidator(check_pod)]


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class HeadGroupSpec(Strict):
    rayStartParams: dict[str, str] = {}
    template: Pod


class WorkerGroupSpec(Strict):
    groupName: str
    replicas: Count = 0
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str] = {}
    template: Pod

    @model_validator(mode="after")
    def _replicas_are_in_order(self) -> "WorkerGroupSpec":
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"replicas of {self.groupName} are not between minReplicas and maxReplicas")
        return self


class RayClusterSpec(Strict):
    rayVersion: str = ""
    authOptions: AuthOptions | None = None
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec] = []

    @model_validator(mode="after")
    def _tokens_need_a_version(self) -> "RayClusterSpec":
        if self.authOptions and self.authOptions.mode == "token":
            major, minor = (int(part) for part in self.rayVersion.split(".")[:2])
            if (major, minor) < (2, 52):
                raise ValueError("authOptions.mode token needs rayVersion 2.52.0 or newer")
        return self


class SubmitterConfig(Strict):
    backoffLimit: Count = 2


class RayJobSpec(Strict):
    entrypoint: str
    runtimeEnvYAML: str = ""
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    backoffLimit: Count = 0
    submitterConfig: SubmitterConfig = SubmitterConfig()
    submitterPodTemplate: Pod | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    activeDeadlineSeconds: Seconds | None = None
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def _parts_fit(self) -> "RayJobSpec":
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if self.submissionMode == "InteractiveMode" and self.backoffLimit:
            raise ValueError("backoffLimit does not go with InteractiveMode")
        if self.submissionMode == "SidecarMode" and self.submitterPodTemplate:
            raise ValueError("submitterPodTemplate does not go with SidecarMode")
        if self.submitterPodTemplate and self.submitterPodTemplate["spec"].get("restartPolicy") not in (
            "Never",
            "OnFailure",
        ):
            raise ValueError("the pods of a Kubernetes job need restartPolicy Never or OnFailure")
        return self


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class RayServiceSpec(Strict):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy | None = None
    rayClusterConfig: RayClusterSpec


class Metadata(Strict):
    name: str

    @model_validator(mode="after")
    def _name_is_short(self) -> "Metadata":
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", self.name):
            raise ValueError(f"{self.name!r} is no DNS label of at most 47 characters")
        return self


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec

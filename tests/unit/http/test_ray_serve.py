"""The endpoint as Ray Serve builds it from a config file."""

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from rollout_server.http.server.ray_serve import application


def test_args_are_the_servers_settings_and_the_rest_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("E3RL_REPLICAS", "3")
    built = call_user_app_builder_with_args_if_necessary(
        application, {"model": "some/model", "threads": 2, "shutdown_seconds": 7, "erasure": {"max_erasures": 2}}
    )
    deployment = built._bound_deployment
    [settings] = deployment.init_args
    assert (settings.model, settings.replicas, settings.erasure.max_erasures) == ("some/model", 3, 2)
    config = deployment._deployment_config
    assert config.graceful_shutdown_timeout_s == 7
    options = deployment.ray_actor_options
    assert options["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": "2"}
    assert "num_gpus" not in options, "the replicas are actors of their own"


def test_a_wrong_setting_is_named():
    with pytest.raises(ValidationError, match="replcas"):
        application({"model": "some/model", "replcas": 2})


@pytest.mark.parametrize("name", ["port", "ray_address", "serve"])
def test_settings_that_are_serves_are_refused(name: str):
    with pytest.raises(ValueError, match=rf"args\.{name}: with a config file of Ray Serve"):
        application({"model": "some/model", "replicas": 2, name: 1})

"""Configuration: one strict pydantic model a topic, all reachable from `RunConfig`."""

from common.config.base import StrictModel
from common.config.erasure import DelimiterSegmentation, ErasurePolicy, FixedSegmentation, SignalWeights
from common.config.loading import ConfigError, build_config, dump_yaml, load_config, variant
from common.config.run import EngineConfig, ModelConfig, RunConfig

__all__ = [
    "ConfigError",
    "DelimiterSegmentation",
    "EngineConfig",
    "ErasurePolicy",
    "FixedSegmentation",
    "ModelConfig",
    "RunConfig",
    "SignalWeights",
    "StrictModel",
    "build_config",
    "dump_yaml",
    "load_config",
    "variant",
]

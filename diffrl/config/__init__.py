"""One strict model per stage. Files are read by `diffrl.config_file.load_config`.

base.py: what all stages share; supervised.py: pretrain, midtrain, sft; rl.py, and supervision.py: how its workers are
watched; telemetry.py: where metrics go.
"""

from collections.abc import Mapping
from typing import Literal

from diffrl.config.base import EngineConfig, LoraConfig, ModelConfig, ProblemsConfig, RayConfig, TinyModel
from diffrl.config.rl import MethodConfig, OptimConfig, RLConfig, SamplingConfig, SandboxConfig
from diffrl.config.supervised import (
    AdaptationConfig,
    CorpusData,
    PretrainConfig,
    SftConfig,
    SftData,
    SupervisedConfig,
    SupervisedOptim,
    TrainWorkers,
)
from diffrl.config.supervision import SupervisionConfig
from diffrl.config.telemetry import TelemetryConfig

__all__ = [
    "STAGES",
    "AdaptationConfig",
    "AnyConfig",
    "CorpusData",
    "EngineConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "ProblemsConfig",
    "RLConfig",
    "RayConfig",
    "SamplingConfig",
    "SandboxConfig",
    "SftConfig",
    "SftData",
    "Stage",
    "SupervisedConfig",
    "SupervisedOptim",
    "SupervisionConfig",
    "TelemetryConfig",
    "TinyModel",
    "TrainWorkers",
]

Stage = Literal["pretrain", "midtrain", "sft", "rl"]
AnyConfig = RLConfig | PretrainConfig | SftConfig
STAGES: Mapping[str, type[RLConfig] | type[PretrainConfig] | type[SftConfig]] = {
    "pretrain": PretrainConfig,
    "midtrain": PretrainConfig,
    "sft": SftConfig,
    "rl": RLConfig,
}

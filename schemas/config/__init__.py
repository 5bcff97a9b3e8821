"""Settings of every command, one frozen model for each.

stages.py       data, prepare, build, copy, plan, inspect, verify, bench, export and demo
teacher.py      the teacher: checkpoint, taps, mesh, and how it runs inside a training
train.py        training: losses, optimizer, mesh, run
student.py      the student: source of its weights, surgery operations
feed.py         reading a cache during training
storage.py      object-store client settings
look.py         commands that look at data: fidelity, diff, show, stats, export-samples
report.py       report
serve.py        the viewer
simulate.py     plan --simulate
yaml_text.py    YAML parsing with limits and one error type
asked.py        settings with another value than the default
differences.py  field-by-field differences of two configs or plans, for messages
"""

from distillcache.schemas.base import Config, Positive
from distillcache.schemas.config.stages import (
    BenchConfig,
    BuildConfig,
    BuildOptions,
    BuildSpec,
    CopyConfig,
    CopySpec,
    CopyTapsConfig,
    DataConfig,
    DataFormat,
    DemoConfig,
    ExportConfig,
    InspectConfig,
    KeptTap,
    OnError,
    PlanConfig,
    PrepareConfig,
    ShardWorkers,
    VerifyConfig,
    Workers,
)
from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.config.teacher import (
    OnlineConfig,
    ResidConfig,
    TapConfig,
    TapsConfig,
    TeacherConfig,
    TeacherMeshConfig,
    TopKConfig,
)
from distillcache.schemas.config.train import TrainConfig

__all__ = [
    "BenchConfig",
    "BuildConfig",
    "BuildOptions",
    "BuildSpec",
    "Config",
    "CopyConfig",
    "CopySpec",
    "CopyTapsConfig",
    "DataConfig",
    "DataFormat",
    "DemoConfig",
    "ExportConfig",
    "InspectConfig",
    "KeptTap",
    "OnError",
    "OnlineConfig",
    "PlanConfig",
    "Positive",
    "PrepareConfig",
    "ResidConfig",
    "ShardWorkers",
    "StorageConfig",
    "TapConfig",
    "TapsConfig",
    "TeacherConfig",
    "TeacherMeshConfig",
    "TopKConfig",
    "TrainConfig",
    "VerifyConfig",
    "Workers",
]

"""The program of each mode; no other module depends on a mode's name."""

from distillcache.trainer.step import blockwise, feature
from distillcache.trainer.step.blockwise_program import BlockwiseProgram
from distillcache.trainer.step.feature_program import FeatureProgram
from distillcache.trainer.step.program import StepProgram

MODES: dict[str, type[StepProgram]] = {blockwise.MODE: BlockwiseProgram, feature.MODE: FeatureProgram}

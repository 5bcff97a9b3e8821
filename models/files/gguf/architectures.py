"""All architectures that are read by way of a config.json."""

from distillcache.models.files.gguf.dense import DENSE
from distillcache.models.files.gguf.hybrids import HYBRIDS
from distillcache.models.files.gguf.mixtures import MIXTURES

TRANSLATIONS = DENSE | MIXTURES | HYBRIDS

"""Placement of one replica of the teacher: on a device, on the devices of this process, or on those of a whole job."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jax.sharding import Mesh

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.describe import describe_teacher
from distillcache.models.layers.kernels import chosen_kernel
from distillcache.models.mesh.recording import RecordingMesh
from distillcache.models.mesh.sharding import check_processes, make_mesh
from distillcache.schemas.config import BuildOptions, BuildSpec, TeacherMeshConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.manifest import TeacherPlan
from distillcache.schemas.runtime.peers import ALONE, Peers, has_peers, join_peers
from distillcache.schemas.runtime.signals import StopRequest, watch_for_stop
from distillcache.schemas.store.redaction import redacted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    """mesh: None for a single device. peers: the processes whose devices it is made of. stop: whether to."""

    mesh: Mesh | None
    peers: Peers
    stop: StopRequest

    def load(self, path: str, spec: BuildSpec) -> Decoder:
        """The teacher, on its devices."""
        if self.peers.first:
            log.info(f"reading the teacher: {redacted(path)}")
        decoder = load_pretrained(path, dtype=spec.dtype, mesh=self.mesh)
        return with_attention(decoder, chosen_kernel(spec.attention, decoder.config, str(decoder.dtype)))

    def describe_teacher(self, path: str, model: ModelConfig) -> TeacherPlan:
        """Return the plan's facts about the teacher. One process reads all weights for their digest."""
        said = self.peers.share("teacher", lambda: to_canonical(describe_teacher(path, model)))
        return from_canonical(TeacherPlan, said, "what the first process says of the teacher")


def is_job(options: BuildOptions) -> bool:
    """Return whether the build works in lockstep with other processes, as far as is known before they connect."""
    return options.replica == "job" and has_peers(options.coordinator)


@contextmanager
def open_replica(mesh: TeacherMeshConfig, batch_rows: int, options: BuildOptions) -> Iterator[Replica]:
    """The devices, after all processes have met that they belong to; SIGTERM and SIGINT are watched.

    Raises:
        ConfigError: the mesh, the devices, the processes and `batch_rows` do not fit together.
        PeerError: a process does not come, fails or dies.
    """
    if options.replica == "process":
        with watch_for_stop() as stop:
            yield Replica(_mesh(mesh, batch_rows), ALONE, stop)
        return
    given = options.num_processes > 1 or options.process_id > 0
    numbers = (options.num_processes, options.process_id) if given else (None, None)
    with (
        join_peers(options.coordinator, *numbers, options.timeout_s) as peers,
        watch_for_stop(together=peers.count > 1) as stop,
    ):
        yield Replica(_mesh(mesh, batch_rows, peers.count), peers, stop)


def _mesh(config: TeacherMeshConfig, batch_rows: int, processes: int = 1) -> Mesh | None:
    mesh = make_mesh(config)
    if processes > 1:
        check_processes(mesh, config)
    if mesh is None:
        return None
    cuts = RecordingMesh.of(mesh, batch_rows, 1).row_cuts
    if cuts % processes:
        raise ConfigError(
            "a teacher call cannot give whole rows to every process",
            {"batch_rows": batch_rows, "processes": processes, "mesh": _sizes(config)},
            f"make batch_rows a multiple of {mesh.size}, the devices of the mesh",
        )
    if processes > 1 and mesh.size % processes:
        raise ConfigError(
            "the mesh does not use the same number of devices from every process",
            {"mesh": _sizes(config), "processes": processes},
            "let the mesh use all devices",
        )
    return mesh


def _sizes(config: TeacherMeshConfig) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in config.model_dump().items())

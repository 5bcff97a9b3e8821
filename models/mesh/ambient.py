"""The mesh around a computation while it is traced: which of its axes shard what.

Code that works on a device's own rows, heads or experts (models/layers/experts.py, models/layers/kernels.py) finds them
here, so that decoders need no mesh of their own.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType

ROW_AXES = ("data", "fsdp")  # the mesh axes over which a batch's rows are cut
EXPERT_AXIS, TENSOR_AXIS = "expert", "tensor"


def splitting_axes(names: Sequence[str]) -> dict[str, int]:
    """Return the given axes of the ambient mesh that split something here, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        axis: size
        for axis, size in dict(mesh.shape).items()
        if size > 1 and axis in names and kinds[axis] != AxisType.Manual
    }

"""Students made from teachers. An operation is a value; operations run in order.

operate.py  applies operations to a decoder
sizes.py    the config that an operation results in, and reasons to refuse it
choose.py   which heads, neurons, experts or dimensions stay
parts.py    takes a decoder apart by block, and the axes of its parameters
upcycle.py  a dense MLP to experts

`operate` does all of it; `apply_surgery` is the same for who wants the decoder alone.

What an operation does not name stays as it was, bit for bit.
"""

from distillcache.models.surgery.operate import Operated, add_router_bias, apply_surgery, operate
from distillcache.models.surgery.parts import Scores
from distillcache.models.surgery.sizes import changed_config

__all__ = ["Operated", "Scores", "add_router_bias", "apply_surgery", "changed_config", "operate"]

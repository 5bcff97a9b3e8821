"""Students made out of teachers: an operation is a value, so a config lists several; they are done in order.

`operate` does all of it; `apply_surgery` is the same for who wants the decoder alone.

parts.py    a decoder taken apart, block by block, and put together again; which axis of a parameter is what
sizes.py    what an operation makes of a config, and every reason to refuse it
choose.py   which heads, neurons, experts or numbers of the stream stay
upcycle.py  a dense MLP becomes experts
operate.py  the operations

What an operation does not name stays as it was, bit for bit.
"""

from models.surgery.operate import Operated, add_router_bias, apply_surgery, operate
from models.surgery.parts import Scores
from models.surgery.sizes import changed_config

__all__ = ["Operated", "Scores", "add_router_bias", "apply_surgery", "changed_config", "operate"]

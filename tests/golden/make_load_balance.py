"""Golden values of transformers' load-balancing loss and its gradient, for tests/models/test_routing.py.

python tests/golden/make_load_balance.py
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

BLOCKS, ROWS, TOKENS, EXPERTS = 3, 2, 5, 6
LENGTHS = (5, 3)  # of the rows, without their padding


def case(logits: np.ndarray, mask: np.ndarray | None, top_k: int) -> dict[str, object]:
    leaves = [torch.tensor(block.reshape(-1, EXPERTS), requires_grad=True) for block in logits]
    loss = load_balancing_loss_func(tuple(leaves), EXPERTS, top_k, None if mask is None else torch.tensor(mask))
    loss.backward()
    gradient = np.stack([leaf.grad.numpy() for leaf in leaves]).reshape(logits.shape)
    return {
        "top_k": top_k,
        "masked": mask is not None,
        "loss": loss.item(),
        "gradient": np.float64(gradient).round(9).tolist(),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(BLOCKS, ROWS, TOKENS, EXPERTS)).round(3).astype(np.float32)
    mask = (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.int64)
    found = {
        "transformers": transformers.__version__,
        "logits": np.float64(logits).round(3).tolist(),
        "mask": mask.tolist(),
        "cases": [case(logits, given, top_k) for top_k in (1, 2, 4) for given in (None, mask)],
    }
    (Path(__file__).parent / "load_balance.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

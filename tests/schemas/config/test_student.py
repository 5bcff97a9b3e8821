"""An operation takes its own fields and no others, and operations do not contradict each other."""

from typing import Any

import pytest
from pydantic import ValidationError

from distillcache.schemas.config.student import StudentConfig, SurgeryOp


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"op": "query_heads"}, "needs to"),
        ({"op": "drop_blocks"}, "needs blocks"),
        ({"op": "upcycle", "top_k": 2}, "needs experts"),
        ({"op": "experts", "experts": 4}, "not experts"),
        ({"op": "mlp_width", "to": 4, "noise": 0.1}, "takes to, by, not noise"),
        ({"op": "drop_blocks", "blocks": [1], "by": "importance"}, "takes blocks, not by"),
        ({"op": "upcycle", "experts": 4, "to": 4}, "not to"),
        ({"op": "upcycle", "experts": 4, "how": "partition", "noise": 0.1}, "noise is for how: copy"),
        ({"op": "upcycle", "experts": 4, "by": "importance"}, "by is for how: partition"),
    ],
    ids=str,
)
def test_fields_of_another_operation_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        SurgeryOp.model_validate(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"surgery": [{"op": "kv_heads", "to": 2}, {"op": "kv_heads", "to": 1}]}, "names kv_heads twice"),
        ({"init": "random", "surgery": [{"op": "kv_heads", "to": 2, "by": "weight_norm"}]}, "no weights to choose by"),
        ({"init": "path", "surgery": [{"op": "kv_heads", "to": 2, "by": "importance"}]}, "importance is the teacher's"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        StudentConfig.model_validate(values)


def test_what_is_not_set_is_not_written_down():
    """Runs from before an operation had more fields than `to` and `by` go on."""
    op = SurgeryOp(op="query_heads", to=2)
    assert op.model_dump() == {"op": "query_heads", "to": 2}
    assert op.spelled == "{op: query_heads, to: 2}"
    assert SurgeryOp(op="upcycle", experts=4).spelled == "{op: upcycle, experts: 4}"
    assert SurgeryOp(op="mlp_width", to=4, by="index").spelled == "{op: mlp_width, to: 4, by: index}"
    assert "importance_rows" not in StudentConfig().model_dump()

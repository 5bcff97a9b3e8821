"""Differences of nested values, told field by field."""

from distillcache.schemas.config.differences import MAX_TOLD, differing, told


def test_only_what_differs_is_told_whatever_the_order_of_keys() -> None:
    there = {"data": {"row_tokens": 16, "eval_rows": 4}, "taps": [{"name": "resid", "codec": "int8"}]}
    here = {"taps": [{"codec": "bf16", "name": "resid"}], "data": {"eval_rows": 4, "row_tokens": 8}}
    assert differing(there, here) == {"data.row_tokens": (16, 8), "taps.resid.codec": ("int8", "bf16")}
    assert told(differing(there, here))["data.row_tokens"] == "there 16, here 8"
    assert differing(there, there) == told({}) == {}


def test_what_is_on_one_side_alone_differs_from_null() -> None:
    there = {"taps": [{"name": "a"}], "blocks": [1, 2], "mesh": {}}
    here = {"taps": [{"name": "a"}, {"name": "b"}], "blocks": [1, 3], "mesh": None}
    found = differing(there, here)
    assert found == {"taps.b": (None, {"name": "b"}), "blocks.1": (2, 3), "mesh": ({}, None)}
    assert told(found)["blocks.1"] == "there 2, here 3"
    assert differing([], [{"name": "a"}], "taps") == {"taps.a": (None, {"name": "a"})}
    assert differing([1], [1, 2], "blocks") == {"blocks.1": (None, 2)}


def test_causes_come_before_what_follows_and_a_message_stays_short() -> None:
    found = {f"taps.{number}": (0, 1) for number in range(MAX_TOLD)} | {
        "rows.row_tokens": (16, 8),
        "teacher.x": ("a", None),
    }
    facts = told(found)
    assert list(facts)[:2] == ["rows.row_tokens", "teacher.x"]
    assert facts["teacher.x"] == 'there "a", here null'
    assert facts["also"] == "2 more"
    assert len(facts) == MAX_TOLD + 1


def test_of_lists_only_the_differing_entries_are_named() -> None:
    there = {"stages": [{"steps": 3, "loss": None}, {"steps": 2, "loss": {"alpha": 0.0}}], "blocks": [1]}
    here = {"stages": [{"steps": 3, "loss": None}, {"steps": 4, "loss": {"alpha": 0.5}}], "blocks": [1, 2]}
    assert told(differing(there, here)) == {
        "stages.1.steps": "there 2, here 4",
        "stages.1.loss.alpha": "there 0.0, here 0.5",
        "blocks.1": "there null, here 2",
    }
    assert len(told(differing({"stages": None}, {"stages": here["stages"] * 9}))["stages"]) < 120

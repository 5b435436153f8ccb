"""Fields in which configs differ: parts of other kinds, lists of other lengths, equal changes of several layers."""

from moezoo.core.config.differences import MISSING, differing_fields, merged_over_layers, value_text


def test_parts_of_another_kind_are_compared_field_by_field_kind_first():
    one = {"rate": 1, "schedule": {"warmup": 3, "kind": "cosine"}}
    other = {"rate": 1, "schedule": {"kind": "constant"}}
    assert list(differing_fields([one, other])) == [
        ("schedule.kind", ("cosine", "constant")),
        ("schedule.warmup", (3, MISSING)),
    ]


def test_lists_of_parts_of_other_lengths_are_compared_item_by_item():
    dumps = [{"losses": [{"kind": "z"}]}, {"losses": []}, {"losses": [{"kind": "z"}, {"kind": "y"}]}]
    assert list(differing_fields(dumps)) == [
        ("losses[0]", ({"kind": "z"}, MISSING, {"kind": "z"})),
        ("losses[1]", (MISSING, MISSING, {"kind": "y"})),
    ]


def test_a_list_of_values_is_one_field():
    assert list(differing_fields([{"only": ["router"]}, {"only": ["router", "norms"]}])) == [
        ("only", (["router"], ["router", "norms"]))
    ]


def test_equal_configs_do_not_differ():
    assert list(differing_fields([{"a": [1, {"b": None}]}] * 3)) == []


def test_equal_differences_of_several_layers_are_merged():
    found = [
        ("layers[0].moe.losses[1].coefficient", (1, 2)),
        ("layers[1].moe.losses[1].coefficient", (1, 3)),
        ("layers[2].moe.losses[1].coefficient", (1, 2)),
        ("seed", (0, 1)),
    ]
    assert merged_over_layers(found) == [
        ("layers[0,2].moe.losses[1].coefficient", (1, 2)),
        ("layers[1].moe.losses[1].coefficient", (1, 3)),
        ("seed", (0, 1)),
    ]


def test_values_are_written_as_in_a_config_and_cut():
    assert [value_text(value) for value in (None, True, 3e-4, "a b", MISSING)] == [
        "null",
        "true",
        "0.0003",
        "a b",
        MISSING,
    ]
    assert value_text({"kind": "cosine", "warmup_steps": 3}, 20) == "{kind: cosine, warm…"

"""On 8 simulated devices: as on one, in losses, every gradient and three steps; and what travels between them."""

import json

import pytest

from tests.mesh.simulated import run_simulated
from tests.support.source_tree import PACKAGE
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, FLOAT32_TRAINING

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"data": 4, "tensor": 2},
    {"data": 4, "expert": 2},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 4, "tensor": 2},
    {"expert": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "expert": 4, "exchange": "allgather"},
    {"expert": 4, "tensor": 2, "exchange": "allgather"},
    {"data": 8, "rules": {"expert": "data"}},
    {"fsdp": 2, "expert": 4, "rematerialize": "block"},
    {"data": 2, "expert": 4, "exchange": "allgather", "rematerialize": "experts"},
    {"fsdp": 2, "expert": 2, "tensor": 2, "rematerialize": "experts"},
    {"fsdp": 2, "expert": 4, "layers": "scanned"},
    {"data": 2, "fsdp": 2, "tensor": 2, "layers": "scanned", "rematerialize": "block"},
    {"fsdp": 2, "expert": 2, "tensor": 2, "layers": "scanned", "rematerialize": "experts"},
]
MIXED = [MESHES[10], MESHES[11]]
GROUPED = [
    {"data": 8},
    {"data": 4, "expert": 2},
    {"fsdp": 2, "expert": 4},
    {"expert": 8},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 4, "tensor": 2},  # two sequences on each device
    {"data": 2, "expert": 4, "exchange": "allgather"},
    {"data": 8, "rules": {"expert": "data"}},
]


def on_devices(*words: str) -> dict:
    return json.loads(run_simulated("on_devices.py", *words).splitlines()[-1])


def check(found: dict) -> None:
    for mesh, apart in found.items():
        assert apart["losses"] <= FLOAT32.relative, (mesh, apart)
        assert apart["gradients"] <= FLOAT32_GRADIENT.relative, (mesh, apart)
        assert apart["scores"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["steps"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["parameters"] <= 5 * FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["state"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["loads"], mesh


def test_every_mesh_is_as_one_device():
    found = on_devices("equal", "configs/tiny/top_k.yaml", *map(json.dumps, MESHES))
    assert len(found) == len(MESHES)
    check(found)


@pytest.mark.parametrize(
    "name",
    [
        "shared_gated",  # shared experts with a gate
        "capacity",  # who is dropped is decided over the whole batch
        "expert_choice",  # experts choose from the whole batch
        "zero_computation_dropless",
        "gating_residual",
        "latent_experts",
        "softmax_with_bias",  # the bias moves by the whole batch's load
        "global_balance",
        "importance_load",
        "weight_on_input",
        "clamped_swiglu",  # biases of experts
        "latent_attention",
        "gated_delta",
        "dropout",
        "noisy_top_k",
    ],
)
def test_every_part_is_as_on_one_device(name):
    check(on_devices("equal", f"configs/tiny/{name}.yaml", *map(json.dumps, MIXED)))


def test_a_capacity_of_each_sequence_is_as_on_one_device():
    """Experts on 1, 2, 4 and 8 devices."""
    found = on_devices("equal", "configs/tiny/capacity_groups.yaml", *map(json.dumps, GROUPED))
    assert len(found) == len(GROUPED)
    check(found)


@pytest.mark.parametrize(
    ("name", "given", "dispatch"),
    [
        # An empty place gives what the biases are, and no combine weight takes it away.
        ("clamped_swiglu", "renormalize: none}", "renormalize: none, apply_to: input}\n        dispatch: "),
        ("zero_computation", "dispatch: {kind: capacity, factor: 1.1}", "dispatch: "),
    ],
)
def test_a_capacity_of_each_sequence_goes_with_every_kind_of_expert(tmp_path, name, given, dispatch):
    text = (PACKAGE.parent / "configs" / "tiny" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.count(given) == 1
    path = tmp_path / f"{name}.yaml"
    replaced = f"{dispatch}{{kind: capacity, factor: 0.8, priority: score, group: sequence}}"
    path.write_text(text.replace(given, replaced), encoding="utf-8")
    check(on_devices("equal", str(path), *map(json.dumps, MIXED)))


def test_a_capacity_of_each_sequence_bounds_what_travels():
    """2 sequences of T = 16 on each of 4 devices, E = 8, K = 2, D = 32: C = ceil(0.6 * 2 * 16 / 8) = 3."""
    mesh = '{"expert": 4, "tensor": 2}'
    of_sequence, of_batch = (
        {
            shape: count
            for shape, count in on_devices("collectives", f"configs/tiny/{name}.yaml", mesh).items()
            if "all-to-all" in shape
        }
        for name in ("capacity_groups", "capacity")
    )
    # In each of 2 layers there and back, and the gradients too. Where a row belongs is known without a count.
    assert of_sequence == {"all-to-all f32[2,6,32]": 8}
    assert of_batch == {"all-to-all f32[1,64,32]": 8, "all-to-all s32[1,2]": 2}


def test_who_is_dropped_is_decided_where_the_sequence_is():
    found = on_devices("collectives", "configs/tiny/capacity_groups.yaml", '{"data": 8}')
    assert {name.split()[0] for name in found} == {"all-reduce"}


def test_tokens_travel_to_experts_and_experts_stay():
    found = on_devices("collectives", "configs/tiny/top_k.yaml", '{"data": 2, "expert": 4}')
    kinds = {name.split()[0] for name in found}
    assert kinds == {"all-to-all", "all-reduce"}  # nothing is gathered, neither an expert's matrix nor a probability
    rows = {name: count for name, count in found.items() if name.startswith("all-to-all f32")}
    assert rows, found


def test_experts_are_computed_again_with_their_exchange():
    """Tokens travel there and back, and so do gradients; then tokens once more, for the way back."""
    mesh = {"data": 2, "expert": 4}
    plain, again = (
        sum(
            count
            for name, count in on_devices("collectives", "configs/tiny/top_k.yaml", json.dumps(given)).items()
            if name.startswith("all-to-all f32")
        )
        for given in (mesh, {**mesh, "rematerialize": "experts"})
    )
    assert plain < again <= 1.5 * plain, (plain, again)


def test_a_scan_puts_the_parameters_of_one_layer_together_at_a_time():
    mesh = {"fsdp": 8, "layers": "scanned", "rematerialize": "experts"}
    found = on_devices("collectives", "configs/tiny/top_k.yaml", json.dumps(mesh))
    gathers = {name for name in found if "all-gather" in name}
    # Outside the loop the embedding and the head alone; inside no array of both layers, [2, 32, 4, 8] and the like.
    assert {name for name in gathers if not name.startswith("loop")} == {
        "all-gather f32[64,32]",
        "all-gather f32[32,64]",
    }
    shapes = {tuple(map(int, name.partition("[")[2][:-1].split(","))) for name in gathers if name.startswith("loop")}
    assert {(8, 32, 24), (8, 24, 32), (32, 4, 8), (32, 2, 8), (4, 8, 32)} <= shapes
    assert all(shape[0] == 1 or len(shape) == 3 for shape in shapes), shapes


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("top_k", MESHES[5]),
        ("top_k", {**MESHES[10], "layers": "scanned", "rematerialize": "experts"}),
        ("capacity_groups", MESHES[5]),
    ],
)
def test_a_model_answers_where_it_was_trained(name, mesh):
    """Intermediates, gradients with forced experts, inference, a cache, generated tokens; 3 sequences too, unshared."""
    found = on_devices("answers", f"configs/tiny/{name}.yaml", json.dumps(mesh))
    assert {"layers.1.moe.router.logits of 8", "layers.1.moe.experts.w_up of 3", "decode of 3"} <= found["apart"].keys()
    far = {name: apart for name, apart in found["apart"].items() if apart > FLOAT32_TRAINING.relative}
    assert not far
    assert found["tokens"]


def test_sequences_that_cannot_be_shared_equally_are_scored_where_the_experts_are():
    """Of 3 sequences on 8 devices tokens travel, as in a step, and no expert is put together."""
    found = on_devices("of_score", "configs/tiny/top_k.yaml", '{"data": 2, "expert": 4}')
    assert {name.split()[0] for name in found} == {"all-to-all", "all-reduce"}


@pytest.mark.parametrize("options", [{}, {"layers": "scanned"}, {"rematerialize": "experts"}])
def test_a_step_writes_parameters_and_moments_where_they_were(options):
    """On a mesh too, each device's parts of them; beside them it gives numbers alone."""
    found = on_devices("donated", "configs/tiny/top_k.yaml", json.dumps({"fsdp": 2, "expert": 4, **options}))
    assert found["kept"] == found["arrays"] > 30
    assert found["kept_bytes"] == found["bytes"]
    assert found["other_results"] < 0.02 * found["bytes"]


def test_fsdp_puts_each_parameter_together_twice():
    """On the way forward and again on the way back; it is not kept."""
    found = on_devices("collectives", "configs/tiny/top_k.yaml", '{"fsdp": 8}')
    assert "all-to-all" not in {name.split()[0] for name in found}
    gathered = {
        name: count
        for name, count in found.items()
        if name.startswith("all-gather") and "[64," not in name and ",64]" not in name  # embedding and head: once
    }
    assert gathered, found
    assert all(count % 2 == 0 for count in gathered.values()), gathered

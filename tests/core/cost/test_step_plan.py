"""Plans by formula: worked by hand on a small model, and what is refused. tests/mesh holds them against XLA."""

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.config.run_config import load_config
from moezoo.core.cost.memory import training_memory
from moezoo.core.cost.step_plan import Collective, device_plan, memory_per_device, smaller, with_same_sequences
from moezoo.core.distributed.mesh import MESH_AXES, MeshConfig
from moezoo.core.errors import SpecError
from moezoo.core.reports.text import memory_bytes

CONFIG = "configs/tiny/top_k.yaml"
SET = (
    "model.vocab_size=64",
    "training.batch_size=8",
    "training.sequence_length=16",
    "model.layers[0].moe.num_experts=8",
)
LARGE = "configs/large/deepseek_v3.yaml"


def config_on(*overrides: str, **mesh: object):
    config = load_config(CONFIG, [*SET, *overrides]).model_copy(update={"mesh": MeshConfig(**mesh)})
    return config, {axis: getattr(config.mesh, axis) for axis in MESH_AXES}


def payloads(*overrides: str, **mesh: object) -> dict[str, tuple[int, int]]:
    found = device_plan(*config_on(*overrides, **mesh)).collectives
    return {f"{own.purpose}, {own.kind}, {' '.join(own.axes)}": (own.count, own.payload) for own in found}


def run(*words: str):
    return CliRunner().invoke(main, ["plan", *words])


# D = 32, E = 8, K = 2, F = 24, V = 64, L = 2, N = 4, M = 2, H = 8; 128 tokens a step
ATTENTION = 32 * 8 * (4 + 2 + 2 + 4)
EXPERTS = 3 * 8 * 32 * 24
SHARED_BY_ALL = 2 * 64 * 32 + 2 * (ATTENTION + 2 * 32 + 32 * 8) + 32  # two embeddings, norms, routers


def test_one_device_sends_nothing() -> None:
    plan = device_plan(*config_on())
    assert plan.collectives == ()
    assert plan.sent == 0


def test_data_sends_gradients_alone() -> None:
    found = payloads(data=4)
    assert {name.split(",")[0] for name in found} == {"gradients", "loads and losses"}
    arrays, size = found["gradients, all-reduce, data"]
    assert arrays == 23
    assert size == 4 * (SHARED_BY_ALL + 2 * EXPERTS)


def test_experts_stay_and_tokens_travel() -> None:
    found = payloads(data=2, expert=4)
    rows = 16 * 2  # p = 16 tokens a device, min(K, E / n) = 2
    assert found["tokens to experts and back, all-to-all, expert"] == (2 * 4, 2 * 4 * 4 * (4 * rows * 32))
    assert found["rows of each expert, all-to-all, expert"] == (2, 2 * 4 * 8)
    assert found["gradients, all-reduce, data"] == (2 * 3, 4 * 2 * EXPERTS // 4)
    assert found["gradients, all-reduce, data expert"][1] == 4 * SHARED_BY_ALL
    assert not any("all-gather" in name for name in found)


def test_ragged_sends_what_there_is() -> None:
    found = payloads(data=2, expert=4, exchange="ragged")
    assert found["tokens to experts and back, ragged-all-to-all, expert"] == (2 * 4, 2 * 4 * 4 * (16 * 2 * 32))


def test_fsdp_puts_blocks_together_twice_and_embeddings_once() -> None:
    arrays, size = payloads(fsdp=8)["parameters, all-gather, fsdp"]
    assert arrays == 2 * 2 * (4 + 3) + 2
    assert size == 4 * (2 * 2 * (ATTENTION + EXPERTS) + 2 * 64 * 32)


def test_tensor_sums_what_blocks_give() -> None:
    found = payloads(tensor=2)
    row = 4 * 128 * 32  # p D numbers
    assert found["parts of blocks, forward, all-reduce, tensor"] == (2, 2 * row)
    assert found["parts of blocks, backward, all-reduce, tensor"] == (2 * 3, 2 * 3 * row)
    assert found["parts of experts, forward, all-reduce, tensor"] == (2, 2 * row)
    assert found["parts of experts, backward, all-reduce, tensor"] == (2 * 3, 2 * (2 * row + 4 * 128 * 2))


def test_a_micro_batch_sends_as_much_as_a_step_of_its_size() -> None:
    once = payloads(fsdp=2, expert=4)
    twice = payloads("training.batch_size=16", "training.gradient_accumulation=2", fsdp=2, expert=4)
    assert twice == {name: (2 * arrays, 2 * size) for name, (arrays, size) in once.items()}


def test_one_device_has_what_training_memory_says() -> None:
    for how, parts in itertools.product(("none", "experts", "block"), (1, 2)):
        config, lengths = config_on(f"training.rematerialize={how}", f"training.gradient_accumulation={parts}")
        memory, expected = memory_per_device(config, lengths), training_memory(config)
        assert memory["put together"] == memory["exchange"] == memory["state"] == 0
        assert {name: memory[name] for name in expected} == expected


def test_a_mesh_shares_memory() -> None:
    alone = memory_per_device(*config_on())
    data, fsdp, tensor = (memory_per_device(*config_on(**mesh)) for mesh in ({"data": 8}, {"fsdp": 8}, {"tensor": 2}))
    assert data["moments"] == alone["moments"]
    assert data["activations"] == alone["activations"] // 8
    small = 4 * (SHARED_BY_ALL - 2 * 64 * 32 - 2 * ATTENTION)
    assert fsdp["parameters"] == (alone["parameters"] - small) // 8 + small
    assert fsdp["put together"] == 2 * 4 * (EXPERTS + 2 * 64 * 32) * 7 // 8
    assert tensor["activations"] < alone["activations"]
    assert tensor["logits"] == alone["logits"]


def test_rows_that_could_arrive_have_room() -> None:
    """From each of 4 devices two rows a token, which has two experts; without the exchange it is these two alone."""
    at_home, padded = (memory_per_device(*config_on(**mesh))["activations"] for mesh in ({"data": 4}, {"expert": 4}))
    row = 4 * (4 * 24 + 2 * 32)
    layers, tokens = 2, 32
    assert padded - at_home == layers * tokens * row * (4 * 2 - 2)


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-to-all", 750), ("all-gather", 750), ("all-reduce", 1500), ("reduce-scatter", 750)]
)
def test_a_device_sends_all_but_its_own_part(kind, sent) -> None:
    assert Collective(kind, ("data",), 4, 1, 1000).sent == sent


def test_a_smaller_mesh_has_the_same_axes_and_sequences() -> None:
    lengths = {"data": 1, "fsdp": 9, "expert": 64, "tensor": 5}
    small = smaller(lengths)
    assert small == {"data": 1, "fsdp": 3, "expert": 2, "tensor": 5}
    config, _ = config_on("training.batch_size=1152")
    other = with_same_sequences(config, lengths, small)
    assert other.training.batch_size == 1152 // (9 * 64) * 6
    assert other.mesh == MeshConfig(fsdp=3, expert=2, tensor=5)


def test_what_does_not_fit_together_is_refused_before_anything_is_compiled() -> None:
    for words, problem in (
        (
            ("--mesh", "expert=3", "--set", "training.batch_size=24"),
            "has 8 along expert, which mesh.rules.expert = expert would cut into 3",
        ),
        (("--mesh", "data=16"), "has 8 sequences, which data 16 of the mesh would share in 16 equal parts"),
        (("--mesh", "data=auto"), "Add --devices N."),
        (("--mesh", "data=2", "--memory", "much"), "--memory is 'much'; expected a number and a unit"),
        (("--mesh", "data=2", "--topology", "v5e:16x16"), "needs libtpu, which compiles for TPUs that are not there"),
    ):
        result = run(CONFIG, *(word for each in SET for word in ("--set", each)), *words)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert problem in line


def test_sizes_of_memory_have_a_unit() -> None:
    assert memory_bytes("80GiB") == 80 * 2**30
    assert memory_bytes("1.5 GB") == 1_500_000_000
    with pytest.raises(SpecError, match=r"--memory is '80'; expected a number and a unit, one of MiB"):
        memory_bytes("80")


def test_thousands_of_devices_by_formula() -> None:
    words = (
        "--mesh",
        "data=2,fsdp=32,expert=64",
        "--formula",
        "--memory",
        "80GiB",
        "--set",
        "training.batch_size=16384",
    )
    words += ("--set", "training.gradient_accumulation=4")
    result = run(LARGE, *words, "--json")
    assert result.exit_code == 0, result.output
    known = json.loads(result.stdout)
    assert known["devices"] == 4096
    assert known["extrapolated"]
    assert known["compiled"] is None
    assert known["sent_bytes"] == sum(own["sent_bytes"] for own in known["collectives"])
    assert known["memory_bytes"]["total"] == sum(
        size for name, size in known["memory_bytes"].items() if name != "total"
    )
    assert known["fits"] == (known["memory_bytes"]["total"] <= 80 * 2**30)
    page = run(LARGE, *words)
    assert page.exit_code == 0, page.output
    assert "on data 2, fsdp 32, expert 64: 4,096 devices, each with 1 sequence of 4,096 tokens at once, 4 times" in (
        page.stdout
    )
    assert ("fits into" if known["fits"] else "does not fit into") + " 80.0 GiB" in page.stdout
    assert "all by formula; nothing was compiled" in page.stdout


def test_the_large_config_has_the_published_number_of_parameters() -> None:
    """671 B, 37 B active: arXiv 2412.19437, section 4.2."""
    result = CliRunner().invoke(main, ["describe", LARGE, "--json"])
    counts = json.loads(result.stdout)["parameters"]
    assert counts["total"] == pytest.approx(671e9, rel=1e-3)
    assert counts["active"] == pytest.approx(37e9, rel=0.02)
    assert Path(LARGE).exists()

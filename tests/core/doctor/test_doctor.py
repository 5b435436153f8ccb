"""The doctor: each planted fault is found by its check and no other, and healthy runs and checkpoints have none."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from moezoo import backends
from moezoo.cli.main import main
from moezoo.core.backend import Output
from moezoo.core.checkpoint.safetensors_file import StoredTensors, write_tensors
from moezoo.core.checkpoint.store import WEIGHTS
from moezoo.core.cost.available import Available
from moezoo.core.doctor import environment
from moezoo.core.doctor.environment import memory_findings
from moezoo.core.doctor.examine import examine
from moezoo.core.doctor.forward_pass import RANDOM, forward_findings
from moezoo.core.doctor.tensors import weight_findings
from moezoo.core.errors import BackendError, RunError
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight
from tests.support.fixtures import cases, write_checkpoint
from tests.support.made_run import EXPERTS, RECORDS, TOP_K, made_run
from tests.support.quantized import quantized_weights
from tests.support.small_run import write_config

BIASED = {"score": "sigmoid", "selection_bias": {"rate": 0.001}}
CHOSEN = {"choice": {"kind": "expert_choice"}, "renormalize": "none"}
W_ROUTER, W_UP = "layers.1.moe.router.w_router", "layers.0.moe.experts.w_up"


def _moe(raw):
    return raw["model"]["layers"][0]["moe"]


def _without_losses(raw):
    _moe(raw)["losses"] = []


HEALTHY = {
    "softmax": {},
    "biases": {"router": BIASED},
    "one expert, not divided": {"router": {"top_k": 1, "renormalize": "none"}},
    "expert choice": {
        "router": {"choice": {"kind": "expert_choice"}, "renormalize": "none"},
        "change": _without_losses,
    },
    "frozen routers keep their biases": {"router": BIASED, "only": ["experts"]},
    "frozen routers need no balance": {"only": ["experts"], "change": _without_losses},
}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_has_no_findings(tmp_path, case):
    run = made_run(**HEALTHY[case])
    if "only" in HEALTHY[case]:
        for row in run.layer() + run.layer(1):
            row["selection_bias"] = [0.0] * EXPERTS
        _uneven(run)  # a router that is not trained needs no balance term
    found = examine(run.write(tmp_path / "run"))
    assert found.findings == []
    assert (found.kind, found.step, found.skipped) == ("run", 400, {})
    assert found.done == ["config", "metrics", "files", "parameters", "gradients"]


def _dead(run):
    for row in run.layer():
        share = np.array(row["load"])
        share[3] = 0
        row["load"] = (share / share.sum()).round(6).tolist()


def _starving(run):
    for row in run.layer():
        share = np.array(row["load"])
        share[3] = 0.005
        row["load"] = (share / share.sum()).round(6).tolist()


def _collapsed(run):
    for row in run.layer(1)[20:]:
        row["load"] = [0.5, 0.0, 0.49, 0.0, 0.01, 0.0, 0.0, 0.0]


def _uneven(run):
    for row in run.layer():
        row["load"] = [0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]


def _strong(run):
    for line in run.lines:
        line["switch_balance_weighted"] = 1.5


def _weak(run):
    _uneven(run)
    for line in run.lines:
        line["switch_balance_weighted"] = 1e-9


def _still(run):
    for row in run.layer():
        row["selection_bias"] = [0.0] * EXPERTS


def _spike(run):
    run.lines[25]["cross_entropy"] += 2


def _diverges(run):
    for number, line in enumerate(run.lines[20:]):
        line["cross_entropy"] += 0.1 * number


def _nan_in_gradient(run):
    run.lines[30]["gradient_norm"] = None


def _nan_in_load(run):
    run.layer()[-1]["load"][2] = None


def _nan_in_weights(run):
    run.weights[W_UP][2, 1, 1] = np.inf


def _flat_router(run):
    run.weights[W_ROUTER][:] = run.weights[W_ROUTER][:, :1]


def _zero_expert(run):
    run.weights[W_UP][4] = 0


def _no_gradient(run):
    for name in run.optimizer:
        if name.endswith("layers.0.attention.w_query"):
            run.optimizer[name][:] = 0


def _no_gradient_of_an_expert(run):
    for name in run.optimizer:
        if ".layers.1.moe.experts." in f".{name}":
            run.optimizer[name][5] = 0


def _unmoved_without_moments(run):
    run.optimizer = {name: value for name, value in run.optimizer.items() if "final_norm" not in name}
    names = [name for name in run.weights if "final_norm" in name]
    assert names
    run.earlier = {name: value if name in names else value + 1 for name, value in run.weights.items()}


def _bfloat16(raw):
    raw["model"]["precision"] = {"compute": "bfloat16"}
    _moe(raw)["router"]["dtype"] = "compute"


def _off(raw):
    _moe(raw)["losses"][0]["coefficient"] = 0.0


FAULTS = {
    "dead expert": ({}, _dead, ("fault", "dead_expert", "layer 0, expert 3")),
    "starving expert": ({}, _starving, ("warning", "starving_expert", "layer 0, expert 3")),
    "collapsed layer": ({}, _collapsed, ("fault", "collapsed_layer", "layer 1, experts 0, 2")),
    "nothing balances": ({"change": _without_losses}, _uneven, ("warning", "no_balance", "layer 0")),
    "term of no weight": ({"change": _off}, None, ("warning", "balance_off", "layer 0")),
    "term too large": ({}, _strong, ("warning", "balance_scale", "coefficient 0.01")),
    "term too small": ({}, _weak, ("warning", "balance_scale", "coefficient 0.01")),
    "bias that stays": ({"router": BIASED}, _still, ("fault", "selection_bias_stuck", "layer 0")),
    "bias of rate 0": (
        {"router": {**BIASED, "selection_bias": {"rate": 0.0}}},
        None,
        ("fault", "selection_bias_stuck", "layer 0"),
    ),
    "bias too slow": (
        {"router": {**BIASED, "selection_bias": {"rate": 1e-6}}},
        None,
        ("warning", "selection_bias_rate", "layer 0, rate 1e-06"),
    ),
    "constant weights": ({"router": {"top_k": 1}}, None, ("fault", "constant_weights", "layers 0, 1")),
    "router in bfloat16": ({"change": _bfloat16}, None, ("warning", "router_precision", "layers 0, 1")),
    "loss spike": ({}, _spike, ("warning", "loss_spike", "step 260")),
    "divergence": ({}, _diverges, ("fault", "divergence", "from step")),
    "NaN in a metric": ({}, _nan_in_gradient, ("fault", "nonfinite_metric", "first at step 310")),
    "NaN in a load": ({}, _nan_in_load, ("fault", "nonfinite_metric", "first at step 400")),
    "infinity in a tensor": ({}, _nan_in_weights, ("fault", "nonfinite_tensor", W_UP)),
    "router without opinion": ({}, _flat_router, ("fault", "constant_weights", W_ROUTER)),
    "zero expert": ({}, _zero_expert, ("fault", "zero_expert", f"{W_UP}, experts [4]")),
    "parameter without gradient": ({}, _no_gradient, ("fault", "unused_parameters", "layers.0.attention.w_query")),
    "expert without gradient": ({}, _no_gradient_of_an_expert, ("fault", "dead_expert", "layer 1, experts 5")),
    "unmoved, no moments": ({}, _unmoved_without_moments, ("fault", "unused_parameters", "final_norm")),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(tmp_path, case):
    settings, spoil, (severity, check, where) = FAULTS[case]
    run = made_run(**settings)
    if spoil is not None:
        spoil(run)
    findings = examine(run.write(tmp_path / "run")).findings
    assert {(finding.severity, finding.check) for finding in findings} == {(severity, check)}
    assert findings[0].where.startswith(where)
    for finding in findings:
        assert "\n" not in finding.describe()
        assert all((finding.what, finding.why.endswith("."), finding.advice.endswith(".")))


def test_damaged_files_and_missing_parts_are_said(tmp_path):
    run = made_run()
    run.earlier = run.weights
    folder = run.write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40')
    newest = folder / "checkpoints" / "step_00000400" / WEIGHTS
    newest.write_bytes(newest.read_bytes()[:-4])
    found = examine(folder)
    assert [finding.check for finding in found.findings] == ["damaged_file", "damaged_file"]
    assert (found.step, "step_00000400" in found.findings[1].what) == (200, True)
    step = folder / "checkpoints" / "step_00000200"
    assert (examine(step).kind, examine(step, quick=True).skipped["parameters"]) == (
        "checkpoint",
        "left out by --quick",
    )

    bare = made_run()
    bare.lines = []
    folder = bare.write(tmp_path / "bare")
    (folder / "checkpoints").rename(folder / "gone")
    found = examine(folder)
    assert found.is_healthy
    assert found.skipped["parameters"] == "the run has no checkpoint"
    assert "no training records" in found.skipped["load and losses"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cross_entropy", "x", "cross_entropy is 'x' at step 10"),
        ("routing", [{"layer": 0, "load": [1e300] * EXPERTS}], r"a load of 1e\+300 in layer 0 at step 10"),
        ("step", 10**20, "such a step at step 100000000000000000000"),
        ("routing", [], "no routing of layer 0 at step 10"),
        ("routing", [{"layer": 0, "load": [1.0]}], r"load of layer 0 is \[1.0\] at step 10"),
        ("routing", [{"layer": 0, "load": [[]] * EXPERTS}], r"load is \[\] at step 10"),
    ],
)
def test_metrics_of_another_form_are_one_line(tmp_path, key, value, message):
    run = made_run()
    run.lines[0][key] = value
    with pytest.raises(RunError, match=message) as error:
        examine(run.write(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert len(run.lines) == RECORDS


GATE = ("deepseek_v2_lite", "gpt_oss", "mixtral", "llama4_text", "qwen3_next", "zaya")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in GATE else pytest.mark.release) for case in cases()]
)
def test_published_families_are_healthy(tmp_path, case):
    found = examine(write_checkpoint(case, tmp_path / "model"))
    assert found.findings == []
    assert found.skipped.keys() == {"metrics", "gradients"}


def test_faults_of_a_published_checkpoint_are_found(tmp_path):
    folder = write_checkpoint("mixtral", tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = {name: np.array(value) for name, value in StoredTensors(file).items()}
    router = next(name for name in tensors if name.endswith("gate.weight"))
    tensors[router][:] = tensors[router][:1]
    expert = next(name for name in tensors if ".experts.1." in name)
    tensors[expert].flat[0] = np.nan
    write_tensors(file, tensors, {"format": "pt"})
    checks = {finding.check: finding for finding in examine(folder).findings}
    assert set(checks) == {"constant_weights", "nonfinite_tensor"}
    assert examine(folder, quick=True).is_healthy


def test_a_router_in_few_bits_is_a_finding():
    run = made_run(lambda raw: raw["model"].update(embed_dim=32))
    for bits, checks in ((4, ["router_precision"]), (8, [])):
        coded = quantized_weights(run.weights, QuantizationFormat("affine", bits, 32))
        assert isinstance(coded[W_ROUTER], QuantizedWeight)
        assert [finding.check for finding in weight_findings(run.config.model, coded)] == checks


def test_a_backend_that_is_missing_is_a_finding(tmp_path, monkeypatch):
    def fail(name=None, **others):
        raise BackendError("backend jax is not installed")

    monkeypatch.setattr(backends, "load_backend", fail)
    done = CliRunner().invoke(main, ["doctor", str(made_run().write(tmp_path / "run")), "--json"])
    report = json.loads(done.stdout)
    assert (done.exit_code, report["findings"][0]["what"]) == (1, "backend jax is not installed")
    assert report["environment"]["backend"] == "none"


def test_a_model_larger_than_memory_is_a_finding(monkeypatch):
    monkeypatch.setattr(environment, "available_memory", lambda: Available(1 << 30, "free memory"))
    assert memory_findings(1 << 29) == []
    assert memory_findings(1 << 31)[0].what == "the parameters have 2.0 GiB, and 1.0 GiB are available"


class _Model:
    """A model whose routing a test makes up."""

    def __init__(self, weight, expert, logits=0.0):
        self.output = Output(
            np.full((1, 4, 5), logits),
            [LayerRouting(i, expert, weight, *[np.zeros(0)] * 3) for i in range(2)],
        )

    def forward(self, tokens):
        return self.output


def test_a_forward_pass_finds_constant_weights_idle_experts_and_nan():
    spec, tokens = made_run().config.model, np.zeros((1, 4), np.int32)
    generator = np.random.default_rng(0)
    expert = generator.integers(0, EXPERTS, (1, 1000, TOP_K))
    weight = generator.random(expert.shape)

    def checks(model, data="text"):
        return {finding.check for finding in forward_findings(spec, model, tokens, data)}

    assert checks(_Model(weight, expert)) == set()
    assert checks(_Model(np.full_like(weight, 0.5), expert)) == {"constant_weights"}
    assert checks(_Model(np.full_like(weight, np.nan), expert)) == set()  # the logits and tensors say so
    assert checks(_Model(weight, np.minimum(expert, 6))) == {"idle_expert"}
    assert checks(_Model(weight, np.minimum(expert, 6)), RANDOM) == set()
    assert checks(_Model(weight, expert, np.nan)) == {"nonfinite_logits"}


def test_the_command_says_what_where_why_and_ends_with_a_status(tmp_path):
    healthy = made_run().write(tmp_path / "healthy")
    sick = made_run(router={"top_k": 1}).write(tmp_path / "sick")
    done = CliRunner().invoke(main, ["doctor", str(healthy), "--backend", "mlx"])
    assert (done.exit_code, done.output.splitlines()[0].split(": ")[1]) == (0, "healthy; checked")
    done = CliRunner().invoke(main, ["doctor", str(sick), "--backend", "mlx", "--json"])
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["is_healthy"], report["findings"][0]["check"]) == (False, "constant_weights")
    assert {"machine", "memory", "versions", "numpy's BLAS", "backend", "device"} <= report["environment"].keys()
    done = CliRunner().invoke(main, ["doctor", str(sick), "--quick", "--backend", "mlx"])
    assert "  why: The cross-entropy has no gradient for such a router" in done.output
    assert "not checked: parameters: left out by --quick" in done.output
    assert CliRunner().invoke(main, ["doctor", str(tmp_path)]).exit_code == 1


@pytest.mark.release
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_trained_runs_are_healthy_also_in_a_forward_pass(tmp_path, backend):
    config = write_config(tmp_path, steps=60, log_every=5, checkpoint_every=20)
    run = str(tmp_path / "run")
    assert CliRunner().invoke(main, ["train", str(config), "--backend", backend, "--out", run]).exit_code == 0
    done = CliRunner().invoke(main, ["doctor", run, "--forward", "--backend", backend])
    assert done.exit_code == 0, done.output

"""Hostile and careless configs: one line with the place, in bounded time, and never the whole input."""

import os
import random
import string
from pathlib import Path

import pytest

from moezoo.core.config import yaml_file
from moezoo.core.config.run_config import dump_config, load_config, parse_config
from moezoo.core.config.validate import validate
from moezoo.core.config.yaml_file import parse_value
from moezoo.core.errors import SpecError
from moezoo.core.spec import LongRoPEScalingSpec
from tests.support.hostile import TOKENS, at_most, mutant

CONFIG = Path(__file__).parents[3] / "configs" / "tiny" / "top_k.yaml"
MUTANTS = int(os.environ.get("MOEZOO_MUTANTS", "50"))
LETTERS = string.ascii_lowercase[:9]


def nested(first, rest):
    """Return nine anchors, each of which has the one before nine times."""
    lines = [f"a: &a {first}"]
    for name, before in zip(LETTERS[1:], LETTERS, strict=False):
        lines.append(f"{name}: &{name} {rest.format(','.join([f'*{before}'] * 9))}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (nested("[x, x, x, x, x, x, x, x, x]", "[{}]"), r"more than 50000 values .* \(line 5, column 4\)"),
        (nested("{x: 1}", "{{<<: [{}]}}"), r"more than 50000 values"),
        ("a: &a [*a]", r"the alias \*a inside of what it stands for \(line 1, column 8\)"),
        ("a: &a {<<: *a}", "inside of what it stands for"),
        ("\n".join(["0: &x0 [x]", *(f"k{i}: &x{i} [*x{i - 1}]" for i in range(1, 99))]), "50 levels"),
        ("[" * 100_000, r"50 levels, .* \(line 1, column 51\)"),
        ("- " * 5_000 + "a", "50 levels"),
        ("{[1]: 2}", "a key that is not text but list"),
        ("{1: 2}", "a key that is not text but int"),
        ("{a: 1, b: 2, a: 3}", r"the duplicate key 'a' \(line 1, column 14\)"),
        ("0x_", "'0x_', which is not a number"),
        ("a: 12:30:45", r"'12:30:45', which is not a number of the form .* \(line 1, column 4\)"),
        ("1:30.5", "'1:30.5', which is not a number"),
        ("010", "'010', which is not a number"),
        ("-00", "'-00', which is not a number"),
        ("0b11", "'0b11', which is not a number"),
        ("-0x1f", "'-0x1f', which is not a number"),
        ("1_000", "'1_000', which is not a number"),
        ("1_0.5", "'1_0.5', which is not a number"),
        ("9" * 5_000, "a number of 5000 characters"),
        ("0x" + "f" * 30, "an integer of more than 64 bits, 0xf"),
        ("!!int a", "the tag tag:yaml.org,2002:int"),
        ("!!python/object:os.system x", "the tag tag:yaml.org,2002:python/object"),
        ('"\\U00110000"', "not in range"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("a\0b", r"the character '\\x00' \(line 1\)"),
        ("*" + "a" * 100_000, "found undefined alias 'aaa"),
        ("'", "found unexpected end of stream"),
    ],
)
def test_hostile_yaml_is_one_line_with_the_place(text, problem):
    with at_most(20), pytest.raises(SpecError, match=problem) as caught:
        parse_value(text, "c.yaml")
    assert str(caught.value).startswith("c.yaml is not valid YAML; got: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_values_are_counted_while_they_are_read(monkeypatch):
    monkeypatch.setattr(yaml_file, "_MAX_NODES", 500)
    assert len(parse_value("[" + "1," * 400 + "]", "c.yaml")) == 400
    with pytest.raises(SpecError, match=r"values or 50 levels.* \(line 1, column 1000\)"):
        parse_value("[" + "1," * 100_000, "c.yaml")  # it does not end, but that is not reached


def test_ordinary_yaml_is_read():
    text = (
        "{a: -10, b: 0x1f, c: 1.5e-3, d: [true, null, ~], e: 2020-01-31, f: 'x: y', g: &g {h: 1}, i: *g, j: {<<: *g}}"
    )
    assert parse_value(text, "c.yaml") == {
        **{"a": -10, "b": 31, "c": 0.0015, "d": [True, None, None], "e": "2020-01-31", "f": "x: y"},
        **{"g": {"h": 1}, "i": {"h": 1}, "j": {"h": 1}},
    }


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("3.0e-3", 3e-3), (".5", 0.5), ("2.", 2.0), ("+1.5E+2", 150.0), ("0", 0.0)]
)
def test_every_form_of_a_number_is_read_as_a_number(text, value):
    assert load_config(CONFIG, [f"optimizer.weight_decay={text}"]).optimizer.weight_decay == value


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.steps=true", "training.steps is True; expected a number, not true or false"),
        ("training.steps=on", "training.steps is True; expected"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate is True; expected"),
        ("optimizer.schedule={kind: constant, warmup_steps: true}", "schedule.warmup_steps is True; expected"),
        ("optimizer.clip_norm=false", "optimizer.clip_norm is False; expected"),
        ("mesh.data=true", "mesh.data is True; expected"),
        (
            "model.layers[0].moe.losses=[{kind: router_z, coefficient: true}]",
            r"losses\[0\].coefficient is True; expected",
        ),
    ],
)
def test_a_boolean_is_not_a_number(override, problem):
    with pytest.raises(SpecError, match=f"^[a-z0-9_.\\[\\]]*{problem}") as caught:
        load_config(CONFIG, [override])
    assert "\n" not in str(caught.value)


def test_a_list_of_numbers_has_no_boolean():
    raw = {"short_factors": [1.0, True], "long_factors": [1.0, 2.0], "original_length": 8}
    with pytest.raises(
        SpecError, match=r"^short_factors is \[1.0, True\]; expected a number, not true or false \(c.yaml\)"
    ):
        validate(LongRoPEScalingSpec, raw, "c.yaml")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.seed=2020-13-45", "training.seed is '2020-13-45'; input should be a valid integer"),
        ("training.seed=0b_", "the value of --set training.seed is not valid YAML; got: '0b_'"),
        ("training.seed=" + "x" * 100_000, r"training.seed is 'x{99}\.\.\.; input should be"),
        ("x" * 100_000 + "=1", "^x{80} is not a known key"),
        ("a." * 5_000 + "b=1", "is not of the form path=value"),
        ("model.layers[²]=1", "the config has no ² at this place"),
        ("model.layers[" + "9" * 5_000 + "]=1", "the config has no 9{80} at this place"),
        ("training[0]=1", "training.0 is not a known key"),
        ("training.batch_size=4611686018427387904", "training.batch_size is 4611686018427387904; input should be less"),
        ("model.layers[0].moe.num_experts=2147483648", "moe.num_experts is 2147483648; input should be less"),
        ("model.layers[0].repeat=1000000000", "model.layers are 1000000000 with repeats .* Use at most 2000"),
    ],
)
def test_a_hostile_override_is_one_line(override, problem):
    with at_most(5), pytest.raises(SpecError, match=problem) as caught:
        load_config(CONFIG, [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_config_with_thousands_of_problems_names_the_first_ones():
    with at_most(20), pytest.raises(SpecError) as caught:
        parse_config("\n".join(f"{'k' * 900}{i}: 1" for i in range(500)), "c.yaml")
    assert str(caught.value).count("\n") == 20
    assert "484 more problems (c.yaml)" in str(caught.value)
    assert len(str(caught.value)) < 10_000


def problem_of(text, overrides=()):
    """Return the error of parsing a config; None if it is valid. Any other exception fails the test."""
    with at_most(20):
        try:
            config = parse_config(text, "c.yaml", overrides)
        except SpecError as error:
            return str(error)
    assert parse_config(dump_config(config)) == config
    return None


def test_mutants_of_a_config_are_valid_or_one_error():
    """`MOEZOO_MUTANTS=20000` runs more than the gate does."""
    content, draw = CONFIG.read_bytes(), random.Random(23)
    problems = [problem_of(mutant(content, draw).decode("utf-8", "replace")) for _ in range(MUTANTS)]
    assert all(problem is None or len(problem) < 20_000 for problem in problems)
    assert len({problem for problem in problems if problem is not None}) > MUTANTS // 3


def test_mutants_of_an_override_are_valid_or_one_error():
    text, draw = CONFIG.read_text(), random.Random(24)
    values = [b"training.seed=7", b"model.layers[0].moe.router.top_k=2", b"data.sources[0]={kind: text, path: a.txt}"]
    tokens = [token.decode("utf-8", "surrogateescape") for token in TOKENS]
    problems = []
    for _ in range(MUTANTS):
        override = mutant(draw.choice(values), draw).decode("utf-8", "surrogateescape")  # as Python reads arguments
        problems.append(problem_of(text, [override, f"training.steps={draw.choice(tokens)}"]))
    assert all(problem is None or len(problem) < 20_000 for problem in problems)
    assert len({problem for problem in problems if problem is not None}) > MUTANTS // 3

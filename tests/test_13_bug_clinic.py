"""Notebook 13: which instrument sees which patient, on several seeds, and which repairs pass.

That the best Gaussian's line is the loss of its exact predictor, the notebook itself asserts; its
saved chart is compared with a new one by nbval.
"""

import ast
import contextlib
import io
import math
import re
import types

import pytest
import torch
from series import NOTEBOOKS, code_cells, prose, tagged

import ddpm_utils as d

PATH = NOTEBOOKS / "13_bug_clinic.ipynb"
INSTRUMENTS = ["vital signs", "network out", "loss by step", "wires", "round trips"]
WANTED = {"step_2", "step_3", "step_4", "loss_5", "load_7", "clock_8", "floats_9", "none_10",
          "patients"}  # of the cells that also draw pictures
CHART = {  # as the notebook's: the instruments that each patient lights
    "1 soft": "vital signs, network out", "2 grey": "vital signs, network out",
    "3 grey": "vital signs, network out", "4 grain": "network out",
    "5 loss 1.00": "vital signs, loss by step, wires", "6 snow": "vital signs, loss by step",
    "7 snow": "vital signs, loss by step, round trips", "8 slow": "wires",
    "9 pale": "vital signs, round trips", "10 one class": "vital signs, loss by step, wires"}


def run(source, space):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, PATH.name, "exec"), space)


def named(node):
    return getattr(node, "name", None) or getattr(getattr(node, "targets", [0])[0], "id", None)


def once(function, *parts):
    """function(program, ...), called once for all programs that agree in these parts."""
    known = {}

    def found(program, *rest, **options):
        key = (*(getattr(program, part) for part in parts), *rest, *options.items())
        if key not in known:
            known[key] = function(program, *rest, **options)
        return known[key]

    return found


@pytest.fixture(scope="module")
def clinic():
    """The program, the instruments and the patients, without the pictures; it trains only once."""
    module = types.ModuleType("clinic")
    for source in tagged(PATH, "setup", "needed"):
        run(source, vars(module))
    for cell in code_cells(PATH):
        for node in ast.parse(cell["source"]).body:
            if named(node) in WANTED:
                run(ast.unparse(node), vars(module))
    module.learn = once(module.learn, "schedule", "to_floats", "clock", "none", "loss")
    module.network_out = once(module.network_out, "step")
    return module


def lit(clinic, seed=0, **parts):
    """The names of the instruments that are lit by the healthy program with these parts."""
    found = clinic.examine(clinic.replace(clinic.healthy, **parts), seed)
    assert [*found] == INSTRUMENTS
    return ", ".join(name for name in found if found[name])


# ------------------------------------------------------------------ instruments

def test_instruments_have_at_most_ten_lines():
    nodes = {node.name: node for cell in code_cells(PATH) for node in ast.parse(cell["source"]).body
             if isinstance(node, ast.FunctionDef)}
    for name in (name.replace(" ", "_") for name in INSTRUMENTS):
        body = nodes[name].body
        assert ast.get_docstring(nodes[name])
        assert nodes[name].end_lineno - body[1].lineno + 1 <= 10, name


@pytest.mark.parametrize("tilde", [False, True])
def test_the_recursion_is_the_product_of_the_steps(clinic, tilde):
    """In float64, with each step written as x -> c + k x + noise, all steps multiplied out."""
    schedule, m, s = d.linear_schedule(20), 0.3, 0.2
    known = clinic.recursion(schedule, m, s, tilde)
    betas = schedule.betas.double().tolist()
    bars = [math.prod(1 - b for b in betas[1 : t + 1]) for t in range(21)]
    mean, variance = 0.0, 1.0
    for t in range(20, 0, -1):
        line = math.sqrt(1 - bars[t]) / (bars[t] * s**2 + 1 - bars[t])  # ε̂ = line · (x - √ᾱ m)
        k = (1 - betas[t] / math.sqrt(1 - bars[t]) * line) / math.sqrt(1 - betas[t])
        c = betas[t] / math.sqrt(1 - bars[t]) * line * math.sqrt(bars[t]) * m
        added = betas[t] * (1 - bars[t - 1]) / (1 - bars[t]) if tilde else betas[t] * (t > 1)
        mean, variance = c / math.sqrt(1 - betas[t]) + k * mean, k**2 * variance + added
        assert known[20 - t].tolist() == pytest.approx([mean, math.sqrt(variance)], rel=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lit_by_the_healthy_program(clinic, seed):
    assert lit(clinic, seed) == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CHART)
def test_each_patient_lights_what_the_chart_says(clinic, name, seed):
    assert lit(clinic, seed, **clinic.patients[name]) == CHART[name]
    assert [*clinic.patients] == [*CHART]


# ------------------------------------------------------------------ repairs

def test_each_repair_on_the_page_passes(clinic):
    """The code of the folded answers, each part under the name of the ill one that it replaces."""
    space = dict(vars(clinic))
    for text in prose(PATH):
        if "<summary>Cause and repair</summary>" in text:
            for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                run(source, space)
    for name, ill in clinic.patients.items():
        parts = {part: space[getattr(old, "__name__", "none_10")] for part, old in ill.items()}
        parts = space["repair_6"] if name == "6 snow" else parts
        assert parts != ill, f"no repair of {name} on the page"
        assert lit(clinic, **parts) == "", name


def test_other_right_repairs_pass(clinic):
    def with_beta_tilde(schedule, x, t, noise, z):
        steps = torch.full((len(x),), t)
        mean, variance = schedule.q_posterior(schedule.predict_x0(x, steps, noise), x, steps)
        return mean + variance[0].sqrt() * torch.randn_like(x)

    assert lit(clinic, step=with_beta_tilde) == ""
    assert lit(clinic, loss=lambda f, s, x0, t, noise: 2 * d.simple_loss(f, s, x0, t)) == ""
    assert lit(clinic, to_floats=lambda u8: (u8.float() - 127.5) / 127.5) == ""


def another_prefix(network, file):
    saved = torch.load(file, weights_only=True).items()
    network.load_state_dict({k.removeprefix("_orig_mod."): x for k, x in saved}, strict=False)


def half_redrawn(model, schedule, x0, t, noise):
    xt = schedule.q_sample(x0, t, noise)
    redrawn = (model(xt, t) - torch.randn_like(noise)).square().mean()
    return d.simple_loss(model, schedule, x0, t, noise) + redrawn


def test_wrong_repairs_do_not_pass(clinic):
    """A second bug, or only half of the repair."""
    step = clinic.step
    wrong = {
        "1: the root of the root": lambda s, x, t, e, z: step(s, x, t, e, z / s.betas[t] ** 0.25),
        "1: the mistake moved to ε": lambda s, x, t, e, z: step(s, x, t, e * s.betas[t].sqrt(), z),
        "2: clipped more widely": lambda s, x, t, e, z: step(s, x, t, e, z).clamp(-1.5, 1.5),
        "3: α without its root": lambda s, x, t, e, z: step(s, x, t, e, z) / s.alphas[t].sqrt(),
        "4: half of the noise": lambda s, x, t, e, z: step(s, x, t, e, z) + 0.05 * (t == 1),
        "4: no noise from t = 2 on": lambda s, x, t, e, z: step(s, x, t, e, z * (t > 2))}
    for name, bad in wrong.items():
        assert clinic.network_out(clinic.replace(clinic.healthy, step=bad)), name
    for parts in (
            {"loss": half_redrawn}, {"loss": d.v_loss, "as_noise": lambda n, s: lambda *x: -n(*x)},
            {"clock": lambda t: d.time_embedding(0 * t + 50, 32)}, {"none": 1}):
        assert lit(clinic, **parts) != "", parts
    assert lit(clinic, load=another_prefix) == "vital signs, loss by step, round trips"
    shifted = clinic.replace(clinic.healthy, to_floats=lambda u8: u8.float() / 255 - 0.5)
    assert "bytes" in clinic.round_trips(shifted, lambda x, t: x, lambda x, t: x)


def test_three_percent_pass_all_five(clinic):
    """The premise of exercise 2."""
    assert lit(clinic, as_noise=lambda n, s: lambda xt, t: 1.03 * n(xt, t)) == ""


def test_every_bug_of_the_ward_is_found(clinic):
    (source,) = tagged(PATH, "check-1")
    run(source[: source.index("def attempt_1")], vars(clinic))
    own = {"clock", "none", "load", "to_floats"}  # parts of the notebook's own patients
    for bug in clinic.BUGS:
        if not own & set(bug) and bug.get("loss") is not d.v_loss:
            assert lit(clinic, **bug) != "", [*bug]
    assert len(clinic.ward(0)) == 3 and clinic.ward(1) == clinic.ward(1)


# ------------------------------------------------------------------ the table at the end

def test_the_table_names_only_instruments_that_exist():
    (table,) = [text for text in prose(PATH) if "### From the symptom to the instrument" in text]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) >= 12 and all(len(row) == 3 for row in rows)

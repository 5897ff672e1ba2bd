"""Notebook 13: which instrument sees which patient, on several seeds, and which repairs pass."""

import ast
import contextlib
import io
import math
import re

import pytest
import torch
from series import NOTEBOOKS, code_cells, prose, tagged

import ddpm_utils as d

PATH = NOTEBOOKS / "13_bug_clinic.ipynb"
INSTRUMENTS = ["vital signs", "network out", "loss by step", "wires", "round trips"]
PARTS = {"step_1", "step_2", "step_3", "step_4", "loss_5", "load_7", "clock_8", "floats_9"}
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


@pytest.fixture(scope="module")
def clinic():
    """The program, the instruments and the patients, without the pictures."""
    space = {"__name__": "clinic"}
    for source in tagged(PATH, "setup", "needed"):
        run(source, space)
    for cell in code_cells(PATH):
        for node in ast.parse(cell["source"]).body:
            if named(node) in PARTS | {"none_10", "patients"}:
                run(ast.unparse(node), space)
    assert [*space["patients"]] == [*CHART]
    return space


@pytest.fixture(scope="module")
def lights(clinic):
    """lights(parts, seed): the names of the instruments that are lit; a training is done once."""
    learn, network_out, trainings = clinic["learn"], clinic["network_out"], {}

    def once(program, seed=0, steps=300, one_batch=False):
        parts = (program.schedule, program.to_floats, program.clock, program.none, program.loss)
        key = (*parts, seed, steps, one_batch)
        if key not in trainings:
            trainings[key] = learn(program, seed, steps, one_batch)
        return trainings[key]

    def out_once(program):
        if program.step not in trainings:
            trainings[program.step] = network_out(program)
        return trainings[program.step]

    def lit(parts, seed=0):
        program = clinic["replace"](clinic["healthy"], **parts)
        found = clinic["examine"](program, seed)
        assert [*found] == INSTRUMENTS
        return ", ".join(name for name in found if found[name])

    clinic.update(learn=once, network_out=out_once)
    yield lit
    clinic.update(learn=learn, network_out=network_out)


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
    known = clinic["recursion"](schedule, m, s, tilde)
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


def test_the_best_gaussian_is_the_exact_predictors_loss(clinic):
    schedule, world = d.linear_schedule(100), d.GaussianMixture([1.0], [-0.4], [0.6])
    x0 = world.sample(100_000, torch.Generator().manual_seed(7))
    line = clinic["best_gaussian"](schedule, 0.36)
    for t in (1, 10, 30, 60):
        steps = torch.full((len(x0),), t)
        loss = d.simple_loss(d.exact_noise_predictor(world, schedule), schedule, x0, steps)
        assert float(loss) == pytest.approx(float(line[t]), rel=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lit_by_the_healthy_program(lights, seed):
    assert lights({}, seed) == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CHART)
def test_each_patient_lights_what_the_chart_says(clinic, lights, name, seed):
    assert lights(clinic["patients"][name], seed) == CHART[name]


def test_the_saved_chart_is_this_one():
    (page,) = ["".join(cell["outputs"][0]["text"]) for cell in code_cells(PATH)
               if "patients = {" in cell["source"]]
    rows = {line[:14].strip(): line[14:] for line in page.splitlines()[1:]}
    assert rows.pop("healthy").split() == ["·"] * 5
    for name, text in CHART.items():
        assert rows[name].split() == ["●" if i in text else "·" for i in INSTRUMENTS]


# ------------------------------------------------------------------ repairs

def repairs_on_the_page(clinic):
    """{patient: parts} of the code in the folded answers."""
    space = dict(clinic)
    for text in prose(PATH):
        if "<summary>Cause and repair</summary>" in text:
            for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                run(source, space)
    given = {name: {part: space[getattr(old, "__name__", "") if callable(old) else "none_10"]
                    for part, old in parts.items()} for name, parts in clinic["patients"].items()}
    given["6 snow"] = space["repair_6"]
    for name, parts in given.items():
        assert parts != clinic["patients"][name], f"no repair of {name} on the page"
    return given


def test_each_repair_on_the_page_passes(clinic, lights):
    for name, parts in repairs_on_the_page(clinic).items():
        assert lights(parts) == "", name


def test_other_right_repairs_pass(clinic, lights):
    def with_beta_tilde(schedule, x, t, noise, z):
        steps = torch.full((len(x),), t)
        x0 = schedule.predict_x0(x, steps, noise)
        mean, variance = schedule.q_posterior(x0, x, steps)
        return mean + variance[0].sqrt() * torch.randn_like(x)

    def own_noise(model, schedule, x0, t, noise):
        return 2 * d.simple_loss(model, schedule, x0, t)

    assert lights({"step": with_beta_tilde}) == ""
    assert lights({"loss": own_noise}) == ""
    assert lights({"to_floats": lambda u8: (u8.float() - 127.5) / 127.5}) == ""


def test_wrong_repairs_do_not_pass(clinic, lights):
    """A second bug, or only half of the repair."""
    step, loss = clinic["step"], clinic["simple_loss"]
    wrong = {
        "1: the root of the root": lambda s, x, t, e, z: step(s, x, t, e, z / s.betas[t] ** 0.25),
        "1: the mistake moved to ε": lambda s, x, t, e, z: step(s, x, t, e * s.betas[t].sqrt(), z),
        "2: clipped more widely": lambda s, x, t, e, z: step(s, x, t, e, z).clamp(-1.5, 1.5),
        "3: α without its root": lambda s, x, t, e, z: step(s, x, t, e, z) / s.alphas[t].sqrt(),
        "4: half of the noise": lambda s, x, t, e, z: step(s, x, t, e, z) + 0.05 * (t == 1),
        "4: no noise from t = 2 on": lambda s, x, t, e, z: step(s, x, t, e, z * (t > 2))}
    for name, bad in wrong.items():
        program = clinic["replace"](clinic["healthy"], step=bad)
        assert clinic["network_out"](program), name
    half = {"loss": lambda f, s, x0, t, n: loss(f, s, x0, t, n) + redrawn(f, s, x0, t, n)}
    assert lights(half) != "", "5"
    assert lights({"loss": d.v_loss, "as_noise": lambda n, s: lambda xt, t: -n(xt, t)}) != "", "6"
    assert lights({"load": another_prefix}) == "vital signs, loss by step, round trips", "7"
    assert lights({"clock": lambda t: d.time_embedding(0 * t + 50, 32)}) != "", "8"
    shifted = clinic["replace"](clinic["healthy"], to_floats=lambda u8: u8.float() / 255 - 0.5)
    assert "bytes" in clinic["round_trips"](shifted, lambda x, t: x, lambda x, t: x), "9"
    assert lights({"none": 1}) != "", "10"


def another_prefix(network, file):
    saved = torch.load(file, weights_only=True).items()
    network.load_state_dict({k.removeprefix("_orig_mod."): x for k, x in saved}, strict=False)


def redrawn(model, schedule, x0, t, noise):
    return (model(schedule.q_sample(x0, t, noise), t) - torch.randn_like(noise)).square().mean()


def test_three_percent_pass_all_five(lights):
    """The premise of exercise 2."""
    assert lights({"as_noise": lambda n, s: lambda xt, t: 1.03 * n(xt, t)}) == ""


def test_every_bug_of_the_ward_is_found(clinic, lights):
    (source,) = tagged(PATH, "check-1")
    run(source[: source.index("def attempt_1")], clinic)
    own = {"clock", "none", "load", "to_floats"}  # parts of the notebook's own patients
    for bug in clinic["BUGS"]:
        if not own & set(bug) and bug.get("loss") is not d.v_loss:
            assert lights(bug) != "", [*bug]
    assert len(clinic["ward"](0)) == 3 and clinic["ward"](1) == clinic["ward"](1)


# ------------------------------------------------------------------ the table at the end

def test_the_table_names_only_instruments_that_exist():
    (table,) = [text for text in prose(PATH) if "### From the symptom to the instrument" in text]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) >= 12 and all(len(row) == 3 for row in rows)

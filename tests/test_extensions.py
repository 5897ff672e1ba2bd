"""The maths of notebook 08, taken from their cells, against something independent.

The functions are not in ddpm_utils.py, because only these notebooks need them. They are run here as they stand there.
"""
import ast
import json
import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpm_utils as d

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"


def defined_in(name, *wanted):
    """A namespace with the functions and constants called wanted, from the code cells of the notebook."""
    cells = json.loads(next(NOTEBOOKS.glob(f"{name}_*.ipynb")).read_text(encoding="utf-8"))["cells"]
    space = {"math": math, "torch": torch, "np": np, "F": F, "nn": nn, **{k: getattr(d, k) for k in vars(d) if k[0] != "_"}}
    for cell in cells:
        if cell["cell_type"] == "code" and "exercise" not in str(cell["metadata"].get("tags")):
            for node in ast.parse("".join(cell["source"])).body:
                names = {node.name} if isinstance(node, ast.FunctionDef) else {
                    leaf.id for target in getattr(node, "targets", []) for leaf in ast.walk(target)
                    if isinstance(leaf, ast.Name)}
                if names & set(wanted):
                    exec(compile(ast.Module([node], []), name, "exec"), space)
    missing = set(wanted) - set(space)
    assert not missing, f"{name} defines no {missing}"
    return space


def test_patches_change_nothing_but_the_way():
    """With patch p the network sees exactly what one with C p² channels and a 1x1 stem sees after folding by hand."""
    torch.manual_seed(0)
    folded = d.UNet(in_channels=12, channels=(8, 16))
    folded.stem = nn.Conv2d(12, 8, 1)
    patched = d.UNet(in_channels=3, channels=(8, 16), patch=2)
    for p in folded.parameters():
        nn.init.normal_(p, std=0.1)
    patched.load_state_dict(folded.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 7])
    by_hand = x.view(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
    out = folded(by_hand, t).view(2, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    assert torch.allclose(patched(x, t), out, atol=1e-6)
    with pytest.raises(ValueError, match="multiples of 4"):
        patched(torch.randn(2, 3, 18, 18), t)


# ------------------------------------------------------------------ 08

@pytest.fixture(scope="module")
def mixture():
    return defined_in("08", "centres", "shares", "bumps", "log_q", "score", "beta_at", "alpha_bar_at", "velocity", "solve",
                      "log_likelihood", "slerp", "flow_step", "reverse_sde_step", "shares_and_spreads")


@pytest.mark.parametrize("a", [1.0, 0.5, 0.05])
def test_density_integrates_to_one_and_is_the_convolution(mixture, a):
    side = torch.linspace(-5, 5, 401, dtype=torch.float64)
    q = mixture["log_q"](torch.cartesian_prod(side, side), a).exp()
    assert float(q.sum() * (side[1] - side[0])**2) == pytest.approx(1, abs=1e-6)
    # one dimension, against the convolution of the scaled clean density with the noise, as a sum over x_0
    x0 = torch.linspace(-4, 4, 8001, dtype=torch.float64)[:, None]
    clean = mixture["log_q"](x0, 1.0).exp()
    if a < 1:
        x = torch.tensor([[-1.0], [0.2], [0.9]], dtype=torch.float64)
        kernel = torch.exp(-(x - a**0.5 * x0.T)**2 / (2 * (1 - a))) / math.sqrt(2 * math.pi * (1 - a))
        by_sum = (kernel * clean).sum(dim=1) * float(x0[1] - x0[0])
        assert torch.allclose(mixture["log_q"](x, a).exp(), by_sum, atol=1e-6)


def test_score_by_differences(mixture):
    x = torch.randn(50, 2, dtype=torch.float64)
    for a in (0.9, 0.3):
        for axis in (0, 1):
            h = torch.zeros(2, dtype=torch.float64)
            h[axis] = 1e-6
            slope = (mixture["log_q"](x + h, a) - mixture["log_q"](x - h, a)) / 2e-6
            assert torch.allclose(mixture["score"](x, a)[:, axis], slope, atol=1e-6)


def test_sde_alpha_bar_is_the_limit_of_linear_schedule(mixture):
    for T, tolerance in ((1000, 0.02), (20_000, 0.001)):
        schedule = d.linear_schedule(T)
        limit = mixture["alpha_bar_at"](torch.tensor(0.4, dtype=torch.float64))
        assert float(schedule.alpha_bars[int(0.4 * T)]) == pytest.approx(float(limit), rel=tolerance)
    s = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    by_integral = torch.exp(-torch.trapezoid(mixture["beta_at"](s), s))
    assert float(mixture["alpha_bar_at"](torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(float(by_integral))


def test_flow_moves_the_density_as_fokker_planck_says(mixture):
    """∂q/∂s = -∂(v q)/∂x for the flow's velocity v, in one dimension, by differences."""
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    q = lambda x, s: mixture["log_q"](x, mixture["alpha_bar_at"](s)).exp()
    s, h = torch.tensor(0.3, dtype=torch.float64), 1e-5
    by_time = (q(x, s + h) - q(x, s - h)) / (2 * h)
    flux = lambda x: mixture["velocity"](x, s)[:, 0] * q(x, s)
    by_space = -(flux(x + h) - flux(x - h)) / (2 * h)
    assert torch.allclose(by_time, by_space, atol=1e-6)


def test_one_step_of_the_flow_and_of_the_reverse_sde_on_a_gaussian(mixture):
    """For data N(0, 1) the score is -x at every time: the flow must stand still, the SDE must keep the variance."""
    x = torch.randn(400_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixture["flow_step"](x, -x, 0.01), x)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    after = mixture["reverse_sde_step"](x, -x, 0.01, noise)
    assert float(after.var()) == pytest.approx(1, abs=0.01)


def test_likelihood_by_flow_against_the_density(mixture):
    x = torch.tensor([[-1.5], [0.1], [1.3]], dtype=torch.float64)
    assert torch.allclose(mixture["log_likelihood"](x), mixture["log_q"](x, 1.0), atol=0.005)


def test_slerp_keeps_the_angle_even_and_the_length(mixture):
    a, b = torch.randn(2, 784, generator=torch.Generator().manual_seed(0))
    a, b = a / a.norm(), b / b.norm()
    angle = lambda u, v: float(torch.acos((u * v).sum().clamp(-1, 1)))
    quarter = mixture["slerp"](a, b, 0.25)
    assert float(quarter.norm()) == pytest.approx(1, abs=1e-5)
    assert angle(a, quarter) == pytest.approx(angle(a, b) / 4, abs=1e-4)

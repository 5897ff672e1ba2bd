"""cuda, mps and cpu: which is chosen and in which numbers, and that no float64 is moved there."""

import pytest
import torch
from series import run, small_unet, some_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddpm_utils as d


@pytest.mark.parametrize("cuda, mps, chosen", [
    (True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_device_that_set_up_chooses(monkeypatch, capsys, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Tesla T4")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert d.set_up(seed=3).type == chosen
    out = capsys.readouterr().out
    assert out.startswith(f"device: {chosen} (") and out.count("\n") == 1
    assert ("Tesla T4" in out) == cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_train_takes_the_numbers_of_the_device(tmp_path, monkeypatch, dtype):
    """What amp_dtype says for a T4, an A100 and an Apple GPU, carried into a run on the cpu: the
    network computes in that type, and only float16 has a GradScaler that scales."""
    monkeypatch.setattr(d, "amp_dtype", lambda device: dtype)
    if dtype is None:  # torch 2.4 has no autocast for mps, not even one that is switched off
        monkeypatch.setattr(torch, "autocast", lambda *a, **o: pytest.fail("it was asked for"))
    types, model = set(), small_unet()
    model.middle1.conv1.register_forward_hook(lambda module, given, out: types.add(out.dtype))
    run(6, model, checkpoint=tmp_path / "run.pt")
    assert types == {dtype or torch.float32}
    scaler = d.load_checkpoint(tmp_path / "run.pt")["scaler"]  # empty where it is off
    assert scaler.get("scale") == (65536.0 if dtype is torch.float16 else None)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------ no float64: mps has none


class Seen(TorchDispatchMode):
    """The number types of all that is made on a device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.types = device, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = filter(torch.is_tensor, tree_leaves(out))
        self.types |= {x.dtype for x in tensors if x.device.type == self.device}
        return out


@pytest.mark.parametrize("make", [d.linear_schedule, d.cosine_schedule])
def test_no_float64_is_moved_to_a_device_or_made_there(monkeypatch, make):
    """The meta device stands in for one that this machine lacks; it holds no numbers."""
    cpu, model = torch.Tensor.cpu, small_unet().to("meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (
        torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else cpu(x)))
    with Seen("meta") as seen:
        schedule = make(20).to("meta")
        assert {x.device.type for x in vars(schedule).values() if torch.is_tensor(x)} == {"meta"}
        x0 = d.to_model_range(some_images().to("meta"))
        for loss in (d.simple_loss, d.min_snr_loss):
            loss(model, schedule, x0).backward()
        d.EMA(model).update(model)
        options = {"shape": (1, 8, 8), "progress": False, "return_trajectory": True}
        assert d.ddpm_sample(model, schedule, 2, sigma="beta", **options).shape == (21, 2, 1, 8, 8)
        d.ddpm_sample(d.NoiseFromV(model, schedule), schedule, 2, sigma="beta_tilde", **options)
        d.ddim_sample(model, schedule, 2, steps=5, eta=0.5, **options)
        d.dpm_solver_sample(model, schedule, 2, steps=5, **options)
        d.garment_features(d.GarmentClassifier().eval().to("meta"), torch.zeros(3, 1, 28, 28))
        assert {torch.float32, torch.int64} <= seen.types and torch.float64 not in seen.types
        torch.zeros(3, dtype=torch.float64).to("meta")
    assert torch.float64 in seen.types  # it would have been seen


def test_train_makes_no_float64():
    """A run on the cpu, looked at from within: only Python's numbers have more than 32 bits."""
    with Seen("cpu") as seen:
        run(3)
    assert torch.float32 in seen.types and torch.float64 not in seen.types

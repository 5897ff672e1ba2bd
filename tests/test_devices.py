"""cuda, mps and cpu: which one is chosen and in which numbers, what is moved there, and what a full memory says."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddpm_utils
from ddpm_utils import (
    EMA,
    GarmentClassifier,
    UNet,
    cosine_schedule,
    ddim_sample,
    ddpm_sample,
    dpm_solver_sample,
    garment_features,
    linear_schedule,
    min_snr_loss,
    simple_loss,
    train,
)

SCHEDULE = linear_schedule(20)
BYTES = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    "cuda, mps, chosen",
    [(True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_device_that_set_up_chooses(monkeypatch, capsys, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Tesla T4")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert ddpm_utils.set_up(seed=3).type == chosen
    out = capsys.readouterr().out
    assert (
        out.startswith(f"device: {chosen} (")
        and out.count("\n") == 1
        and ("Tesla T4" in out) == cuda
    )


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_train_takes_the_numbers_of_the_gpu(monkeypatch, capability, dtype):
    """The answer for a T4, an A100 and an H100, carried into a run on the cpu: the network computes in that type,
    and only float16 has a GradScaler that scales."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    gpus = ddpm_utils.amp_dtype("cuda")
    assert gpus is dtype
    monkeypatch.setattr(ddpm_utils, "amp_dtype", lambda device: gpus)
    scalers, types = [], set()
    real = torch.amp.GradScaler

    def watched(*args, **options):
        scalers.append(real(*args, **options))
        return scalers[-1]

    monkeypatch.setattr(ddpm_utils.torch.amp, "GradScaler", watched)
    model = UNet(channels=(8, 16))
    model.middle1.conv1.register_forward_hook(lambda module, given, out: types.add(out.dtype))
    losses = train(model, SCHEDULE, BYTES, 6, batch_size=4, warmup=2, progress=False)
    assert types == {dtype}
    assert len(scalers) == 1 and scalers[0].is_enabled() == (dtype is torch.float16)
    assert scalers[0].get_scale() == (65536.0 if dtype is torch.float16 else 1.0)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_train_computes_in_float32_where_there_is_nothing_else(monkeypatch):
    assert ddpm_utils.amp_dtype("mps") is None
    monkeypatch.setattr(ddpm_utils, "amp_dtype", lambda device: None)
    # torch 2.4 has no autocast for mps, not even one that is switched off
    monkeypatch.setattr(
        ddpm_utils.torch, "autocast", lambda *a, **o: pytest.fail("autocast was asked for")
    )
    model, types = UNet(channels=(8, 16)), set()
    model.middle1.conv1.register_forward_hook(lambda module, given, out: types.add(out.dtype))
    train(model, SCHEDULE, BYTES, 2, batch_size=4, progress=False)
    assert types == {torch.float32}


# ------------------------------------------------------------------ no float64 there: mps has none


class Seen(TorchDispatchMode):
    """The number types of all that is made on the meta device, which stands in for one that this machine lacks."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.types |= {
            x.dtype for x in tree_leaves(out) if torch.is_tensor(x) and x.device.type == "meta"
        }
        return out


class NothingComesBack(TorchFunctionMode):
    """meta tensors hold no numbers: .cpu() gives zeros of their shape."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu and args[0].device.type == "meta":
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_a_float64():
    with Seen() as seen:
        torch.zeros(3, dtype=torch.float64).to("meta")
    assert seen.types == {torch.float64}


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
def test_no_float64_is_moved_to_a_device_or_made_there(make):
    model = UNet(channels=(8, 16)).to("meta")
    with NothingComesBack(), Seen() as seen:
        schedule = make(20).to("meta")
        assert {x.device.type for x in vars(schedule).values() if torch.is_tensor(x)} == {"meta"}
        x0 = ddpm_utils.to_model_range(BYTES.to("meta"))
        simple_loss(model, schedule, x0).backward()
        min_snr_loss(model, schedule, x0).backward()
        schedule.snr()
        EMA(model).update(model)
        noise_model = ddpm_utils.NoiseFromV(model, schedule)
        options = {"shape": (1, 8, 8), "progress": False, "return_trajectory": True}
        assert ddpm_sample(model, schedule, 2, sigma="beta", **options).shape == (21, 2, 1, 8, 8)
        ddpm_sample(noise_model, schedule, 2, sigma="beta_tilde", **options)
        ddim_sample(model, schedule, 2, steps=5, eta=0.5, **options)
        dpm_solver_sample(model, schedule, 2, steps=5, **options)
        garment_features(GarmentClassifier().eval().to("meta"), torch.zeros(3, 1, 28, 28))
    assert torch.float32 in seen.types and torch.int64 in seen.types
    assert torch.float64 not in seen.types


def test_train_makes_no_float64(monkeypatch):
    """A run on the cpu, looked at from within: only whole numbers of Python and no tensor have more than 32 bits."""

    class OnCpu(Seen):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.types |= {x.dtype for x in tree_leaves(out) if torch.is_tensor(x)}
            return out

    with OnCpu() as seen:
        train(UNet(channels=(8, 16)), SCHEDULE, BYTES, 3, batch_size=4, progress=False)
    assert torch.float32 in seen.types and torch.float64 not in seen.types

"""Training: it learns, it stops and goes on to the same numbers, failures keep the last good file.

Wrong arguments of train, labels among them, are in test_helper_arguments.py.
"""

import functools
import itertools
import json
import math
import re

import pytest
import series as s
import torch
from series import SCHEDULE, run, same_weights, small_unet, some_images

import ddpm_utils as d

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = torch.arange(32) % 10


def run_with_ema(steps=12, start=1, classes=0, **options):
    """(model, ema, losses); start: the seed of the weights that it starts from."""
    model = small_unet(start, classes=classes)
    ema = d.EMA(model, 0.9)
    return model, ema, run(steps, model, ema=ema, **options)[1]


def assert_same_run(one, other):
    (model, ema, losses), (its_model, its_ema, its_losses) = one, other
    assert losses == its_losses and same_weights(model, its_model)
    assert same_weights(ema.model, its_ema.model) and ema.updates == its_ema.updates


def assert_refused(words, file, **given):
    """And the file stays as it is."""
    before = file.read_bytes()
    with pytest.raises(ValueError, match=words):
        run(checkpoint=file, **given)
    assert file.read_bytes() == before


# ------------------------------------------------------------------ learning

def test_train_can_overfit_one_batch():
    torch.manual_seed(0)
    model, t = d.UNet(channels=(16, 32)), torch.tensor([5, 15, 30, 45])
    x0, noise = d.to_model_range(some_images(4)), torch.randn(4, 1, 8, 8)
    _, losses = run(300, model, lr=3e-3, loss_function=lambda model, schedule, *drawn: (
        d.simple_loss(model, schedule, x0, t, noise)))
    assert len(losses) == 300 and all(isinstance(loss, float) for loss in losses)
    assert 0.7 < losses[0] < 1.4 and losses[-1] < 0.02 * losses[0] and not model.training


@pytest.mark.parametrize("seed, images", [
    (4, some_images()), (9, d.to_model_range(some_images()))])
def test_train_is_the_plain_loop(monkeypatch, seed, images):
    """Algorithm 1 written out again: the same draws, Adam, learning rates, clipping. Floats are
    taken as they are, and the global random numbers are left alone."""
    monkeypatch.setattr(d, "amp_dtype", lambda device: None)
    steps, batch, lr, warmup, clip = 10, 4, 1e-2, 3, 0.05
    trained, state = small_unet(), torch.get_rng_state()
    _, losses = run(steps, trained, images, batch_size=batch, lr=lr, warmup=warmup, clip=clip,
                    seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    model, generator = small_unet(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = d.learning_rate(step, steps, lr, warmup)
        pick = torch.randint(len(images), (batch,), generator=generator)
        x0 = some_images()[pick].float() / 127.5 - 1
        t = torch.randint(1, 51, (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = d.simple_loss(model, SCHEDULE, x0, t, noise)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, clip / (norm + 1e-6))
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-3)
    # what they say is compared and not the weights: Adam blows up the rounding of gradients that
    # are exactly 0 (a bias before a GroupNorm, of attention's keys), which changes nothing of it
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 10, 30, 50])
    assert float((model(x, t) - small_unet()(x, t)).detach().abs().max()) > 0.01
    torch.testing.assert_close(model(x, t), trained(x, t), rtol=1e-2, atol=1e-3)


def test_learning_rate_goes_up_and_comes_down():
    down = [0.25 + 0.25 * math.cos(math.pi * k / 90) for k in range(90)]  # half a wave
    rates = [d.learning_rate(step, 100, 0.5, 10) for step in range(100)]
    assert rates == pytest.approx([*(0.05 * k for k in range(1, 11)), *down])
    # no warm-up; all warm-up
    assert d.learning_rate(0, 5, 1.0, 0) == 1.0 and d.learning_rate(4, 5, 1.0, 10) == 0.5


@pytest.mark.parametrize("steps, warmup", [(5, 0), (100, 10), (5000, 200)])
def test_the_default_warm_up_suits_a_short_run(monkeypatch, steps, warmup):
    monkeypatch.setattr(d, "learning_rate", lambda *given: pytest.fail(f"asked for {given}"))
    with pytest.raises(pytest.fail.Exception, match=rf"\(0, {steps}, 0.001, {warmup}\)"):
        run(steps, warmup=None)


def test_callback_is_called_when_it_said_and_progress_goes_to_stdout(capsys):
    seen = []
    run(12, callback=seen.append, callback_every=5, progress=True)
    out, err = capsys.readouterr()
    assert seen == [5, 10, 12] and "training" in out and "12/12" in out and err == ""


# ------------------------------------------------------------------ EMA

@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_ema_follows_its_closed_form_and_copies_buffers(decay):
    model = torch.nn.BatchNorm1d(2)                 # its buffers: two of floats, one that counts
    ema, values = d.EMA(model, decay), [model.weight.detach().clone()]
    for k in range(1, 9):
        model.weight.data = torch.tensor([k**2, -1.0 / k])
        model(torch.randn(9, 2))
        values.append(model.weight.detach().clone())
        ema.update(model)
        assert all(map(torch.equal, ema.model.buffers(), model.buffers()))  # no mixture with old
    # the average is a weighted sum: value k counts (1 - d_k) times the product of all later decays
    decays = [0, *(min(decay, (1 + k) / (10 + k)) for k in range(1, 9))]
    shares = [(1 - decays[k]) * math.prod(decays[k + 1:]) for k in range(9)]
    torch.testing.assert_close(ema.model.weight, sum(w * v for w, v in zip(shares, values)))
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    # the network itself is left alone
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.weight, values[-1])


def test_train_updates_each_step_an_ema_of_the_class_that_a_notebook_has_defined():
    """In notebook 04 it is __main__.EMA: the same words, another class."""
    own = type("EMA", (), {name: vars(d.EMA)[name] for name in ("__init__", "update")})
    model = small_unet()
    ema, twin = own(model, 0.9), d.EMA(model, 0.9)
    run(7, model, ema=ema, callback=lambda step: twin.update(model), callback_every=1)
    assert ema.updates == twin.updates == 7 and same_weights(ema.model, twin.model)
    assert not same_weights(ema.model, model)


# ------------------------------------------------------------------ stop and go on

@pytest.mark.parametrize("end, saved_every, options", [
    (8, 4, {}), (7, 3, {}), (11, 1, {}), (12, 4, {}), (7, 5, {"classes": 10, "labels": LABELS})])
def test_stop_and_resume_gives_the_same_numbers(tmp_path, capsys, end, saved_every, options):
    """After step 12 the run is finished: it is loaded and not trained again."""
    file, last, seen = tmp_path / "run.pt", end // saved_every * saved_every, []
    saving = {"checkpoint": file, "checkpoint_every": saved_every, "callback_every": 1, **options}
    with pytest.raises(s.Stop):
        run_with_ema(**saving, callback=s.stop_at(end))
    before = file.read_bytes()
    assert d.load_checkpoint(file)["step"] == last
    # other weights at the start: those of the file must replace them
    resumed = run_with_ema(start=77, **saving, callback=seen.append)
    assert seen == list(range(last + 1, 13))        # it did not start again
    assert ("finished" in capsys.readouterr().out) == (file.read_bytes() == before) == (end == 12)
    assert_same_run(resumed, run_with_ema(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_killed_process_loses_nothing(tmp_path):
    """A checkpoint after every step, so that most likely one is being written at the kill."""
    file = tmp_path / "run.pt"
    s.kill_a_run(file, after=6)
    saved = d.load_checkpoint(file)["step"]
    assert 6 <= saved < 2000
    # on to a few steps after the kill, and the same without any kill
    stop = {"callback": s.stop_at(saved + 5, KeyboardInterrupt), "callback_every": 1}
    resumed = run_with_ema(2000, start=77, checkpoint=file, checkpoint_every=1, **stop)
    assert_same_run(resumed, run_with_ema(2000, **stop))


@pytest.mark.parametrize("end", [1, 10])
def test_the_stop_button_leaves_everything_usable(tmp_path, capsys, end):
    saving = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 4, "callback_every": 1}
    model, ema, losses = run_with_ema(callback=s.stop_at(end, KeyboardInterrupt), **saving)
    assert "Stopped" in capsys.readouterr().out
    assert end - 1 <= len(losses) <= end            # the step in which it came may be missing
    whole = run_with_ema()[2]
    assert losses == whole[:len(losses)]
    assert not model.training and ema.updates == end
    assert torch.isfinite(s.four_samples("ddim", ema.model, SCHEDULE)).all()
    # before step 4 nothing is saved yet
    assert end < 4 or run_with_ema(start=50, **saving)[2] == whole


@pytest.mark.parametrize("end", [4, 12])
def test_a_file_of_another_run_or_device_and_one_of_weights_are_refused_and_kept(tmp_path, end):
    """Also other images of the same number, another number inside functools.partial, and a finished
    run (12) that is asked for more steps. A GPU's generator has another state."""
    file, gamma_5 = tmp_path / "run.pt", functools.partial(d.v_loss, gamma=5)
    same = {"labels": LABELS, "loss_function": gamma_5, "checkpoint_every": 4}
    with pytest.raises(s.Stop):
        run(model=small_unet(classes=10), checkpoint=file, callback=s.stop_at(end),
            callback_every=1, **same)
    for change in [
            {"lr": 0.01}, {"batch_size": 5}, {"seed": 3}, {"warmup": 1}, {"clip": 0.5},
            {"loss_function": d.v_loss}, {"loss_function": functools.partial(d.v_loss, gamma=1)},
            {"loss_function": d.simple_loss}, {"drop": 0.2}, {"labels": LABELS.flip(0)},
            {"images": some_images(seed=5)}, {"ema": d.EMA(small_unet(), 0.9)}, {"steps": 13},
            {"images": some_images(33), "labels": torch.arange(33) % 10},
            {"schedule": d.linear_schedule(60)}, {"model": d.UNet(channels=(8, 24), classes=10)}]:
        named = ", ".join({"model": "network", "drop": "labels"}.get(name, name) for name in change)
        assert_refused(rf"run.pt holds another run \({named}\)", file,
                       **{"model": small_unet(classes=10), **same, **change})
    torch.save({**torch.load(file, weights_only=True), "device": "cuda"}, file)
    assert_refused("run.pt was written on cuda", file, model=small_unet(classes=10), **same)
    d.save_checkpoint(file, small_unet(), SCHEDULE)
    assert_refused("run.pt is not a training checkpoint", file)


@pytest.mark.parametrize("steps, bad, late", [(12, 10, False), (60, 48, False), (12, 8, True)])
def test_what_is_no_number_ends_a_run_and_is_not_saved(tmp_path, steps, bad, late):
    """late: the loss of that step is still good, the weights after it are not, which could never be
    continued."""
    file, model, calls = tmp_path / "run.pt", small_unet(), itertools.count(1)

    def loss(*given):
        good, broken = d.simple_loss(*given), next(calls) >= bad
        if broken and late:
            good.register_hook(lambda gradient: gradient * math.nan)
        return good * math.nan if broken and not late else good

    with pytest.raises(FloatingPointError, match=r"step \d+.*run.pt"):
        run(steps, model, loss_function=loss, checkpoint=file, checkpoint_every=4)
    saved = d.load_checkpoint(file)
    assert saved["step"] == (bad - 1) // 4 * 4                          # the last good one
    assert torch.isfinite(saved["losses"][:saved["step"]]).all() and not model.training
    assert all(torch.isfinite(numbers).all() for numbers in saved["model"].values())
    with pytest.raises(FloatingPointError, match="step"):               # also without a file
        run(steps, loss_function=loss)


# ------------------------------------------------------------------ mixed precision

@pytest.mark.parametrize("kind, here, dtype", [
    ("cuda", (6, 1), torch.float16), ("cuda", (7, 5), torch.float16), ("mps", True, None),
    ("cuda", (8, 0), torch.bfloat16), ("cuda", (9, 0), torch.bfloat16),
    ("cpu", True, torch.bfloat16), ("cpu", False, None), ("cpu", "unknown", None)])
def test_amp_dtype(monkeypatch, kind, here, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: here)
    # what a T4 says, and emulates it
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: here, raising=False)
    if here == "unknown":                           # a torch that does not say
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    for device in (kind, f"{kind}:0", torch.device(kind)):
        assert d.amp_dtype(device) is dtype


# ------------------------------------------------------------------ labels

def test_labels_are_dropped_one_by_one():
    """A share of them, mixed within a batch, and nothing but the last row means "no label"."""
    y = torch.arange(20_000) % 10
    dropped = d.drop_labels(y, 0.1, 10, torch.Generator().manual_seed(0))
    shares = (dropped == 10).view(-1, 100).float().mean(dim=1)          # of batches of 100
    assert abs(float(shares.mean()) - 0.1) < 5 * math.sqrt(0.09 / len(y))
    assert 0 < float(shares.min()) and float(shares.max()) < 0.3
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    assert torch.equal(d.drop_labels(y, 0.0, 10), y) and d.drop_labels(y, 1.0, 10).eq(10).all()


def test_labels_reach_the_network_and_the_last_row_is_trained_too():
    model, _ = run(60, small_unet(classes=10), labels=LABELS, drop=0.5)
    assert bool(model.label.weight.any(dim=1).all())                    # all rows have left zero
    model, _ = run(12, small_unet(classes=10), labels=LABELS, drop=0.0)
    assert not model.label.weight[10].any()


def test_without_labels_not_one_random_draw_changes():
    """The run of a network with classes and no labels is, but for its last row, the plain one."""
    (_, losses), (model, same) = run(), run(model=small_unet(classes=10))
    assert losses == pytest.approx(same, rel=1e-3) and not model.label.weight[:10].any()


# ------------------------------------------------------------------ what the network predicts

@pytest.mark.parametrize("loss, target", [
    (d.simple_loss, "noise"), (d.v_loss, "v"), (d.min_snr_loss, "v"),
    (functools.partial(d.v_loss, gamma=2), "v")])
def test_train_notes_what_the_network_predicts(tmp_path, loss, target):
    file = tmp_path / "run.pt"
    model, ema, _ = run_with_ema(4, loss_function=loss, checkpoint=file)
    assert model.target == ema.model.target == d.load_checkpoint(file)["target"] == target
    wrapped, _ = d.load_pretrained(file)            # a learner's own file, by its path
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 40])
    expected = d.NoiseFromV(ema.model, SCHEDULE)(x, t) if target == "v" else ema.model(x, t)
    torch.testing.assert_close(wrapped(x, t), expected, rtol=1e-4, atol=1e-5)


def test_a_v_network_without_its_wrapper_is_noticed():
    model, _ = run(2, loss_function=d.v_loss)
    for name in s.SAMPLERS:
        with pytest.raises(ValueError, match="NoiseFromV"):
            s.four_samples(name, model, SCHEDULE)
        s.four_samples(name, d.NoiseFromV(model, SCHEDULE), SCHEDULE)
    with pytest.raises(ValueError, match="predicts v"):  # nor is it trained on to something else
        run(2, model)


def test_the_shipped_network_can_be_trained_further(tmp_path):
    model, schedule = d.load_network("fashion")
    images, before = some_images(4).repeat(1, 1, 4, 4)[..., :28, :28], model.stem.weight.clone()
    d.train(model, schedule, images, 2, batch_size=2, loss_function=d.v_loss, progress=False)
    assert not torch.equal(model.stem.weight, before)
    d.save_checkpoint(tmp_path / "mine.pt", model, schedule)
    assert isinstance(d.load_pretrained(tmp_path / "mine.pt")[0], d.NoiseFromV)


def test_the_table_of_recipes_is_what_was_measured():
    runs = json.loads((s.ROOT / "tests" / "measure" / "recipes.json").read_text())["runs"]
    text = "\n".join(s.prose(next(s.NOTEBOOKS.glob("04_*.ipynb"))))
    rows = re.findall(r"^\| .* \| ([\d,]+) \| ([\d.]+) \|$", text, re.M)
    measured = {(f"{run['steps']:,}", f"{run['distance']:.1f}") for run in runs.values()}
    assert len(rows) == 7 and set(rows) <= measured
    for name in ("ours", "ours, seed 1", "ours, seed 2", "no EMA", "predict the noise"):
        assert f"{runs[name]['distance']:.1f}" in text, name

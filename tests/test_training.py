"""Training: it learns, it stops and goes on to the same numbers, and nothing that fails takes the last good file along."""
import builtins
import errno
import math
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch

import ddpm_utils
from ddpm_utils import (EMA, UNet, amp_dtype, learning_rate, linear_schedule, load_checkpoint, save_checkpoint,
                        simple_loss, to_model_range, train)

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCHEDULE = linear_schedule(50)


@pytest.fixture(autouse=True)
def one_thread():
    """For so small networks more threads cost more than they bring, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_unet(seed=1):
    torch.manual_seed(seed)
    return UNet(channels=(8, 16))


def pictures(n=32, seed=2):
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(steps=12, model=None, **options):
    model = model or small_unet()
    options = {"batch_size": 4, "warmup": 3, "progress": False, **options}
    return model, train(model, SCHEDULE, pictures(), steps, **options)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


class Stop(Exception):
    """What a callback raises where a test wants a run to end in the middle."""


# ------------------------------------------------------------------ learning

def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    model = UNet(channels=(16, 32))
    x0, noise, t = to_model_range(pictures(4)), torch.randn(4, 1, 8, 8), torch.tensor([5, 15, 30, 45])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = simple_loss(model, SCHEDULE, x0, t, noise).item()
    for _ in range(300):
        loss = simple_loss(model, SCHEDULE, x0, t, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.7 < first < 1.4 and loss.item() < 0.02 * first


def test_train_learns_one_picture():
    torch.manual_seed(0)
    model = UNet(channels=(16, 32))
    losses = train(model, SCHEDULE, pictures(1), 200, batch_size=16, lr=3e-3, warmup=20, progress=False)
    assert len(losses) == 200 and all(isinstance(loss, float) for loss in losses)
    # without the network's help the loss is 1; with one picture only, nearly all noise can be told
    assert sum(losses[:3]) / 3 > 0.8 and sum(losses[-50:]) / 50 < 0.25
    assert not model.training


def test_the_seed_decides():
    (a, first), (b, again), (c, other) = run(seed=4), run(seed=4), run(seed=5)
    assert first == again and same_weights(a, b)
    assert first != other and not same_weights(a, c)


def test_train_leaves_the_global_random_numbers_alone():
    model = small_unet()
    state = torch.get_rng_state()
    run(model=model)
    assert torch.equal(torch.get_rng_state(), state)


def test_train_is_the_plain_loop(monkeypatch):
    """Algorithm 1 written out again: the same draws, Adam, warm-up and decay, clipping."""
    monkeypatch.setattr(ddpm_utils, "amp_dtype", lambda device: None)
    steps, batch, lr, warmup, clip = 10, 4, 1e-2, 3, 0.05
    trained, losses = run(steps, batch_size=batch, lr=lr, warmup=warmup, clip=clip, seed=9)
    model, images, generator = small_unet(), pictures(), torch.Generator().manual_seed(9)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        rate = lr * (step + 1) / warmup if step < warmup else \
            lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        x0 = images[torch.randint(len(images), (batch,), generator=generator)].float() / 127.5 - 1
        t = torch.randint(1, 51, (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        alpha_bar = SCHEDULE.alpha_bars[t].view(-1, 1, 1, 1)
        loss = (model(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, clip / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-3)
    # what they say is compared and not the weights: Adam blows up the rounding of gradients that are exactly 0
    # (a bias before a GroupNorm, of attention's keys), which changes nothing of what the network says
    x, t, start = torch.randn(4, 1, 8, 8), torch.tensor([1, 10, 30, 50]), small_unet()
    said, moved = model(x, t), trained(x, t)
    assert float((said - start(x, t)).detach().abs().max()) > 0.01
    torch.testing.assert_close(said, moved, rtol=1e-2, atol=1e-3)


def test_learning_rate_goes_up_and_comes_down():
    rates = [learning_rate(step, 100, 0.5, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert max(rates) == 0.5 and rates[55] == pytest.approx(0.25) and 0 < rates[-1] < 1e-3
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(0, 5, 1.0, 0) == 1.0 and learning_rate(4, 5, 1.0, 10) == 0.5  # no warm-up; all warm-up


def test_callback_is_called_when_it_said():
    seen = []
    run(12, callback=seen.append, callback_every=5)
    assert seen == [5, 10, 12]


def test_progress_goes_to_stdout(capsys):
    run(6, progress=True)
    out, err = capsys.readouterr()
    assert "training" in out and "6/6" in out and err == ""


# ------------------------------------------------------------------ EMA

class WithBuffer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.tensor([10.0]))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_ema_follows_its_closed_form_and_copies_buffers(decay):
    model = WithBuffer()
    ema = EMA(model, decay)
    values = [torch.tensor([1.0, -2.0])]
    for k in range(1, 9):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([k**2, -1.0 / k]))
            model.count += 1
            model.scale *= 1.5
        values.append(model.weight.detach().clone())
        ema.update(model)
        assert ema.model.count == model.count and ema.model.scale == model.scale  # not a mixture of old and new
    decays = [min(decay, (1 + k) / (10 + k)) for k in range(1, 9)]
    # the average is a weighted sum: value k counts (1 - d_k) times the product of all later decays
    expected = values[0] * math.prod(decays)
    for k in range(1, 9):
        expected = expected + values[k] * (1 - decays[k - 1]) * math.prod(decays[k:])
    torch.testing.assert_close(ema.model.weight, expected)
    assert torch.equal(model.weight, values[-1])  # the network itself is left alone


def test_ema_is_a_copy_without_gradients():
    model = small_unet().train()
    ema = EMA(model)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert same_weights(ema.model, model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not same_weights(ema.model, model)


def test_train_updates_the_ema_each_step():
    model = small_unet()
    ema, twin, seen = EMA(model, 0.9), EMA(model, 0.9), []
    run(7, model, ema=ema, callback=lambda step: (twin.update(model), seen.append(step)), callback_every=1)
    assert ema.updates == 7 == len(seen) and same_weights(ema.model, twin.model)
    assert not same_weights(ema.model, model)


# ------------------------------------------------------------------ stop and go on

def undisturbed(steps=12, **options):
    model = small_unet()
    ema = EMA(model, 0.9)
    _, losses = run(steps, model, ema=ema, **options)
    return model, ema, losses


@pytest.mark.parametrize("stop_at, saved_every", [(8, 4), (7, 3), (11, 1)])
def test_stop_and_resume_gives_the_same_numbers(tmp_path, stop_at, saved_every):
    whole, whole_ema, whole_losses = undisturbed()
    file = tmp_path / "run.pt"

    def stop(step):
        if step == stop_at:
            raise Stop

    model = small_unet()
    with pytest.raises(Stop):
        run(12, model, ema=EMA(model, 0.9), checkpoint=file, checkpoint_every=saved_every, callback=stop,
            callback_every=1)
    assert load_checkpoint(file)["step"] == stop_at // saved_every * saved_every

    torch.manual_seed(99)
    model = small_unet(seed=77)  # other weights: those of the file must replace them
    ema, seen = EMA(model, 0.9), []
    _, losses = run(12, model, ema=ema, checkpoint=file, checkpoint_every=saved_every, callback=seen.append,
                    callback_every=1)
    assert seen[0] == stop_at // saved_every * saved_every + 1  # it did not start anew
    assert losses == whole_losses and same_weights(model, whole)
    assert same_weights(ema.model, whole_ema.model) and ema.updates == whole_ema.updates
    assert leftovers(tmp_path) == ["run.pt"]


CHILD = """
    import sys
    sys.path[:0] = {paths!r}
    from test_training import EMA, run, small_unet, torch
    torch.set_num_threads(1)
    model = small_unet()
    run(2000, model, ema=EMA(model, 0.9), checkpoint={file!r}, checkpoint_every=1,
        callback=lambda step: print(step, flush=True), callback_every=1)
"""


def test_a_killed_process_loses_nothing(tmp_path):
    """A checkpoint after every step, so that the kill comes most likely while one is being written."""
    file = tmp_path / "run.pt"
    code = textwrap.dedent(CHILD.format(paths=[str(ROOT), str(ROOT / "tests")], file=str(file)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if int(line) == 6:
                child.kill()
                break
        child.wait()
    saved = load_checkpoint(file)
    assert 6 <= saved["step"] < 2000

    model = small_unet(seed=77)  # on to a few steps after the kill, and the same without any kill
    ema, losses = EMA(model, 0.9), []
    target = saved["step"] + 5

    def stop(step):
        losses.append(step)
        if step == target:
            raise Stop

    with pytest.raises(Stop):
        run(2000, model, ema=ema, checkpoint=file, checkpoint_every=1, callback=stop, callback_every=1)
    assert losses[0] == saved["step"] + 1
    whole = small_unet()
    whole_ema = EMA(whole, 0.9)
    with pytest.raises(Stop):
        run(2000, whole, ema=whole_ema, callback=stop, callback_every=1)
    assert same_weights(model, whole) and same_weights(ema.model, whole_ema.model)


def test_a_finished_run_starts_anew(tmp_path):
    file = tmp_path / "run.pt"
    first, losses = run(6, checkpoint=file)
    again, losses_again = run(6, checkpoint=file)
    assert losses == losses_again and same_weights(first, again)
    assert load_checkpoint(file)["step"] == 6
    longer, _ = run(8, checkpoint=file)  # a finished one is no hindrance to another
    assert same_weights(longer, run(8)[0])


@pytest.mark.parametrize("change", [{"lr": 1e-2}, {"batch_size": 5}, {"seed": 3}, {"warmup": 1}, {"clip": 0.5},
                                    {"steps": 13}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    file = tmp_path / "run.pt"
    unfinished(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=next(iter(change))):
        run(**{"steps": 12, "checkpoint": file, "checkpoint_every": 4, **change})
    assert file.read_bytes() == before


def unfinished(file, with_ema=False, model=None):
    def stop(step):
        raise Stop

    model = model or small_unet()
    with pytest.raises(Stop):
        run(12, model, checkpoint=file, checkpoint_every=4, callback=stop, callback_every=4,
            ema=EMA(model) if with_ema else None)
    return file


def test_a_checkpoint_of_a_run_with_other_pictures_is_refused(tmp_path):
    file = unfinished(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="pictures"):
        train(small_unet(), SCHEDULE, pictures(33), 12, batch_size=4, warmup=3, checkpoint=file, progress=False)


def test_a_checkpoint_of_a_run_with_another_schedule_is_refused(tmp_path):
    """Going on with other noise would be neither the one run nor the other."""
    file = unfinished(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="schedule|betas"):
        train(small_unet(), linear_schedule(60), pictures(), 12, batch_size=4, warmup=3, checkpoint=file,
              progress=False)


@pytest.mark.parametrize("with_ema", [True, False])
def test_ema_or_not_must_be_as_it_was(tmp_path, with_ema):
    file = unfinished(tmp_path / "run.pt", with_ema)
    model = small_unet()
    with pytest.raises(ValueError, match="ema"):
        run(12, model, checkpoint=file, ema=None if with_ema else EMA(model))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    file = unfinished(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt.*UNet"):
        run(12, UNet(channels=(8, 24)), checkpoint=file)


def test_a_checkpoint_from_another_device_is_refused_in_words(tmp_path):
    """A GPU's generator has another state; taken over into this one it is a RuntimeError that nobody understands."""
    file = unfinished(tmp_path / "run.pt")
    content = torch.load(file, weights_only=True)
    content["generator"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(content, file)
    with pytest.raises(ValueError, match="device"):
        run(12, checkpoint=file)


def test_a_plain_file_of_weights_is_no_training_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "weights.pt", small_unet(), SCHEDULE)
    with pytest.raises(ValueError, match="weights.pt is no training checkpoint"):
        run(12, checkpoint=tmp_path / "weights.pt")


# ------------------------------------------------------------------ files

def test_save_and_load(tmp_path):
    model, twin = small_unet(1), small_unet(2)
    ema, twin_ema = EMA(model), EMA(twin)
    for _ in range(3):
        ema.update(small_unet(5))
    save_checkpoint(tmp_path / "deep" / "er" / "a.pt", model, SCHEDULE, ema, remark="mine")
    content = load_checkpoint(tmp_path / "deep" / "er" / "a.pt", twin, twin_ema)
    assert same_weights(model, twin) and same_weights(ema.model, twin_ema.model) and twin_ema.updates == 3
    assert content["remark"] == "mine" and content["unet"] == model.config and content["target"] == "noise"
    torch.testing.assert_close(ddpm_utils.NoiseSchedule(content["betas"]).alpha_bars, SCHEDULE.alpha_bars)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("damage", [
    lambda data: b"",
    lambda data: data[:100],
    lambda data: data[:len(data) // 2],
    lambda data: data[:-1],
    lambda data: b"<html><body>Please log in</body></html>",
], ids=["empty", "start", "half", "one byte short", "a web page"])
def test_a_damaged_checkpoint(tmp_path, damage):
    file = tmp_path / "a.pt"
    save_checkpoint(file, small_unet(), SCHEDULE)
    file.write_bytes(damage(file.read_bytes()))
    model = small_unet(9)
    with pytest.raises(ValueError, match="a.pt is damaged"):
        load_checkpoint(file, model)
    assert same_weights(model, small_unet(9))
    with pytest.raises(ValueError, match="a.pt is damaged"):
        run(4, checkpoint=file)  # not silently replaced either


def test_a_bit_turned_in_the_weights_is_seen(tmp_path):
    """torch.load does not compare the sums that torch.save wrote."""
    model, file = small_unet(), tmp_path / "a.pt"
    save_checkpoint(file, model, SCHEDULE)
    data, weights = bytearray(file.read_bytes()), model.stem.weight.detach().numpy().tobytes()
    data[data.index(weights) + 3] ^= 64  # the first weight times 2 to the ±128
    file.write_bytes(data)
    with pytest.raises(ValueError, match="a.pt is damaged"):
        load_checkpoint(file)


@pytest.mark.parametrize("content", [[1, 2], {"weights": 1}, torch.zeros(3), {"model": 3}],
                         ids=["list", "no model", "tensor", "model is a number"])
def test_a_file_that_is_something_else(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt"):
        load_checkpoint(tmp_path / "a.pt", small_unet())


def test_a_file_that_holds_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run!",)

    torch.save({"model": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_of_another_shape_changes_nothing(tmp_path):
    save_checkpoint(tmp_path / "a.pt", UNet(channels=(8, 24)), SCHEDULE)
    model = small_unet()
    with pytest.raises(ValueError, match=r"a\.pt does not fit.*channels"):
        load_checkpoint(tmp_path / "a.pt", model)
    other = ddpm_utils.GarmentClassifier()
    torch.save({"model": other.state_dict()}, tmp_path / "b.pt")  # as classifier.pt, with no word of a UNet in it
    with pytest.raises(ValueError, match="b.pt does not fit"):
        load_checkpoint(tmp_path / "b.pt", model)


def test_asking_for_an_ema_that_is_not_there(tmp_path):
    torch.save({"model": small_unet().state_dict()}, tmp_path / "a.pt")
    model = small_unet()
    load_checkpoint(tmp_path / "a.pt", model)
    save_checkpoint(tmp_path / "b.pt", small_unet(), SCHEDULE)  # no ema was given
    for file in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="ema"):
            load_checkpoint(tmp_path / file, model, EMA(model))


class FullDisk:
    """A file that takes so many bytes and then says what a full disk says."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, room):
    file = tmp_path / "a.pt"
    save_checkpoint(file, small_unet(1), SCHEDULE)
    before = file.read_bytes()
    monkeypatch.setattr(ddpm_utils, "open", lambda *a: FullDisk(builtins.open(*a), room), raising=False)
    with pytest.raises(OSError, match="a.pt could not be written"):
        save_checkpoint(file, small_unet(2), SCHEDULE)
    assert file.read_bytes() == before and leftovers(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_flush_or_the_renaming(tmp_path, monkeypatch, moment):
    file = tmp_path / "a.pt"
    save_checkpoint(file, small_unet(1), SCHEDULE)
    before = file.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ddpm_utils.os, moment, full)
    with pytest.raises(OSError, match="could not be written"):
        save_checkpoint(file, small_unet(2), SCHEDULE)
    assert file.read_bytes() == before and leftovers(tmp_path) == ["a.pt"]


def test_a_stop_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    save_checkpoint(file, small_unet(1), SCHEDULE)
    before = file.read_bytes()

    def stopped(content, target):
        target.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm_utils.torch, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(file, small_unet(2), SCHEDULE)
    assert file.read_bytes() == before and leftovers(tmp_path) == ["a.pt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="a.pt could not be written"):
        save_checkpoint(tmp_path / "file" / "a.pt", small_unet(), SCHEDULE)


# ------------------------------------------------------------------ what goes wrong on the way

class Breaks(torch.nn.Module):
    """A network whose answers are no numbers from the k-th call on."""

    def __init__(self, k):
        super().__init__()
        self.inner, self.k, self.calls = small_unet(), k, 0

    def forward(self, x, t):
        self.calls += 1
        return self.inner(x, t) * (float("nan") if self.calls > self.k else 1)


@pytest.mark.parametrize("steps, breaks_after", [(12, 9), (60, 47)])
def test_a_loss_that_is_no_number(tmp_path, steps, breaks_after):
    file, model = tmp_path / "run.pt", Breaks(breaks_after)
    with pytest.raises(FloatingPointError, match="run.pt"):
        run(steps, model, checkpoint=file, checkpoint_every=4)
    saved = load_checkpoint(file)
    assert saved["step"] == breaks_after // 4 * 4  # the last good one
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert torch.isfinite(saved["losses"][:saved["step"]]).all()
    assert not model.training


def test_a_loss_that_is_no_number_without_a_checkpoint():
    with pytest.raises(FloatingPointError, match="step"):
        run(12, Breaks(5))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss of step 8 is still good, the weights after it are not: a file of them could never be continued."""
    class Spoilt(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = small_unet(), 0

        def forward(self, x, t):
            self.calls += 1
            out = self.inner(x, t)
            if self.calls == 8:
                out.register_hook(lambda gradient: gradient * float("nan"))
            return out

    file = tmp_path / "run.pt"
    with pytest.raises(FloatingPointError):
        run(12, Spoilt(), checkpoint=file, checkpoint_every=4)
    saved = load_checkpoint(file)
    assert all(torch.isfinite(value).all() for value in saved["model"].values()) and saved["step"] == 4


@pytest.mark.parametrize("stop_at", [1, 10])
def test_the_stop_button_leaves_everything_usable(tmp_path, capsys, stop_at):
    model = small_unet()
    ema = EMA(model, 0.9)

    def stop(step):
        if step == stop_at:
            raise KeyboardInterrupt

    _, losses = run(12, model, ema=ema, checkpoint=tmp_path / "run.pt", checkpoint_every=4, callback=stop,
                    callback_every=1)
    _, _, whole = undisturbed()
    assert stop_at - 1 <= len(losses) <= stop_at  # the step in which it came may be missing
    assert losses == whole[:len(losses)]
    assert "Stopped" in capsys.readouterr().out
    assert not model.training and ema.updates == stop_at
    x = ddpm_utils.ddim_sample(ema.model, SCHEDULE, 2, 3, shape=(1, 8, 8), progress=False)
    assert torch.isfinite(x).all()
    if stop_at < 4:  # nothing was saved yet
        return
    resumed = small_unet(seed=50)
    assert run(12, resumed, ema=EMA(resumed, 0.9), checkpoint=tmp_path / "run.pt", checkpoint_every=4)[1] == whole


def test_a_full_disk_in_the_middle_of_training_is_said(tmp_path, monkeypatch):
    file = unfinished(tmp_path / "run.pt")
    before = file.read_bytes()
    monkeypatch.setattr(ddpm_utils, "open", lambda *a: FullDisk(builtins.open(*a), 5000), raising=False)
    with pytest.raises(OSError, match="run.pt could not be written"):
        run(12, checkpoint=file, checkpoint_every=4)
    assert file.read_bytes() == before


# ------------------------------------------------------------------ mixed precision

@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                                               ((9, 0), torch.bfloat16), ((6, 1), torch.float16)])
def test_amp_dtype_of_gpus(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)  # what a T4 says, and emulates it
    assert amp_dtype(torch.device("cuda")) is dtype and amp_dtype("cuda:0") is dtype


@pytest.mark.parametrize("has, dtype", [(True, torch.bfloat16), (False, None)])
def test_amp_dtype_of_cpus(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert amp_dtype("cpu") is dtype and amp_dtype(torch.device("cpu")) is dtype


def test_amp_dtype_elsewhere(monkeypatch):
    assert amp_dtype("mps") is None
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)  # a torch that does not say
    assert amp_dtype("cpu") is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_train_in_each_number_type(monkeypatch, dtype):
    monkeypatch.setattr(ddpm_utils, "amp_dtype", lambda device: dtype)
    model, losses = run(8)
    assert all(math.isfinite(loss) for loss in losses) and len(losses) == 8
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())

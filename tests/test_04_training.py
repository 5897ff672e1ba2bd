"""Training: it learns, it stops and goes on to the same numbers, and failures keep the last good file."""

import functools
import json
import math
import re

import pytest
import torch
from series import (
    NOTEBOOKS,
    ROOT,
    SCHEDULE,
    WEIGHTS,
    Stop,
    kill_a_run,
    prose,
    run,
    same_weights,
    small_unet,
    some_images,
    stop_at,
    unfinished,
)

import ddpm_utils
from ddpm_utils import (
    EMA,
    NoiseFromV,
    UNet,
    amp_dtype,
    ddim_sample,
    drop_labels,
    learning_rate,
    linear_schedule,
    load_checkpoint,
    load_network,
    load_pretrained,
    min_snr_loss,
    save_checkpoint,
    simple_loss,
    to_model_range,
    train,
    v_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------ learning


def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    model = UNet(channels=(16, 32))
    x0, noise, t = (
        to_model_range(some_images(4)),
        torch.randn(4, 1, 8, 8),
        torch.tensor([5, 15, 30, 45]),
    )
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
    losses = train(
        model, SCHEDULE, some_images(1), 200, batch_size=16, lr=3e-3, warmup=20, progress=False
    )
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
    model, images, generator = small_unet(), some_images(), torch.Generator().manual_seed(9)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        rate = (
            lr * (step + 1) / warmup
            if step < warmup
            else lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        )
        x0 = images[torch.randint(len(images), (batch,), generator=generator)].float() / 127.5 - 1
        t = torch.randint(1, 51, (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        alpha_bar = SCHEDULE.alpha_bars[t].view(-1, 1, 1, 1)
        loss = (
            (model(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, t) - noise)
            .square()
            .mean()
        )
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


def test_floats_are_taken_as_they_are():
    images = some_images()
    assert run(images=ddpm_utils.to_model_range(images))[1] == run(images=images)[1]


def test_learning_rate_goes_up_and_comes_down():
    rates = [learning_rate(step, 100, 0.5, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert max(rates) == 0.5 and rates[55] == pytest.approx(0.25) and 0 < rates[-1] < 1e-3
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert (
        learning_rate(0, 5, 1.0, 0) == 1.0 and learning_rate(4, 5, 1.0, 10) == 0.5
    )  # no warm-up; all warm-up


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
        assert (
            ema.model.count == model.count and ema.model.scale == model.scale
        )  # not a mixture of old and new
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


def test_train_takes_the_ema_class_that_a_notebook_has_defined():
    """In notebook 04 it is __main__.EMA: the same words, another class."""
    own = type("EMA", (), {name: vars(EMA)[name] for name in ("__init__", "update")})
    model = small_unet()
    ema = own(model, 0.9)
    run(3, model, ema=ema)
    assert ema.updates == 3 and not same_weights(ema.model, small_unet())


def test_train_updates_the_ema_each_step():
    model = small_unet()
    ema, twin, seen = EMA(model, 0.9), EMA(model, 0.9), []
    run(
        7,
        model,
        ema=ema,
        callback=lambda step: (twin.update(model), seen.append(step)),
        callback_every=1,
    )
    assert ema.updates == 7 == len(seen) and same_weights(ema.model, twin.model)
    assert not same_weights(ema.model, model)


# ------------------------------------------------------------------ stop and go on


def undisturbed(steps=12, **options):
    model = small_unet()
    ema = EMA(model, 0.9)
    _, losses = run(steps, model, ema=ema, **options)
    return model, ema, losses


@pytest.mark.parametrize("end, saved_every", [(8, 4), (7, 3), (11, 1)])
def test_stop_and_resume_gives_the_same_numbers(tmp_path, end, saved_every):
    whole, whole_ema, whole_losses = undisturbed()
    file = tmp_path / "run.pt"

    model = small_unet()
    with pytest.raises(Stop):
        run(
            12,
            model,
            ema=EMA(model, 0.9),
            checkpoint=file,
            checkpoint_every=saved_every,
            callback=stop_at(end),
            callback_every=1,
        )
    assert load_checkpoint(file)["step"] == end // saved_every * saved_every

    torch.manual_seed(99)
    model = small_unet(seed=77)  # other weights: those of the file must replace them
    ema, seen = EMA(model, 0.9), []
    _, losses = run(
        12,
        model,
        ema=ema,
        checkpoint=file,
        checkpoint_every=saved_every,
        callback=seen.append,
        callback_every=1,
    )
    assert seen[0] == end // saved_every * saved_every + 1  # it did not start again
    assert losses == whole_losses and same_weights(model, whole)
    assert same_weights(ema.model, whole_ema.model) and ema.updates == whole_ema.updates
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_killed_process_loses_nothing(tmp_path):
    """A checkpoint after every step, so that the kill most likely comes while one is being written."""
    file = tmp_path / "run.pt"
    kill_a_run(file, after=6)
    saved = load_checkpoint(file)
    assert 6 <= saved["step"] < 2000
    target, seen = saved["step"] + 5, []

    def stop(step):
        seen.append(step)
        if step == target:
            raise Stop

    model = small_unet(seed=77)  # on to a few steps after the kill, and the same without any kill
    ema = EMA(model, 0.9)
    with pytest.raises(Stop):
        run(
            2000,
            model,
            ema=ema,
            checkpoint=file,
            checkpoint_every=1,
            callback=stop,
            callback_every=1,
        )
    assert seen[0] == saved["step"] + 1
    whole = small_unet()
    whole_ema = EMA(whole, 0.9)
    with pytest.raises(Stop):
        run(2000, whole, ema=whole_ema, callback=stop, callback_every=1)
    assert same_weights(model, whole)
    assert same_weights(ema.model, whole_ema.model)


def test_a_finished_run_is_loaded_and_not_trained_again(tmp_path, capsys):
    file, model = tmp_path / "run.pt", small_unet()
    ema = EMA(model, 0.9)
    first, losses = run(6, model, ema=ema, checkpoint=file)
    before, again, calls = file.read_bytes(), small_unet(seed=50), []
    again_ema = EMA(again, 0.9)
    _, losses_again = run(
        6, again, ema=again_ema, checkpoint=file, callback=calls.append, callback_every=1
    )
    assert "finished" in capsys.readouterr().out
    assert losses == losses_again and calls == [] and same_weights(first, again)
    assert same_weights(ema.model, again_ema.model) and file.read_bytes() == before


CHANGES = [
    {"lr": 1e-2},
    {"batch_size": 5},
    {"seed": 3},
    {"warmup": 1},
    {"clip": 0.5},
    {"steps": 13},
    {"loss_function": v_loss},
    {"images": some_images(33)},
    {"images": some_images(seed=5)},
]


@pytest.mark.parametrize("done", ["unfinished", "finished"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path, change, done):
    """Also other images of the same number, and a finished run that is asked for more steps."""
    file = tmp_path / "run.pt"
    if done == "finished":
        run(12, checkpoint=file)
    else:
        unfinished(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"run.pt holds another run.*{next(iter(change))}"):
        run(**{"steps": 12, "checkpoint": file, "checkpoint_every": 4, **change})
    assert file.read_bytes() == before


def test_what_is_inside_a_partial_belongs_to_the_run(tmp_path):
    file = unfinished(tmp_path / "run.pt", loss_function=functools.partial(v_loss, gamma=5))
    with pytest.raises(ValueError, match="loss_function"):
        run(12, checkpoint=file, loss_function=functools.partial(v_loss, gamma=1))


def test_another_schedule_network_or_ema_is_another_run(tmp_path):
    file = unfinished(tmp_path / "run.pt")
    for named, options in {"schedule": {}, "ema": {"ema": 0.9}, "network": {"wide": 24}}.items():
        model = UNet(channels=(8, options.pop("wide", 16)))
        schedule = linear_schedule(60) if named == "schedule" else SCHEDULE
        with pytest.raises(ValueError, match=named):
            train(
                model,
                schedule,
                some_images(),
                12,
                batch_size=4,
                warmup=3,
                checkpoint=file,
                progress=False,
                ema=EMA(model, 0.9) if "ema" in options else None,
            )


def test_a_checkpoint_from_another_device_is_refused_in_words(tmp_path):
    """A GPU's generator has another state, and its numbers would be others."""
    file = unfinished(tmp_path / "run.pt")
    content = torch.load(file, weights_only=True)
    torch.save({**content, "device": "cuda"}, file)
    with pytest.raises(ValueError, match="written on cuda"):
        run(12, checkpoint=file)


def test_a_plain_file_of_weights_is_not_a_training_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "weights.pt", small_unet(), SCHEDULE)
    before = (tmp_path / "weights.pt").read_bytes()
    with pytest.raises(ValueError, match="weights.pt is not a training checkpoint"):
        run(12, checkpoint=tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").read_bytes() == before


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
    assert torch.isfinite(saved["losses"][: saved["step"]]).all()
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
    assert (
        all(torch.isfinite(value).all() for value in saved["model"].values()) and saved["step"] == 4
    )


@pytest.mark.parametrize("end", [1, 10])
def test_the_stop_button_leaves_everything_usable(tmp_path, capsys, end):
    model = small_unet()
    ema = EMA(model, 0.9)

    def stop(step):
        if step == end:
            raise KeyboardInterrupt

    _, losses = run(
        12,
        model,
        ema=ema,
        checkpoint=tmp_path / "run.pt",
        checkpoint_every=4,
        callback=stop,
        callback_every=1,
    )
    _, _, whole = undisturbed()
    assert end - 1 <= len(losses) <= end  # the step in which it came may be missing
    assert losses == whole[: len(losses)]
    assert "Stopped" in capsys.readouterr().out
    assert not model.training and ema.updates == end
    x = ddpm_utils.ddim_sample(ema.model, SCHEDULE, 2, 3, shape=(1, 8, 8), progress=False)
    assert torch.isfinite(x).all()
    if end < 4:  # nothing was saved yet
        return
    resumed = small_unet(seed=50)
    assert (
        run(12, resumed, ema=EMA(resumed, 0.9), checkpoint=tmp_path / "run.pt", checkpoint_every=4)[
            1
        ]
        == whole
    )


# ------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize(
    "capability, dtype",
    [
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((6, 1), torch.float16),
    ],
)
def test_amp_dtype_of_gpus(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *a, **k: True
    )  # what a T4 says, and emulates it
    assert amp_dtype(torch.device("cuda")) is dtype and amp_dtype("cuda:0") is dtype


@pytest.mark.parametrize("has, dtype", [(True, torch.bfloat16), (False, None)])
def test_amp_dtype_of_cpus(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert amp_dtype("cpu") is dtype and amp_dtype(torch.device("cpu")) is dtype


def test_amp_dtype_elsewhere(monkeypatch):
    assert amp_dtype("mps") is None
    monkeypatch.delattr(
        torch.cpu, "_is_avx512_bf16_supported", raising=False
    )  # a torch that does not say
    assert amp_dtype("cpu") is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_train_in_each_number_type(monkeypatch, dtype):
    monkeypatch.setattr(ddpm_utils, "amp_dtype", lambda device: dtype)
    model, losses = run(8)
    assert all(math.isfinite(loss) for loss in losses) and len(losses) == 8
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


# ------------------------------------------------------------------ labels


def labels(n=32):
    return torch.arange(n) % 10


def labelled_run(labels=labels(), steps=12, **options):
    return run(steps, small_unet(classes=10), labels=labels, **options)


def test_labels_are_dropped_one_by_one():
    """A share of them, mixed within a batch, and nothing but the last row means "no label"."""
    n, y = 20_000, torch.arange(20_000) % 10
    dropped = drop_labels(y, 0.1, 10, torch.Generator().manual_seed(0))
    gone = dropped == 10
    assert abs(float(gone.float().mean()) - 0.1) < 5 * math.sqrt(0.09 / n)
    assert torch.equal(dropped[~gone], y[~gone])
    shares = gone.view(-1, 100).float().mean(dim=1)  # batches of 100: mixed within each
    assert 0 < float(shares.min()) + 0.05 and float(shares.max()) < 0.3
    assert torch.equal(drop_labels(y, 0.0, 10), y) and bool((drop_labels(y, 1.0, 10) == 10).all())


def test_labels_reach_the_network_and_the_last_row_is_trained_too():
    model, _ = labelled_run(steps=60, drop=0.5)
    assert bool(model.label.weight.any(dim=1).all())  # all rows have left zero
    model, _ = labelled_run(drop=0.0)
    assert not model.label.weight[10].any()


def test_without_labels_not_one_random_draw_changes():
    """The run of a network with classes and no labels is, but for its last row, the plain one."""
    (_, losses), (model, same) = run(), run(model=small_unet(classes=10))
    assert losses == pytest.approx(same, rel=1e-3)
    assert not model.label.weight[:10].any()


def test_a_labelled_run_goes_on_to_the_same_numbers(tmp_path):
    whole, losses = labelled_run()
    file = tmp_path / "run.pt"
    with pytest.raises(Stop):
        labelled_run(checkpoint=file, checkpoint_every=5, callback=stop_at(7), callback_every=1)
    resumed, again = labelled_run(checkpoint=file, checkpoint_every=5)
    assert losses == again and same_weights(whole, resumed)
    with pytest.raises(ValueError, match="labels"):
        labelled_run(labels=labels().flip(0), checkpoint=file)


@pytest.mark.parametrize(
    "wrong",
    [labels(31), labels() + 1, labels() - 1, labels().float()],
    ids=["length", "too large", "negative", "floats"],
)
def test_wrong_labels_are_named(wrong):
    with pytest.raises(ValueError, match="labels must be int64.*from 0 to 9"):
        labelled_run(labels=wrong)


def test_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="labels"):
        run(labels=labels())


# ------------------------------------------------------------------ what the network predicts


@pytest.mark.parametrize(
    "loss, target",
    [
        (simple_loss, "noise"),
        (v_loss, "v"),
        (min_snr_loss, "v"),
        (functools.partial(v_loss, gamma=2), "v"),
    ],
)
def test_train_notes_what_the_network_predicts(tmp_path, loss, target):
    model = small_unet()
    ema = EMA(model)
    run(4, model, ema=ema, loss_function=loss, checkpoint=tmp_path / "run.pt")
    assert model.target == ema.model.target == target
    assert load_checkpoint(tmp_path / "run.pt")["target"] == target
    wrapped, _ = load_pretrained(tmp_path / "run.pt")  # a learner's own file, by its path
    assert isinstance(wrapped, NoiseFromV) == (target == "v")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 40])
    expected = NoiseFromV(ema.model, SCHEDULE)(x, t) if target == "v" else ema.model(x, t)
    torch.testing.assert_close(wrapped(x, t), expected, rtol=1e-4, atol=1e-5)


def test_a_v_network_without_its_wrapper_is_noticed():
    model, _ = run(2, loss_function=v_loss)
    for sample in (ddpm_utils.ddpm_sample, ddim_sample, ddpm_utils.dpm_solver_sample):
        with pytest.raises(ValueError, match="NoiseFromV"):
            sample(model, SCHEDULE, 1, shape=(1, 8, 8), progress=False)
    ddim_sample(NoiseFromV(model, SCHEDULE), SCHEDULE, 1, 2, shape=(1, 8, 8), progress=False)
    with pytest.raises(ValueError, match="predicts v"):  # nor is it trained on to something else
        run(2, model)


@pytest.mark.skipif(not (WEIGHTS / "fashion.pt").is_file(), reason="no shipped weights here")
def test_the_shipped_network_can_be_trained_further(tmp_path):
    model, schedule = load_network("fashion")
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    before = model.stem.weight.clone()
    losses = train(model, schedule, images, 2, batch_size=2, loss_function=v_loss, progress=False)
    assert len(losses) == 2 and not torch.equal(model.stem.weight, before)
    save_checkpoint(tmp_path / "mine.pt", model, schedule)
    mine, _ = load_pretrained(tmp_path / "mine.pt")
    assert isinstance(mine, NoiseFromV)


@pytest.mark.parametrize(
    "wrong, named", [({"ema": 0.995}, "EMA"), ({"loss_function": "v"}, "v_loss")]
)
def test_natural_mistakes_are_told_what_is_expected(wrong, named):
    with pytest.raises(ValueError, match=named):
        run(2, **wrong)


@pytest.mark.parametrize("steps, warmup", [(5, 0), (100, 10), (5000, 200)])
def test_the_default_warm_up_suits_a_short_run(monkeypatch, steps, warmup):
    seen = []

    def note(step, steps, peak, warmup):
        seen.append(warmup)
        raise Stop

    monkeypatch.setattr(ddpm_utils, "learning_rate", note)
    with pytest.raises(Stop):
        run(steps, warmup=None)
    assert seen == [warmup]


def test_the_table_of_recipes_is_what_was_measured():
    runs = json.loads((ROOT / "tests" / "measure" / "recipes.json").read_text())["runs"]
    text = "\n".join(prose(next(NOTEBOOKS.glob("04_*.ipynb"))))
    rows = re.findall(r"^\| .* \| ([\d,]+) \| ([\d.]+) \|$", text, re.M)
    measured = {(f"{run['steps']:,}", f"{run['distance']:.1f}") for run in runs.values()}
    assert len(rows) == 7 and set(rows) <= measured
    for name in ("ours", "ours, seed 1", "ours, seed 2", "no EMA", "predict the noise"):
        assert f"{runs[name]['distance']:.1f}" in text, name

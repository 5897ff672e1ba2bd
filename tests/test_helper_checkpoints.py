"""Files: checkpoints that are whole or not there, say what they are, and are read back."""

import builtins
import errno

import numpy as np
import pytest
import torch
from series import SCHEDULE, run, same_weights, small_unet, unfinished

import ddpm_utils
from ddpm_utils import (
    EMA,
    NoiseFromV,
    UNet,
    load_checkpoint,
    load_network,
    load_pretrained,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_save_and_load(tmp_path):
    model, twin = small_unet(1), small_unet(2)
    ema, twin_ema = EMA(model), EMA(twin)
    for _ in range(3):
        ema.update(small_unet(5))
    save_checkpoint(tmp_path / "deep" / "er" / "a.pt", model, SCHEDULE, ema, remark="mine")
    content = load_checkpoint(tmp_path / "deep" / "er" / "a.pt", twin, twin_ema)
    assert (
        same_weights(model, twin)
        and same_weights(ema.model, twin_ema.model)
        and twin_ema.updates == 3
    )
    assert (
        content["remark"] == "mine"
        and content["unet"] == model.config
        and content["target"] == "noise"
    )
    torch.testing.assert_close(
        ddpm_utils.NoiseSchedule(content["betas"]).alpha_bars, SCHEDULE.alpha_bars
    )


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"<html><body>Please log in</body></html>",
    ],
    ids=["empty", "start", "half", "one byte short", "a web page"],
)
def test_a_damaged_checkpoint(tmp_path, damage):
    file = tmp_path / "a.pt"
    save_checkpoint(file, small_unet(), SCHEDULE)
    file.write_bytes(damage(file.read_bytes()))
    model = small_unet(9)
    with pytest.raises(ValueError, match="a.pt can't be read"):
        load_checkpoint(file, model)
    assert same_weights(model, small_unet(9))
    with pytest.raises(ValueError, match="a.pt can't be read"):
        run(4, checkpoint=file)  # not silently replaced either


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"weights": 1}, torch.zeros(3), {"model": 3}],
    ids=["list", "no model", "tensor", "model is a number"],
)
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
    # as classifier.pt, with no word of a UNet in it
    torch.save({"model": other.state_dict()}, tmp_path / "b.pt")
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
    monkeypatch.setattr(
        ddpm_utils, "open", lambda *a: FullDisk(builtins.open(*a), room), raising=False
    )
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


def test_a_full_disk_in_the_middle_of_training_is_said(tmp_path, monkeypatch):
    file = unfinished(tmp_path / "run.pt")
    before = file.read_bytes()
    monkeypatch.setattr(
        ddpm_utils, "open", lambda *a: FullDisk(builtins.open(*a), 5000), raising=False
    )
    with pytest.raises(OSError, match="run.pt could not be written"):
        run(12, checkpoint=file, checkpoint_every=4)
    assert file.read_bytes() == before


# ------------------------------------------------------------------ what people hand over


def test_whatever_is_saved_is_read_back_and_the_rest_is_refused(tmp_path):
    """A number of numpy in a checkpoint can't be read with weights_only: it must not be written."""
    file = tmp_path / "a.pt"
    save_checkpoint(file, small_unet(), SCHEDULE, more={"lr": 1e-3, "names": ["a"], "none": None})
    before = file.read_bytes()
    assert load_checkpoint(file)["more"] == {"lr": 1e-3, "names": ["a"], "none": None}
    with pytest.raises(ValueError, match="numbers, texts"):
        save_checkpoint(file, small_unet(), SCHEDULE, lr=np.float64(1e-3))
    assert file.read_bytes() == before and leftovers(tmp_path) == ["a.pt"]


def test_numbers_of_numpy_in_the_settings_of_a_run(tmp_path):
    file = tmp_path / "run.pt"
    _, losses = run(
        np.int64(4),
        lr=np.logspace(-3, -2, 3)[1],
        clip=np.float32(1),
        checkpoint=file,
        seed=np.int64(1),
    )
    assert load_checkpoint(file)["step"] == 4 and len(losses) == 4


def test_a_whole_pickled_model_is_told_how_to_save_itself(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="state_dict"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_folder_and_a_memory_that_is_full_are_not_called_damaged(tmp_path, monkeypatch):
    with pytest.raises(OSError):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "a.pt", small_unet(), SCHEDULE)

    def full(*args, **options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] not enough memory: you tried to allocate"
        )

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", small_unet(), SCHEDULE)

    def refused(*args, **options):
        raise PermissionError(13, "Permission denied", "a.pt")

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError):
        load_checkpoint(tmp_path / "a.pt")


def test_a_frozen_network_is_told_from_one_to_train(tmp_path):
    save_checkpoint(tmp_path / "a.pt", small_unet(), SCHEDULE)
    frozen, _ = load_pretrained(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="frozen: load_network"):
        run(2, frozen)
    run(2, load_network(tmp_path / "a.pt")[0])


def test_a_plain_state_dict_is_read(tmp_path):
    torch.save(small_unet(3).state_dict(), tmp_path / "a.pt")
    model = small_unet(4)
    load_checkpoint(tmp_path / "a.pt", model)
    assert same_weights(model, small_unet(3))
    with pytest.raises(ValueError, match="how its UNet was built"):
        load_network(tmp_path / "a.pt")


def test_a_wrapped_and_a_compiled_network_are_saved_as_the_plain_one(tmp_path):
    model = small_unet()
    save_checkpoint(tmp_path / "v.pt", NoiseFromV(model, SCHEDULE), SCHEDULE)
    assert load_checkpoint(tmp_path / "v.pt")["target"] == "v"
    assert isinstance(load_pretrained(tmp_path / "v.pt")[0], NoiseFromV)
    compiled = torch.compile(model)  # lazy: nothing is compiled until it is called
    save_checkpoint(tmp_path / "c.pt", compiled, SCHEDULE)
    twin = small_unet(8)
    load_checkpoint(tmp_path / "c.pt", twin)
    assert same_weights(model, twin)
    load_checkpoint(tmp_path / "c.pt", torch.compile(small_unet(9)))


def test_links_stay_links_and_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "disk").mkdir()
    save_checkpoint("~/disk/a.pt", small_unet(), SCHEDULE)
    (tmp_path / "link.pt").symlink_to(tmp_path / "disk" / "a.pt")
    save_checkpoint("~/link.pt", small_unet(5), SCHEDULE)
    assert (tmp_path / "link.pt").is_symlink()
    model = small_unet()
    load_checkpoint("~/disk/a.pt", model)
    assert same_weights(model, small_unet(5))


def test_the_wrapper_follows_its_network_to_another_device():
    wrapped = NoiseFromV(small_unet(), SCHEDULE).to("meta")
    assert wrapped.signal_scale.device.type == wrapped.noise_scale.device.type == "meta"
    assert list(wrapped.state_dict()) == [f"model.{name}" for name in small_unet().state_dict()]

"""Files: checkpoints that are whole or not there, say what they are, and are read back."""

import io
from unittest import mock

import numpy as np
import pytest
import torch
from series import SCHEDULE, run, same_weights, small_unet, unfinished

import ddpm_utils as d

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = OSError("No space left on device")


@pytest.fixture
def file(tmp_path):
    """The checkpoint of a small network, the only file in its folder."""
    d.save_checkpoint(tmp_path / "a.pt", small_unet(), SCHEDULE)
    return tmp_path / "a.pt"


def test_save_and_load(tmp_path):
    file, model, twin = tmp_path / "deep" / "er" / "a.pt", small_unet(1), small_unet(2)
    ema, twin_ema = d.EMA(small_unet(5)), d.EMA(twin)
    ema.updates, more = 3, {"lr": 1e-3, "names": ["a"], "none": None}
    d.save_checkpoint(file, model, SCHEDULE, ema, more=more)
    content = d.load_checkpoint(file, twin, twin_ema)
    assert same_weights(model, twin)
    assert same_weights(ema.model, twin_ema.model) and twin_ema.updates == 3
    assert (content["more"], content["unet"], content["target"]) == (more, model.config, "noise")
    torch.testing.assert_close(d.NoiseSchedule(content["betas"]).alpha_bars, SCHEDULE.alpha_bars)


# ------------------------------------------------------------------ what is not one is refused


def test_a_damaged_checkpoint(file):
    good, model = file.read_bytes(), small_unet(9)
    for damaged in (b"", good[:100], good[: len(good) // 2], good[:-1], b"<html>Log in</html>"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.pt can't be read"):
            d.load_checkpoint(file, model)
        with pytest.raises(ValueError, match="a.pt can't be read"):
            run(4, model, checkpoint=file)
        # not silently replaced either
        assert same_weights(model, small_unet(9)) and file.read_bytes() == damaged


class Evil:
    def __reduce__(self):
        return print, ("run!",)


@pytest.mark.parametrize("content, words", [
    ([1, 2], "holds no network"), ({"weights": 1}, "holds no network"),
    (torch.zeros(3), "holds no network"), ({"model": 3}, "does not fit"),
    ({"model": d.UNet(channels=(8, 24)).state_dict(), "unet": {"channels": [8, 24]}},
     r"does not fit: it is of UNet\(\*\*{'channels': \[8, 24\]}"),
    # as classifier.pt, with no word of a UNet in it
    ({"model": d.GarmentClassifier().state_dict()}, "does not fit: it is of another network"),
    ({"model": Evil()}, "can't be read"), (torch.nn.Linear(2, 2), r"can't be read.*state_dict")])
def test_a_file_that_is_something_else(tmp_path, capsys, content, words):
    torch.save(content, tmp_path / "a.pt")
    model = small_unet()
    with pytest.raises(ValueError, match=rf"a\.pt {words}"):
        d.load_checkpoint(tmp_path / "a.pt", model)
    assert same_weights(model, small_unet())  # also where some of the tensors would have fitted
    assert capsys.readouterr().out == ""  # the code that a file holds is not run


def test_what_else_can_go_wrong_is_not_called_damaged(file, monkeypatch):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        d.load_checkpoint(file.with_name("none.pt"))
    with pytest.raises(OSError):
        d.load_checkpoint(file.parent)
    for error in (PermissionError(13, "Permission denied"), RuntimeError(
            "[enforce fail at alloc_cpu.cpp] not enough memory: you tried to allocate")):
        monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
        with pytest.raises(type(error), match="not enough memory|Permission denied"):
            d.load_checkpoint(file)


# ------------------------------------------------------------------ whole or not at all


class FullDisk(io.FileIO):
    """A file that takes so many bytes and then says what a full disk says."""
    room = 0

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise FULL
        return super().write(data)


@pytest.mark.parametrize("function, broken, room", [
    ("ddpm_utils.open", FullDisk, 0), ("ddpm_utils.open", FullDisk, 5000),
    ("os.fsync", mock.Mock(side_effect=FULL), 0), ("os.replace", mock.Mock(side_effect=FULL), 0)])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, function, broken, room):
    file = unfinished(tmp_path / "a.pt")
    before = file.read_bytes()
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(function, broken, raising=False)
    with pytest.raises(OSError, match="a.pt could not be written"):
        d.save_checkpoint(file, small_unet(2), SCHEDULE)
    with pytest.raises(OSError, match="a.pt could not be written"):
        run(12, checkpoint=file, checkpoint_every=4)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_what_could_not_be_read_again_and_a_stop_leave_the_old_file(file, monkeypatch):
    """A number of numpy in a checkpoint can't be read with weights_only: it must not be written."""
    before = file.read_bytes()
    with pytest.raises(ValueError, match="numbers, texts"):
        d.save_checkpoint(file, small_unet(2), SCHEDULE, lr=np.float64(1e-3))
    with pytest.raises(OSError, match="b.pt could not be written"):
        d.save_checkpoint(file / "b.pt", small_unet(2), SCHEDULE)  # a file is not a folder
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        d.save_checkpoint(file, small_unet(2), SCHEDULE)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


# ------------------------------------------------------------------ what people hand over


def test_numbers_of_numpy_in_the_settings_of_a_run(tmp_path):
    options = {"lr": np.logspace(-3, -2, 3)[1], "clip": np.float32(1), "seed": np.int64(1)}
    _, losses = run(np.int64(4), checkpoint=tmp_path / "run.pt", **options)
    assert d.load_checkpoint(tmp_path / "run.pt")["step"] == 4 and len(losses) == 4


def test_a_plain_state_dict_is_read_and_no_ema_found_where_none_is(file):
    plain, model = file.with_name("b.pt"), small_unet(4)
    torch.save(small_unet(3).state_dict(), plain)
    d.load_checkpoint(plain, model)
    assert same_weights(model, small_unet(3))
    with pytest.raises(ValueError, match="how its UNet was built"):
        d.load_network(plain)
    for without in (plain, file):
        with pytest.raises(ValueError, match="holds no ema"):
            d.load_checkpoint(without, model, d.EMA(model))


def test_a_wrapped_and_a_compiled_network_are_saved_as_the_plain_one_to_be_trained(file):
    model = small_unet(7)
    d.save_checkpoint(file, d.NoiseFromV(model, SCHEDULE), SCHEDULE)
    assert isinstance(d.load_pretrained(file)[0], d.NoiseFromV)
    d.save_checkpoint(file, torch.compile(model), SCHEDULE)  # lazy: compiled when it is called
    bare, _ = d.load_network(file)
    assert same_weights(model, bare)
    d.load_checkpoint(file, torch.compile(small_unet(9)))
    with pytest.raises(ValueError, match="frozen: load_network"):
        run(2, d.load_pretrained(file)[0])
    run(2, bare)


def test_links_stay_links_and_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    d.save_checkpoint("~/disk/a.pt", small_unet(), SCHEDULE)
    (tmp_path / "link.pt").symlink_to(tmp_path / "disk" / "a.pt")
    d.save_checkpoint("~/link.pt", small_unet(5), SCHEDULE)
    assert (tmp_path / "link.pt").is_symlink()
    assert same_weights(d.load_network("~/disk/a.pt")[0], small_unet(5))


def test_the_wrapper_follows_its_network_to_another_device():
    wrapped = d.NoiseFromV(small_unet(), SCHEDULE).to("meta")
    assert wrapped.signal_scale.device.type == wrapped.noise_scale.device.type == "meta"
    assert list(wrapped.state_dict()) == [f"model.{name}" for name in small_unet().state_dict()]

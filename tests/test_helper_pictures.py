"""Pixels, grids of pictures, GIFs, and where they are written."""

import os
import pathlib
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from series import ROOT

import ddpm_utils
from ddpm_utils import output_path, save_gif, set_up, show_images, to_model_range, to_uint8


def ramp(n=4, channels=1, low=0, high=255, size=6):
    """n pictures whose pixels run evenly from low to high."""
    values = torch.linspace(low, high, n * channels * size * size).round().to(torch.uint8)
    return values.view(n, channels, size, size)


# ------------------------------------------------------------------ pixels


def test_every_pixel_value_survives_the_round_trip():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(u8)
    assert x.dtype == torch.float32 and float(x[0]) == -1 and float(x[255]) == 1
    assert torch.equal(to_uint8(x), u8)
    torch.testing.assert_close(x, (2 * torch.arange(256) / 255 - 1).float())  # evenly spaced


def test_what_is_outside_is_cut_off_and_what_is_between_is_rounded():
    x = torch.tensor([-9.0, -1.001, -1.0, 0.0, 1.0, 1.001, 9.0, -1 + 0.9 / 127.5, -1 + 0.4 / 127.5])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255, 1, 0]


@pytest.mark.parametrize("shape", [(3,), (2, 1, 4, 4), (2, 3, 4, 4)])
def test_any_shape_and_float_type(shape):
    u8 = torch.randint(0, 256, shape, dtype=torch.uint8)
    kept = u8.clone()
    assert to_model_range(u8).shape == shape and torch.equal(u8, kept)
    x = to_model_range(u8).double().requires_grad_()
    assert torch.equal(to_uint8(x), u8) and to_uint8(x).dtype == torch.uint8


# ------------------------------------------------------------------ grids


def drawn(figure):
    return [image for axis in figure.axes for image in axis.get_images()]


def test_a_grid_has_every_picture_in_its_place():
    images = ramp(7)
    (image,) = drawn(show_images(images, columns=3))
    grid = np.asarray(image.get_array())[:, :, 0]
    for i in range(7):  # a border of one pixel around each
        top, left = 1 + (i // 3) * 7, 1 + (i % 3) * 7
        assert np.array_equal(grid[top : top + 6, left : left + 6], images[i, 0].numpy()), i


@pytest.mark.parametrize("titles", [None, ["a", "b"]])
def test_one_range_for_all(titles):
    """A dark picture stays dark beside a bright one, and alone."""
    dark, bright = ramp(1, high=50), ramp(1, low=200)
    for images in (torch.cat([dark, bright]), torch.cat([dark, dark])):
        for image in drawn(show_images(images, titles)):
            values = np.asarray(image.get_array())
            assert values.dtype == np.uint8
            assert values.ndim == 3 and values.shape[2] == 3 or image.get_clim() == (0, 255)


def test_titles_and_title():
    figure = show_images(ramp(3), ["one", "two", "three"], columns=2, title="above")
    assert [axis.get_title() for axis in figure.axes][:3] == ["one", "two", "three"]
    assert figure._suptitle.get_text() == "above" and len(drawn(figure)) == 3
    for i, image in enumerate(drawn(figure)):
        assert np.array_equal(
            np.asarray(image.get_array()).reshape(6, 6, -1)[:, :, 0], ramp(3)[i, 0].numpy()
        )


def test_floats_are_the_same_as_bytes_and_colours_stay():
    for images in (ramp(2), ramp(2, channels=3)):
        (as_bytes,), (as_floats,) = (
            drawn(show_images(images)),
            drawn(show_images(to_model_range(images))),
        )
        assert np.array_equal(as_bytes.get_array(), as_floats.get_array())
    grid = np.asarray(as_bytes.get_array())
    assert np.array_equal(grid[1:7, 1:7], ramp(2, channels=3)[0].permute(1, 2, 0).numpy())


def test_rows_are_named_and_titles_are_over_each_image():
    figure = show_images(ramp(4), columns=2, rows=["noisy", "clean"])
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.texts] == ["noisy", "clean"]
    assert [label.xy for label in axis.texts] == [(0, 3.5), (0, 10.5)]  # the middle of 6 + 1 pixels
    figure = show_images(ramp(4), list("abcd"), columns=2, rows=["noisy", "clean"])
    found = [[label.get_text() for label in axis.texts] for axis in figure.axes]
    assert found == [["noisy"], [], ["clean"], []]
    for wrong in (["one"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="rows must hold 2 names"):
            show_images(ramp(4), columns=2, rows=wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_drawn_black(tmp_path, value):
    x = torch.zeros(2, 1, 4, 4)
    x[1, 0, 2, 2] = value
    for draw in (to_uint8, show_images, lambda x: save_gif(x, tmp_path / "a.gif")):
        with pytest.raises(ValueError, match="not numbers"):
            draw(x)
    assert not list(tmp_path.iterdir())


def test_floats_up_to_255_are_not_drawn_white(tmp_path):
    x = torch.arange(2 * 64).view(2, 1, 8, 8).float()
    for draw in (to_uint8, show_images, lambda x: save_gif(x, tmp_path / "a.gif")):
        with pytest.raises(ValueError, match="uint8"):
            draw(x)
    for fine in (20 * torch.randn(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.empty(0, 1, 8, 8)):
        to_uint8(fine)  # a sampler without clipping may go far, to both sides


def test_floats_from_0_to_1_are_not_drawn_pale_without_a_word(tmp_path, recwarn):
    x = torch.linspace(0, 1, 8 * 64).view(8, 1, 8, 8)
    for draw in (show_images, lambda x: save_gif(x, tmp_path / "a.gif")):
        with pytest.warns(UserWarning, match="2 \\* x - 1") as seen:
            draw(x)
        assert seen[0].filename == __file__, "the warning doesn't point at the caller"
        recwarn.clear()
        for fine in (2 * x - 1, x / 2 + 0.5, x[:7], (255 * x).to(torch.uint8), 1.5 * x):
            draw(fine)
        assert not recwarn.list


def test_one_picture_and_many():
    assert isinstance(show_images(ramp(1)), plt.Figure)
    show_images(ramp(23))
    show_images(torch.zeros(2, 1, 5, 9).requires_grad_())
    assert (
        show_images(ramp(1), scale=3).get_size_inches()[0]
        > show_images(ramp(1)).get_size_inches()[0]
    )


# ------------------------------------------------------------------ GIF


def read_gif(path):
    with Image.open(path) as gif:
        return [
            (np.asarray(frame.convert("RGB")).copy(), frame.info["duration"])
            for frame in ImageSequence.Iterator(gif)
        ], gif.info.get("loop")


@pytest.mark.parametrize("form", ["(F, 1, H, W)", "(F, H, W)", "floats"])
def test_a_gif_has_the_frames_exactly(tmp_path, form):
    frames = ramp(5, size=8)
    given = {"(F, H, W)": frames[:, 0], "floats": to_model_range(frames)}.get(form, frames)
    path = save_gif(given, tmp_path / "deep" / "a.gif", milliseconds=70, hold=1500)
    assert path == tmp_path / "deep" / "a.gif" and isinstance(path, pathlib.Path)
    read, loop = read_gif(path)
    assert len(read) == 5 and loop == 0  # for ever
    for frame, (pixels, _) in zip(frames[:, 0].numpy(), read):
        assert np.array_equal(pixels, np.repeat(frame[:, :, None], 3, axis=2))
    assert [duration for _, duration in read] == [70, 70, 70, 70, 1500]


def test_one_range_for_all_frames(tmp_path):
    """A frame that uses a fifth of the range must not be stretched to all of it."""
    dim, full = (
        torch.linspace(-0.1, 0.1, 64).view(1, 1, 8, 8),
        torch.linspace(-1, 1, 64).view(1, 1, 8, 8),
    )
    read, _ = read_gif(save_gif(torch.cat([dim, full]), tmp_path / "a.gif"))
    assert read[0][0].min() == 115 and read[0][0].max() == 140
    assert read[1][0].min() == 0 and read[1][0].max() == 255


def test_enlarged_and_coloured(tmp_path):
    frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    frames[0, 0], frames[1, 2] = 255, 255  # red, then blue
    read, _ = read_gif(save_gif(frames, str(tmp_path / "a.gif"), enlarge=3))
    assert [pixels.shape for pixels, _ in read] == [(12, 12, 3)] * 2
    assert (read[0][0] == [255, 0, 0]).all() and (read[1][0] == [0, 0, 255]).all()
    checks = ((torch.arange(4)[:, None] + torch.arange(4)) % 2 * 255).to(torch.uint8)
    read, _ = read_gif(save_gif(checks[None], tmp_path / "b.gif", enlarge=2))
    assert np.array_equal(read[0][0][:, :, 0], checks.numpy().repeat(2, 0).repeat(2, 1))


def test_a_gif_with_frames_that_do_not_change_lasts_as_long(tmp_path):
    read, _ = read_gif(
        save_gif(ramp(1).repeat(4, 1, 1, 1), tmp_path / "a.gif", milliseconds=50, hold=1000)
    )
    assert sum(duration for _, duration in read) == 1150


def test_a_gif_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="a.gif could not be written"):
        save_gif(ramp(), tmp_path / "file" / "a.gif")
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(OSError, match="folder.gif could not be written"):
        save_gif(ramp(), tmp_path / "folder.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.gif"]


def test_a_full_disk_leaves_the_old_gif(tmp_path, monkeypatch):
    path = save_gif(ramp(), tmp_path / "a.gif")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ddpm_utils.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_gif(ramp(9), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.gif"]


# ------------------------------------------------------------------ where it goes


def test_a_learner_writes_to_outputs_and_a_maintainer_to_img(tmp_path, monkeypatch):
    monkeypatch.setattr(ddpm_utils, "HERE", tmp_path)
    for value in (None, "", "0"):
        monkeypatch.delenv("DDPM_MAINTAINER", raising=False)
        if value is not None:
            monkeypatch.setenv("DDPM_MAINTAINER", value)
        assert output_path("a.png") == tmp_path / "outputs" / "a.png"
    assert not (tmp_path / "img").exists() and (tmp_path / "outputs").is_dir()
    monkeypatch.setenv("DDPM_MAINTAINER", "1")
    assert output_path("a.png") == tmp_path / "img" / "a.png" and (tmp_path / "img").is_dir()
    assert output_path("run.pt") == tmp_path / "outputs" / "run.pt", "img/ is for pictures"


def test_a_checkout_that_cannot_be_written_leaves_outputs_at_home(tmp_path, monkeypatch):
    """Not in a folder under the system's temporary one, where another user may write too."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.delenv("DDPM_MAINTAINER", raising=False)
    monkeypatch.setattr(ddpm_utils.os, "access", lambda *args: False)
    assert output_path("a.gif") == tmp_path / "outputs" / "a.gif"
    save_gif(ramp(), output_path("a.gif"))


def test_outputs_are_ignored_by_git():
    ignored = (pathlib.Path(ddpm_utils.__file__).parent / ".gitignore").read_text().split()
    assert "outputs/" in ignored and "data/" in ignored


# ------------------------------------------------------------------ set_up


def test_set_up_seeds_everything_and_says_so_in_one_line(capsys):
    import random

    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with plt.rc_context():
        device = set_up(3)
        first = draws()
        set_up(3)
        assert draws() == first
        set_up(4)
        assert all(a != b for a, b in zip(draws(), first))
        capsys.readouterr()
        set_up()
    out, err = capsys.readouterr()
    assert isinstance(device, torch.device) and device.type in ("cuda", "mps", "cpu")
    assert out.startswith(f"device: {device.type}") and out.count("\n") == 1 and err == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_a_letter_that_the_terminal_lacks_ends_no_run(tmp_path, encoding):
    (tmp_path / "čaj.jpg").write_bytes(b"no image")
    Image.new("L", (8, 8)).save(tmp_path / "tea.png")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from ddpm_utils import load_images, set_up;"
        "set_up(); print(len(load_images(sys.argv[2], 8)))"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"1 files left out: ?aj.jpg" in done.stdout and done.stdout.split()[-1] == b"1"

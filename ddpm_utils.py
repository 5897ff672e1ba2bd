"""What the notebooks of this series share.

Two kinds of things stand here. What a notebook teaches (the schedule, the network, the loss, the samplers, …) stands
here in the notebook's very words, so that the next notebooks can use it; tests compare the two. And the plumbing that
nobody wants to read in a lesson: data, pictures, checkpoints.

`python ddpm_utils.py` prints "ready", or what is missing.

Conventions: t is the paper's t, 1 … T; arrays over t have T + 1 entries, and entry 0 is the clean picture. Pictures
are float32 (B, C, H, W) with pixels in [-1, 1]; picture files and data sets are uint8 (N, C, H, W), 0 … 255.
"DDPM" in a docstring is Ho et al. 2020, arXiv 2006.11239.
"""
import contextlib
import copy
import hashlib
import http.client
import math
import os
import pathlib
import random
import shutil
import socket
import sys
import tempfile
import threading
import urllib.request
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from cycler import cycler
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = "OWNER/diffusion-notebooks"  # the notebooks' badges and set-up cells name it too: see the README
TAG = "v1.0"
WAIT = 15  # seconds without a byte after which a server is given up


# ------------------------------------------------------------------ argument checks, one line where they are called

def _check(ok, message):
    if not ok:
        raise ValueError(message)


def _check_number(name, value, low, high=math.inf, integer=False):
    kind = "an integer" if integer else "a number"
    right_type = isinstance(value, (int, np.integer) if integer else (int, float, np.integer, np.floating))
    _check(right_type and not isinstance(value, bool) and low <= value <= high,
           f"{name} is {value!r}; wanted {kind} from {low} to {high}")


def _check_floats(name, x):
    given = f"a {x.dtype} tensor of shape {tuple(x.shape)}" if torch.is_tensor(x) else f"a {type(x).__name__}"
    _check(torch.is_tensor(x) and x.is_floating_point() and x.dim() >= 1 and x.numel() > 0,
           f"{name} is {given}; wanted a non-empty float tensor of shape (B, …)")


def _check_same_shape(name, x, other_name, other):
    _check_floats(name, x)
    _check_floats(other_name, other)
    _check(x.shape == other.shape,
           f"{name} has shape {tuple(x.shape)}, {other_name} has shape {tuple(other.shape)}; wanted the same shape")


def _check_t(t, batch, low, high):
    given = f"a {t.dtype} tensor of shape {tuple(t.shape)}" if torch.is_tensor(t) else repr(t)
    _check(torch.is_tensor(t) and t.dtype == torch.int64 and tuple(t.shape) == (batch,),
           f"t is {given}; wanted an int64 tensor of shape ({batch},), one step per picture, "
           f"as torch.full(({batch},), 1) makes it")
    if t.device.type == "cpu":  # on another device this look would make every training step wait
        _check(int(t.min()) >= low and int(t.max()) <= high,
               f"t runs from {int(t.min())} to {int(t.max())}; wanted {low} to {high}")


def _check_uint8(name, images):
    given = f"a {images.dtype} tensor of shape {tuple(images.shape)}" if torch.is_tensor(images) else type(images)
    _check(torch.is_tensor(images) and images.dtype == torch.uint8 and images.dim() == 4 and len(images) > 0,
           f"{name} is {given}; wanted a uint8 tensor of shape (N, C, H, W) with N at least 1")


@contextlib.contextmanager
def _turn_down_if_out_of_memory(argument):
    """Around a function: where the device's memory is full, the error names the argument that needs less of it."""
    try:
        yield
    except RuntimeError as error:  # CUDA's own error is one, and Apple GPUs and CPUs have no other
        if not any(said in str(error) for said in ("out of memory", "t allocate memory", "not enough memory")):
            raise
        raise MemoryError(f"out of memory: turn {argument} down, or free some by restarting the kernels that hold it "
                          f"({str(error).splitlines()[0][:200]})") from error


# ------------------------------------------------------------------ set-up

# Okabe and Ito's colours: they stay apart for the colour-blind, and in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def set_up(seed=0):
    """Seeds everything, picks the fastest device, sets the look of the plots, and says so in one line.

    seed: an integer, 0 or more. Returns a torch.device: cuda, else mps, else cpu. ValueError for another seed.
    """
    _check_number("seed", seed, 0, 2**32 - 1, integer=True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    plt.rcParams.update({"axes.prop_cycle": cycler(color=COLOURS), "font.size": 12, "axes.titlesize": 13,
                         "figure.figsize": (8, 4), "figure.dpi": 80, "savefig.bbox": "tight", "image.cmap": "gray",
                         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    if torch.cuda.is_available():
        device, what = torch.device("cuda"), torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device, what = torch.device("mps"), "Apple GPU"
    else:
        device, what = torch.device("cpu"), f"{torch.get_num_threads()} threads"
    print(f"device: {device.type} ({what}), seed: {seed}, torch {torch.__version__.split('+')[0]}")
    return device


def progress_bar(items, desc, show=True, **options):
    """A tqdm bar over items (an iterable with a length), on the cell's own output; show=False gives a silent one.

    Plain text rather than a widget: it looks the same in JupyterLab, in Colab and in the saved page. Options go to tqdm.
    """
    return tqdm(items, desc=desc, file=sys.stdout, disable=not show, ncols=100, mininterval=0.3, **options)


def output_path(name):
    """Where a notebook writes the picture called name: `outputs/`, which git ignores.

    With the environment variable DDPM_MAINTAINER=1 it is `img/`, whose pictures the README shows; a checkpoint (.pt)
    goes to `outputs/` all the same.
    """
    to_img = os.environ.get("DDPM_MAINTAINER") == "1" and not name.endswith(".pt")
    folder = HERE / ("img" if to_img else "outputs")
    try:
        folder.mkdir(exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:  # a read-only checkout
        folder = pathlib.Path(tempfile.gettempdir()) / "ddpm_outputs"
        folder.mkdir(exist_ok=True)
    return folder / name


# ------------------------------------------------------------------ data

CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
# MD5 of the unpacked files: torchvision checks the packed ones only, and only when it has just downloaded them
MD5 = {"train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
       "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
       "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
       "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965"}


class ImageSet:
    """Pictures in memory: `.images` uint8 (N, C, H, W), `.labels` int64 (N,), `.classes` names, `.source` a text."""

    def __init__(self, images, labels, classes, source):
        self.images, self.labels, self.classes, self.source = images, labels, classes, source

    def __len__(self):
        return len(self.images)

    @property
    def is_stand_in(self):
        """True where the pictures are the drawn stand-in and not the data set."""
        return "stand-in" in self.source


def _data_folder(root=None):
    return pathlib.Path(root or os.environ.get("DDPM_DATA") or HERE / "data").expanduser()


def _bad_files(folder):
    """{name: 'missing' or 'damaged'} of Fashion-MNIST's four unpacked files."""
    bad = {}
    for name, md5 in MD5.items():
        path = folder / "FashionMNIST" / "raw" / name
        if not path.is_file():
            bad[name] = "missing"
        elif hashlib.md5(path.read_bytes()).hexdigest() != md5:
            bad[name] = "damaged"
    return bad


def _wait_for_answer(urls):
    """OSError where none answers within 3 * WAIT: a name server, and each of a name's addresses, can hang in turn."""
    def knock():
        for url in urls:
            with contextlib.suppress(Exception):  # an error is an answer, too: torchvision will say which
                urllib.request.urlopen(url, timeout=WAIT).close()
        answered.set()

    answered = threading.Event()
    threading.Thread(target=knock, daemon=True).start()
    if not answered.wait(3 * WAIT):
        raise OSError(f"no answer within {3 * WAIT} seconds")


def _download_fashion_mnist(folder):
    """Downloads into a folder of its own first, so that no half file is ever found under the real name."""
    folder.mkdir(parents=True, exist_ok=True)
    old_wait = socket.getdefaulttimeout()
    socket.setdefaulttimeout(WAIT)  # torchvision sets no time limit of its own
    room = pathlib.Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
    try:
        _wait_for_answer(torchvision.datasets.FashionMNIST.mirrors)
        torchvision.datasets.FashionMNIST(room, download=True)
        bad = _bad_files(room)
        if bad:
            raise OSError(f"what came is not Fashion-MNIST: {bad}")
        target = folder / "FashionMNIST" / "raw"
        target.mkdir(parents=True, exist_ok=True)
        for name in MD5:
            os.replace(room / "FashionMNIST" / "raw" / name, target / name)
    finally:
        socket.setdefaulttimeout(old_wait)
        shutil.rmtree(room, ignore_errors=True)


def load_fashion_mnist(split="train", root=None):
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), or a drawn stand-in where it can't be had.

    split: "train" (60,000 pictures) or "test" (10,000). root: the folder that holds or gets `FashionMNIST/raw/`;
    without it the environment variable DDPM_DATA, then `data/` beside this file. Missing or damaged files are
    downloaded by torchvision; a server that sends nothing for 15 seconds is given up.

    Returns an ImageSet: `.images` uint8 (N, 1, 28, 28), `.labels` int64 (N,), `.classes` ten names, `.source`
    "Fashion-MNIST" or a text with "stand-in" in it. ValueError for another split.
    """
    _check(split in ("train", "test"), f'split is {split!r}; wanted "train" or "test"')
    folder = _data_folder(root)
    bad = _bad_files(folder)
    if bad:
        damaged = [name for name, what in bad.items() if what == "damaged"]
        if damaged:
            print(f"Damaged, will be replaced: {', '.join(damaged)}")
        print("Downloading Fashion-MNIST (30 MB) …")
        try:
            _download_fashion_mnist(folder)
        except (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException) as error:
            reason = ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:120]
            print(f"Fashion-MNIST can't be had here ({reason}): using a stand-in, silhouettes drawn by code.")
            return _draw_stand_in(split)
    data = torchvision.datasets.FashionMNIST(folder, train=split == "train", download=False)
    return ImageSet(data.data[:, None].contiguous(), data.targets.long(), list(CLASSES), "Fashion-MNIST")


# The stand-in's outlines: x, y in a box from 0 to 1. {w} widens, {s} is the length of a sleeve or a leg.
def _outline(kind, r):
    w, s = r.uniform(0.22, 0.32), r.uniform(0.75, 0.98)
    body = [(.5 - w, .1), (.5 - .1, .08), (.5 + .1, .08), (.5 + w, .1)]

    def top(sleeve, hem, flare=0.0):
        return [*body, (.5 + w + .2, sleeve), (.5 + w + .08, sleeve + .04), (.5 + w - .04, .3), (.5 + w + flare, hem),
                (.5 - w - flare, hem), (.5 - w + .04, .3), (.5 - w - .08, sleeve + .04), (.5 - w - .2, sleeve)]

    shapes = {
        0: lambda: top(.34, s),
        1: lambda: [(.3, .04), (.7, .04), (.7 + w / 4, s), (.56, s), (.5, .3), (.44, s), (.3 - w / 4, s)],
        2: lambda: top(.8, s - .04),
        3: lambda: [(.42, .04), (.58, .04), (.6, .4), (.5 + w, s), (.5 - w, s), (.4, .4)],
        4: lambda: top(.86, s, .05),
        5: lambda: [(.05, .72), (.3, .6), (.45, .66), (.62, .45), (.92, .3), (.95, .7), (.95, .78), (.05, .8)],
        6: lambda: top(.6, s - .02, .02),
        7: lambda: [(.03, .68), (.3, .55), (.5, .4), (.62, .46), (.92, .42), (.97, .75), (.03, .78)],
        8: lambda: [(.1, .9), (.14, .4), (.32, .38), (.36, 1 - s + .05), (.64, 1 - s + .05), (.68, .38), (.86, .4),
                    (.9, .9)],
        9: lambda: [(.05, .78), (.1, .66), (.4, .55), (.45, 1 - s + .05), (.85, 1 - s + .05), (.9, .9), (.05, .9)],
    }
    return shapes[kind]()


def _draw_stand_in(split):
    """Grey silhouettes of the ten kinds of garments, 28x28, varied in size, cut, shade and position."""
    n, r = (12_000, random.Random(1)) if split == "train" else (2_000, random.Random(2))
    big = 56  # drawn at twice the size and averaged, for soft edges
    images = np.zeros((n, 1, 28, 28), np.uint8)
    labels = np.array([i % 10 for i in range(n)])
    for i, kind in enumerate(labels):
        picture = Image.new("L", (big, big))
        size, x, y = r.uniform(.8, 1.0) * big, r.uniform(-2, 2), r.uniform(-2, 2)
        left, up, shade = (big - size) / 2 + x, (big - size) / 2 + y, r.randint(90, 255)
        points = [(left + a * size, up + b * size) for a, b in _outline(kind, r)]
        draw = ImageDraw.Draw(picture)
        draw.polygon(points, fill=shade)
        if kind == 8:  # the hole under a bag's handle
            draw.polygon([(left + a * size, up + b * size) for a, b in [(.4, .36), (.42, .25), (.58, .25), (.6, .36)]],
                         fill=0)
        if kind in (4, 6):  # a coat's and a shirt's front
            draw.line([(left + .5 * size, up + .1 * size), (left + .5 * size, up + .9 * size)], fill=shade // 3, width=2)
        images[i, 0] = np.asarray(picture.reduce(2))
    order = np.random.default_rng(0).permutation(n)
    return ImageSet(torch.from_numpy(images[order]), torch.from_numpy(labels[order]).long(), list(CLASSES),
                    "stand-in, drawn by code (not Fashion-MNIST)")


def to_model_range(u8):
    """uint8 pixels 0 … 255, any shape, to float32 in [-1, 1]. ValueError for another type."""
    _check(torch.is_tensor(u8) and u8.dtype == torch.uint8,
           f"u8 is {u8.dtype if torch.is_tensor(u8) else type(u8)}; wanted a uint8 tensor")
    return u8.float() / 127.5 - 1


def to_uint8(x):
    """Floats, [-1, 1] and clipped to it, any shape, to uint8 pixels 0 … 255. ValueError for another type."""
    _check_floats("x", x)
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------ pictures

def show_images(images, titles=None, columns=None, title=None, scale=1.0):
    """Draws pictures in a grid, all in one intensity range, and returns the figure.

    images: (N, C, H, W) with C 1 or 3; uint8 0 … 255, or floats of which [-1, 1] is drawn and the rest is cut off.
    titles: N texts, one over each picture. columns: pictures in a row. title: over all. scale: inches a picture.
    ValueError for other shapes.
    """
    _check(torch.is_tensor(images) and images.dim() == 4 and images.shape[1] in (1, 3) and len(images) > 0,
           f"images is {tuple(images.shape) if torch.is_tensor(images) else type(images)}; "
           "wanted a tensor of shape (N, 1, H, W) or (N, 3, H, W)")
    _check(images.dtype == torch.uint8 or images.is_floating_point(), f"images is {images.dtype}; wanted uint8 or floats")
    _check(titles is None or isinstance(titles, (list, tuple)) and len(titles) == len(images),
           "titles must hold one text per picture")
    _check_number("columns", 1 if columns is None else columns, 1, integer=True)
    _check_number("scale", scale, 0.01)
    u8 = (images if images.dtype == torch.uint8 else to_uint8(images)).cpu()
    n, columns = len(u8), columns or min(len(u8), 10)
    rows = math.ceil(n / columns)
    if titles is None:  # one picture of the whole grid: much faster than an axis for each
        grid = torchvision.utils.make_grid(u8, nrow=columns, padding=1, pad_value=128)
        figure, axis = plt.subplots(figsize=(columns * scale, rows * scale + (0.4 if title else 0)))
        axis.imshow(grid.permute(1, 2, 0).numpy(), vmin=0, vmax=255)
        axis.axis("off")
        axis.set_title(title or "")
    else:
        figure, axes = plt.subplots(rows, columns, figsize=(columns * scale, rows * (scale + 0.35)), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, picture, text in zip(axes.flat, u8, titles):
            axis.imshow(picture.permute(1, 2, 0).numpy(), vmin=0, vmax=255)
            axis.set_title(text, fontsize=11)
        figure.suptitle(title or "")
    figure.tight_layout()
    return figure


def save_gif(frames, path, milliseconds=60, hold=2000, enlarge=1):
    """Writes frames as a GIF that loops, with Pillow. Returns the path.

    frames: uint8 (F, H, W) or (F, C, H, W), or floats of that shape in [-1, 1] (one range for all frames: nothing
    is stretched). milliseconds: per frame; hold: of the last one. enlarge: whole-number magnification.
    ValueError for other shapes; OSError where the path can't be written, with no half-written file left.
    """
    _check(torch.is_tensor(frames) and (frames.dim() == 3 or frames.dim() == 4 and frames.shape[1] in (1, 3))
           and len(frames) > 0 and (frames.dtype == torch.uint8 or frames.is_floating_point()),
           f"frames is {f'{frames.dtype} {tuple(frames.shape)}' if torch.is_tensor(frames) else type(frames)}; "
           "wanted a uint8 or float tensor of shape (F, H, W) or (F, C, H, W), C 1 or 3")
    _check_number("milliseconds", milliseconds, 0, 65_535)
    _check_number("hold", hold, 0, 65_535)
    _check_number("enlarge", enlarge, 1, 32, integer=True)
    u8 = (frames if frames.dtype == torch.uint8 else to_uint8(frames)).cpu()
    u8 = u8[:, None] if u8.dim() == 3 else u8
    u8 = u8.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    pictures = [Image.fromarray(f[0].numpy() if f.shape[0] == 1 else f.permute(1, 2, 0).numpy()) for f in u8]
    durations = [milliseconds] * (len(pictures) - 1) + [hold]

    def write(file):
        pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)

    _write_whole(path, write)
    return pathlib.Path(path)


def _write_whole(path, write):
    """The file is there whole or not at all: written under another name, flushed to the disk, then renamed."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"{path.name} could not be written ({error}); what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# ------------------------------------------------------------------ 01: schedule and forward noising

class NoiseSchedule:
    """The numbers of the forward process, and the three formulas that use them.

    betas: T variances β_1 … β_T, each in (0, 1). Every array is computed in float64, kept as float32, and has T + 1
    entries; entry 0 is the clean picture. `.T`, `.betas`, `.alphas`, `.alpha_bars` as in DDPM, section 2;
    `.signal_scale` = √ᾱ, `.noise_scale` = √(1-ᾱ). ValueError for betas of another shape or range.
    """

    def __init__(self, betas):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        _check_betas(betas)
        betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas])    # (T + 1,), entry 0: nothing added yet
        alphas = 1 - betas
        alpha_bars = torch.cumprod(alphas, dim=0)
        before = torch.cat([alpha_bars[:1], alpha_bars[:-1]])              # ᾱ_{t-1}
        rest = (1 - alpha_bars).clamp(min=1e-30)                           # 1 - ᾱ_t, and no 0/0 at t = 0
        self.T = len(betas) - 1
        self.betas = betas.float()
        self.alphas = alphas.float()
        self.alpha_bars = alpha_bars.float()
        self.signal_scale = alpha_bars.sqrt().float()
        self.noise_scale = (1 - alpha_bars).sqrt().float()
        self.posterior_x0 = (before.sqrt() * betas / rest).float()
        self.posterior_xt = (alphas.sqrt() * (1 - before) / rest).float()
        self.posterior_variance = (betas * (1 - before) / rest).float()    # β̃_t

    def to(self, device):
        """The same schedule with its arrays on device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(moved, name, value.to(device))
        return moved

    def snr(self):
        """ᾱ_t / (1 - ᾱ_t), (T + 1,); infinite at t = 0."""
        return (self.signal_scale / self.noise_scale) ** 2

    def q_sample(self, x0, t, noise):
        """DDPM Eq. 4: x_t from x_0 in one go. x0 and noise (B, …), t int64 (B,) from 0 to T; gives (B, …)."""
        _check_same_shape("x0", x0, "noise", noise)
        _check_t(t, len(x0), 0, self.T)
        return at(self.signal_scale, t, x0) * x0 + at(self.noise_scale, t, x0) * noise

    def predict_x0(self, xt, t, noise):
        """Eq. 4 solved for x_0. xt and noise (B, …), t int64 (B,) from 1 to T; gives (B, …)."""
        _check_same_shape("xt", xt, "noise", noise)
        _check_t(t, len(xt), 1, self.T)
        return (xt - at(self.noise_scale, t, xt) * noise) / at(self.signal_scale, t, xt)

    def q_posterior(self, x0, xt, t):
        """DDPM Eq. 6-7: mean (B, …) and variance (B, 1, …) of q(x_{t-1} given x_t, x_0). t int64 (B,), 1 to T."""
        _check_same_shape("x0", x0, "xt", xt)
        _check_t(t, len(xt), 1, self.T)
        mean = at(self.posterior_x0, t, xt) * x0 + at(self.posterior_xt, t, xt) * xt
        return mean, at(self.posterior_variance, t, xt)


def at(values, t, x):
    """values[t] in a shape that multiplies x: (T + 1,), (B,), (B, …) give (B, 1, …)."""
    return values[t].view(-1, *[1] * (x.dim() - 1))


def linear_schedule(T=1000):
    """DDPM section 4: β from 1e-4 to 0.02 in a line, times 1000/T so that every T ends in noise; at most 0.999.

    T: an integer of at least 2. Returns a NoiseSchedule.
    """
    _check_number("T", T, 2, integer=True)
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    return NoiseSchedule(betas.clamp(max=0.999))


def cosine_schedule(T=1000):
    """Nichol & Dhariwal 2021 (arXiv 2102.09672) Eq. 17: ᾱ follows a squared cosine; β at most 0.999.

    T: an integer of at least 2. Returns a NoiseSchedule.
    """
    _check_number("T", T, 2, integer=True)
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bars = f / f[0]
    betas = 1 - alpha_bars[1:] / alpha_bars[:-1]
    return NoiseSchedule(betas.clamp(max=0.999))


def _check_betas(betas):
    _check(betas.dim() == 1 and len(betas) >= 1 and bool(((betas > 0) & (betas < 1)).all()),
           f"betas has shape {tuple(betas.shape)} and values from {betas.min() if betas.numel() else 'nothing'} to "
           f"{betas.max() if betas.numel() else 'nothing'}; wanted (T,) with every value between 0 and 1")


# ------------------------------------------------------------------ 02: U-Net

def time_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies (Vaswani et al. 2017, section 3.5): (B,) gives (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]                        # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)                  # (B, dim)


def zero_init(layer):
    """Sets a layer's weights and biases to 0, and returns it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a scale and shift that depend on the step, plus a skip.

    (B, in_channels, H, W) and the step's vector (B, time_dim) give (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, time_dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))                              # (B, out, H, W)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)   # (B, out, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Every pixel looks at every pixel (Vaswani et al. 2017, Eq. 1), plus a skip: (B, C, H, W) keeps its shape."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(dim=1)                        # (B, heads, H*W, C/heads) each
        mixed = F.scaled_dot_product_attention(q, k, v)                    # softmax(q kᵀ / √d) v
        return x + self.out(mixed.transpose(2, 3).reshape(B, C, H, W))


class UNet(nn.Module):
    """The noise predictor ε_θ(x_t, t): x (B, in_channels, H, W) and t int64 (B,) give (B, in_channels, H, W).

    channels: the width at each size of picture, from the full size down, each a multiple of 8; every entry after the
    first halves the picture. patch: the stem folds patch x patch pixels into channels, and the last layer unfolds them.
    So H and W must be multiples of patch * 2^(len(channels) - 1). ValueError for other inputs.
    Ronneberger et al. 2015 (arXiv 1505.04597) for the shape, DDPM appendix B for the parts.
    """

    def __init__(self, in_channels=1, channels=(32, 64, 128), patch=1):
        super().__init__()
        _check_unet_sizes(in_channels, channels, patch)
        self.config = {"in_channels": in_channels, "channels": list(channels), "patch": patch}
        self.patch = patch
        time_dim = 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        size = 3 if patch == 1 else 1          # 3x3 over folded patches would bury a patch's noise under its neighbours'
        self.stem = nn.Conv2d(in_channels * patch**2, channels[0], size, padding=size // 2)
        self.down_blocks, self.downs, self.up_blocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for wide, wider in zip(channels[:-1], channels[1:]):
            self.down_blocks.append(ResidualBlock(wide, wide, time_dim))
            self.downs.append(nn.Conv2d(wide, wider, 3, stride=2, padding=1))    # halves H and W
            self.up_blocks.append(ResidualBlock(wider + wide, wide, time_dim))   # + wide: the skip comes in here
        self.middle1 = ResidualBlock(channels[-1], channels[-1], time_dim)
        self.attention = SelfAttention(channels[-1])
        self.middle2 = ResidualBlock(channels[-1], channels[-1], time_dim)
        self.norm = nn.GroupNorm(8, channels[0])
        self.out = zero_init(nn.Conv2d(channels[0], in_channels * patch**2, 3, padding=1))

    def forward(self, x, t):
        _check_unet_input(self, x, t)
        time = self.time(time_embedding(t, self.stem.out_channels))        # (B, time_dim)
        h = self.stem(F.pixel_unshuffle(x, self.patch))                    # (B, C * patch², H/patch, W/patch) enter
        skips = []
        for block, down in zip(self.down_blocks, self.downs):
            h = block(h, time)
            skips.append(h)
            h = down(h)
        h = self.middle2(self.attention(self.middle1(h, time)), time)
        for block in reversed(self.up_blocks):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")         # doubles H and W
            h = block(torch.cat([h, skips.pop()], dim=1), time)
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), self.patch)


def _check_unet_sizes(in_channels, channels, patch):
    _check_number("in_channels", in_channels, 1, integer=True)
    _check_number("patch", patch, 1, integer=True)
    _check(isinstance(channels, (tuple, list)) and len(channels) >= 2
           and all(isinstance(c, int) and c >= 8 and c % 8 == 0 for c in channels),
           f"channels is {channels!r}; wanted at least two multiples of 8, as (32, 64, 128)")


def _check_unet_input(model, x, t):
    _check_floats("x", x)
    multiple, channels = model.patch * 2 ** len(model.downs), model.config["in_channels"]
    _check(x.dim() == 4 and x.shape[1] == channels and x.shape[2] % multiple == 0 and x.shape[3] % multiple == 0,
           f"x has shape {tuple(x.shape)}; wanted (B, {channels}, H, W), H and W multiples of {multiple} "
           "(the patch, and one halving per entry of channels after the first)")
    _check_t(t, len(x), 0, math.inf)


# ------------------------------------------------------------------ 03: loss

def simple_loss(model, schedule, x0, t=None, noise=None):
    """DDPM Eq. 14: the mean squared error of the predicted noise; a scalar.

    x0 (B, …) in [-1, 1]; t int64 (B,) from 1 to T, drawn uniformly where not given; noise like x0, drawn likewise.
    """
    _check_floats("x0", x0)
    if t is None:
        t = torch.randint(1, schedule.T + 1, (len(x0),), device=x0.device)
    if noise is None:
        noise = torch.randn_like(x0)
    xt = schedule.q_sample(x0, t, noise)
    return F.mse_loss(model(xt, t), noise)


# ------------------------------------------------------------------ 04: training

def v_loss(model, schedule, x0, t=None, noise=None, gamma=None):
    """The mean squared error of v = √ᾱ ε - √(1-ᾱ) x_0 (Salimans & Ho 2022, arXiv 2202.00512); a scalar.

    model predicts v; the rest as in simple_loss. gamma: a number gives the error of x_0 the weight min(SNR_t, gamma)
    (Min-SNR, Hang et al. 2023, arXiv 2303.09556, section 3.4), which is min(SNR_t, gamma) / (SNR_t + 1) on that of v.
    """
    _check_floats("x0", x0)
    if t is None:
        t = torch.randint(1, schedule.T + 1, (len(x0),), device=x0.device)
    if noise is None:
        noise = torch.randn_like(x0)
    xt = schedule.q_sample(x0, t, noise)
    v = at(schedule.signal_scale, t, x0) * noise - at(schedule.noise_scale, t, x0) * x0
    error = (model(xt, t) - v).square()
    if gamma is not None:
        _check_number("gamma", gamma, 0)
        snr = at(schedule.snr(), t, x0)
        error = error * snr.clamp(max=gamma) / (snr + 1)
    return error.mean()


def min_snr_loss(model, schedule, x0, t=None, noise=None):
    """v_loss with Min-SNR weights, γ = 5; a scalar. The rest as there."""
    return v_loss(model, schedule, x0, t, noise, gamma=5)


class NoiseFromV(nn.Module):
    """Makes a network that predicts v look like one that predicts ε: ε = √ᾱ v + √(1-ᾱ) x_t, float32 (B, …)."""

    def __init__(self, model, schedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, xt, t):
        signal, noise = at(self.schedule.signal_scale, t, xt), at(self.schedule.noise_scale, t, xt)
        return signal * self.model(xt, t).float() + noise * xt


class EMA:
    """A second copy of the network whose parameters are a running average of the first one's.

    `.model` is that copy. decay: the share of the old average kept at each update, in [0, 1); early updates keep
    less, so that the random start is soon forgotten. Buffers are copied, not averaged.
    """

    def __init__(self, model, decay=0.999):
        _check_number("decay", decay, 0, 0.999999)
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        """One step of the average: average ← decay · average + (1 - decay) · parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)


def learning_rate(step, steps, peak, warmup):
    """Up in a line for warmup steps, then down to 0 along half a cosine; step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def amp_dtype(device):
    """The number type of mixed precision, where the device truly has it: bfloat16, float16, or None for float32.

    GPUs before compute capability 8.0 (a T4) emulate bfloat16 slowly, so they get float16. A CPU gets bfloat16 where
    it has instructions for it (1.8 times as fast on an AMD EPYC with two cores), mps and every other CPU float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if kind == "cpu" and has_bfloat16() else None


@_turn_down_if_out_of_memory("batch_size")
def train(model, schedule, images, steps, batch_size=64, lr=1e-3, ema=None, warmup=200, clip=1.0, seed=0,
          loss_function=simple_loss, checkpoint=None, checkpoint_every=500, callback=None, callback_every=500,
          progress=True):
    """DDPM Algorithm 1 with warm-up, decay, clipping and mixed precision; trains model in place.

    images: uint8 (N, C, H, W). ema: an EMA of the model, updated after every step. lr: the peak of the learning rate;
    clip: the largest gradient norm. loss_function: simple_loss for a model that predicts ε, v_loss or min_snr_loss for one of v.
    checkpoint: a file; the run is saved there every checkpoint_every steps, and an unfinished run found there is
    continued, to the same numbers as an undisturbed one. callback(step): called every callback_every steps.
    Interrupting (the stop button) keeps model, ema and history usable.

    Returns the losses so far, a list of floats. FloatingPointError if the loss stops being a number: then the last
    good checkpoint is kept. MemoryError, which names batch_size, where the device's memory is full. ValueError for
    bad arguments or a checkpoint of another run.
    """
    _check_uint8("images", images)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every),
                        ("callback_every", callback_every)):
        _check_number(name, value, 1, integer=True)
    _check_number("warmup", warmup, 0, integer=True)
    _check_number("lr", lr, 0)
    _check_number("seed", seed, 0, 2**32 - 1, integer=True)
    _check_number("clip", clip, 0)
    device = next(model.parameters()).device
    schedule, images = schedule.to(device), images.to(device)   # the whole data set, once: no copying in the loop
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device.type != "mps")  # all parameters in one call
    half = amp_dtype(device)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    generator = torch.Generator(device).manual_seed(seed)
    losses = torch.zeros(steps, device=device)
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "clip": clip, "seed": seed,
                "loss_function": getattr(loss_function, "__name__", "another"), "pictures": len(images)}
    start = 0
    if checkpoint is not None and pathlib.Path(checkpoint).exists():
        start = _resume(checkpoint, model, schedule, ema, optimizer, scaler, generator, losses, settings)

    def save(step):
        for numbers in (losses[:step], *model.parameters()):  # the loss can be fine, and the weights after it not
            _check_finite(numbers, step, checkpoint)
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, schedule, ema, optimizer=optimizer.state_dict(), step=step,
                            scaler=scaler.state_dict(), generator=generator.get_state(), losses=losses.cpu(),
                            settings=settings)

    model.train()
    bar = progress_bar(range(start, steps), "training", progress, initial=start, total=steps)
    step = start
    try:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup)
            pick = torch.randint(len(images), (batch_size,), device=device, generator=generator)
            x0 = to_model_range(images[pick])
            t = torch.randint(1, schedule.T + 1, (batch_size,), device=device, generator=generator)
            noise = torch.randn(x0.shape, device=device, generator=generator)
            # torch 2.4 has no autocast for Apple GPUs, not even one that is off
            with torch.autocast(device.type, dtype=half) if half else contextlib.nullcontext():
                loss = loss_function(model, schedule, x0, t, noise)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update(model)
            losses[step] = loss.detach()
            if (step + 1) % 50 == 0:  # looking at the loss makes the device wait, so not in every step
                bar.set_postfix_str(f"loss {losses[max(0, step - 99):step + 1].mean():.4f}, "
                                    f"{(bar.format_dict['rate'] or 0) * batch_size:.0f} pictures/s", refresh=False)
                _check_finite(losses[step], step + 1, checkpoint)
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                save(step + 1)
            if callback is not None and ((step + 1) % callback_every == 0 or step + 1 == steps):
                callback(step + 1)
    except KeyboardInterrupt:
        print(f"\nStopped at step {step} of {steps}: model, ema and the losses so far can be used.")
        losses = losses[:step]
    finally:
        bar.close()
        model.eval()
    return losses.tolist()


def _check_finite(loss, step, checkpoint):
    if not bool(torch.isfinite(loss).all()):
        kept = f"; the last good checkpoint is kept in {pathlib.Path(checkpoint).name}" if checkpoint else ""
        raise FloatingPointError(f"the loss or a weight is no longer a number at step {step}: try a smaller lr or clip{kept}")


def _resume(path, model, schedule, ema, optimizer, scaler, generator, losses, settings):
    """Continues an unfinished run; a finished one starts anew. Returns the step to start from."""
    saved = load_checkpoint(path)
    _check("settings" in saved, f"{pathlib.Path(path).name} is no training checkpoint; wanted one that train wrote")
    if saved["step"] == saved["settings"]["steps"]:
        return 0
    differ = [name for name in settings if saved["settings"].get(name) != settings[name]]
    _check(not differ, f"checkpoint {pathlib.Path(path).name} is of another run: {', '.join(differ)} differ; "
                       "give another file, or delete this one")
    _check((ema is None) == (saved["ema"] is None), "checkpoint was written with ema and train was called without, "
                                                    "or the other way round; call it the same way")
    _check(torch.equal(saved["betas"], schedule.betas[1:].cpu()),
           f"checkpoint {pathlib.Path(path).name} is of a run with another schedule; give another file, or delete this one")
    try:
        scaler.load_state_dict(saved["scaler"])
        generator.set_state(saved["generator"].cpu())
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"checkpoint {pathlib.Path(path).name} was written on another kind of device ({error}); "
                         "go on there, or give another file") from error
    _fill(pathlib.Path(path), saved, model, ema)  # not read again: another run may have written it since
    optimizer.load_state_dict(saved["optimizer"])
    losses.copy_(saved["losses"])
    return saved["step"]


def save_checkpoint(path, model, schedule, ema=None, target="noise", **more):
    """Writes model, schedule, ema and whatever else of plain values and tensors; the file is whole or not there.

    target: what the model predicts, "noise" or "v"; load_pretrained needs to know.

    OSError where it can't be written (a full disk, say): an older file of that name is then untouched.
    """
    _check(target in ("noise", "v"), f'target is {target!r}; wanted "noise" or "v"')
    content = {"unet": getattr(model, "config", None), "model": model.state_dict(), "betas": schedule.betas[1:].cpu(),
               "ema": None if ema is None else ema.model.state_dict(), "ema_updates": ema.updates if ema else 0,
               "target": target, **more}
    _write_whole(path, lambda file: torch.save(content, file))


def load_checkpoint(path, model=None, ema=None):
    """Reads a checkpoint, as a dict of plain values and tensors on the cpu, and fills model and ema where given.

    FileNotFoundError without the file; ValueError where it is damaged, or of a network of another shape.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path.name} in {path.parent.name or '.'}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the sums that torch.save wrote
            _check(archive.testzip() is None, "a part is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has a different exception for every kind of damage
        raise ValueError(f"{path.name} is damaged or no checkpoint ({type(error).__name__}); "
                         "delete it, or fetch it again") from error
    _check(isinstance(content, dict) and isinstance(content.get("model"), dict),
           f"{path.name} holds no network; wanted a checkpoint")
    _check(ema is None or content.get("ema") is not None, f"{path.name} holds no ema; load it without")
    _fill(path, content, model, ema)
    return content


def _fill(path, content, model, ema):
    try:
        if model is not None:
            model.load_state_dict(content["model"])
        if ema is not None:
            ema.model.load_state_dict(content["ema"])
            ema.updates = content["ema_updates"]
    except RuntimeError as error:
        raise ValueError(f"{path.name} does not fit this network: it was saved from UNet(**{content.get('unet')})") from error


def _weights_file(file):
    """The file in notebooks/weights/, its SHA-256 checked; where a notebook came alone it is fetched once."""
    places = [HERE / "notebooks" / "weights", HERE / "weights"]  # the second where a notebook came alone
    folder = next((place for place in places if (place / file).exists()), None)
    if folder is None and (HERE / "notebooks").exists():
        raise FileNotFoundError(f"there are no weights {file}: notebooks/weights/ holds "
                                f"{sorted(p.name for p in places[0].glob('*.pt'))}")
    if folder is None:
        folder, fetched = places[1], {name: _fetch_weights(name) for name in (file, "SHA256SUMS")}
        if _sha256_differs(file, fetched[file], fetched["SHA256SUMS"]):  # a login page, say: nothing of it is kept
            raise OSError(f"the weights {file} could not be fetched (what came is something else): {WAY_TO_WEIGHTS}")
        for name, data in fetched.items():
            _write_whole(folder / name, lambda f: f.write(data))
    if not (folder / "SHA256SUMS").exists():
        raise FileNotFoundError(f"the file SHA256SUMS is missing beside {file}: put both into the same folder")
    differs = _sha256_differs(file, (folder / file).read_bytes(), (folder / "SHA256SUMS").read_bytes())
    _check(not differs, f"{file} is damaged: {differs} (SHA256SUMS); delete it and fetch it again")
    return folder / file


WAY_TO_WEIGHTS = "put the files of the repository's notebooks/weights/ into a folder weights/ beside ddpm_utils.py"


def _fetch_weights(name):
    url = os.environ.get("DDPM_URL", f"https://raw.githubusercontent.com/{REPOSITORY}/{TAG}")
    try:
        with urllib.request.urlopen(f"{url}/notebooks/weights/{name}", timeout=WAIT) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"the weights {name} could not be fetched ({error}): {WAY_TO_WEIGHTS}") from error


def _sha256_differs(file, data, sums):
    """'' where the SHA-256 of data is the one that the lines of sums name for file, else a text that says how."""
    lines = [line.split() for line in sums.decode(errors="replace").splitlines()]
    wanted = {line[1]: line[0] for line in lines if len(line) == 2}.get(file)
    found = hashlib.sha256(data).hexdigest()
    return "" if found == wanted else f"its SHA-256 begins with {found[:8]}, wanted {str(wanted)[:8]}"


def load_pretrained(name="fashion", device="cpu"):
    """The trained network of notebooks/weights/<name>.pt and the schedule that it was trained with.

    Returns model, schedule, both on device: model(xt, t) gives ε; it is in eval mode, with no gradients.
    FileNotFoundError without the file, OSError where it can't be fetched, ValueError where it is damaged.
    """
    content = load_checkpoint(_weights_file(f"{name}.pt"))
    model, schedule = UNet(**content["unet"]), NoiseSchedule(content["betas"]).to(device)
    model.load_state_dict(content["model"])
    model = model.to(device).eval().requires_grad_(False)
    return (NoiseFromV(model, schedule).eval() if content["target"] == "v" else model), schedule


# ------------------------------------------------------------------ 05: sampling

@torch.no_grad()
def ddpm_sample(model, schedule, n, shape=(1, 28, 28), clip=True, sigma="beta", x_T=None, generator=None,
                return_trajectory=False, progress=True):
    """DDPM Algorithm 2: n pictures from noise, one step of Eq. 11 for each t from T to 1.

    model: anything that gives ε as model(xt, t). clip: keep x̂_0 in [-1, 1]. sigma: "beta" for σ_t² = β_t,
    "beta_tilde" for σ_t² = β̃_t. x_T: (n, *shape), drawn where not given. Returns x0 (n, *shape) on the schedule's
    device, or with return_trajectory the T + 1 stages x_T … x_0, (T + 1, n, *shape), on the cpu.
    """
    _check(sigma in ("beta", "beta_tilde"), f'sigma is {sigma!r}; wanted "beta" or "beta_tilde"')
    x = start_noise(schedule, n, shape, x_T, generator)
    variances = schedule.betas if sigma == "beta" else schedule.posterior_variance
    trajectory = [x.cpu()]
    for step in progress_bar(range(schedule.T, 0, -1), "sampling", progress):
        t = torch.full((n,), step, device=x.device)
        x0 = schedule.predict_x0(x, t, model(x, t))                        # what the network believes: x̂_0
        if clip:
            x0 = x0.clamp(-1, 1)
        mean, _ = schedule.q_posterior(x0, x, t)
        if step > 1:                                                       # no noise in the last step
            noise = torch.randn(x.shape, device=x.device, generator=generator)
            x = mean + variances[step].sqrt() * noise
        else:
            x = mean
        if return_trajectory:
            trajectory.append(x.cpu())
    return torch.stack(trajectory) if return_trajectory else x


@torch.no_grad()
def ddim_sample(model, schedule, n, steps=50, eta=0.0, shape=(1, 28, 28), clip=True, x_T=None, generator=None,
                return_trajectory=False, progress=True):
    """DDIM (Song et al. 2020, arXiv 2010.02502) Eq. 12 and 16: n pictures from noise in few steps.

    steps: 1 to T, evenly spaced from T to 0. eta: 0 adds no noise on the way, 1 as much as DDPM with β̃_t. The rest,
    and what comes back, as in ddpm_sample; a trajectory has steps + 1 stages.
    """
    _check_number("steps", steps, 1, schedule.T, integer=True)
    _check_number("eta", eta, 0, 1)
    x = start_noise(schedule, n, shape, x_T, generator)
    stops = torch.linspace(schedule.T, 0, steps + 1).round().long().tolist()
    trajectory = [x.cpu()]
    for now, then in progress_bar(list(zip(stops[:-1], stops[1:])), "sampling", progress):
        t = torch.full((n,), now, device=x.device)
        noise = model(x, t)
        x0 = schedule.predict_x0(x, t, noise)
        if clip:                                                           # then ε must say the same as x̂_0 does
            x0 = x0.clamp(-1, 1)
            noise = (x - schedule.signal_scale[now] * x0) / schedule.noise_scale[now]
        ratio = schedule.signal_scale[now] / schedule.signal_scale[then]
        sigma = eta * schedule.noise_scale[then] / schedule.noise_scale[now] * (1 - ratio**2).sqrt()
        along = (schedule.noise_scale[then]**2 - sigma**2).clamp(min=0).sqrt()
        x = schedule.signal_scale[then] * x0 + along * noise
        if eta > 0 and then > 0:
            x = x + sigma * torch.randn(x.shape, device=x.device, generator=generator)
        if return_trajectory:
            trajectory.append(x.cpu())
    return torch.stack(trajectory) if return_trajectory else x


@torch.no_grad()
def dpm_solver_sample(model, schedule, n, steps=20, shape=(1, 28, 28), clip=True, x_T=None, generator=None,
                      return_trajectory=False, progress=True):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): n pictures from noise in few steps.

    DDIM's step with η = 0 and with x̂_0 carried on to the middle of the step, along the line through the last two.
    steps: 1 to T, denser near T; where two would fall on one t they are one step. The rest, and what comes back, as in
    ddpm_sample; a trajectory has one stage more than there are steps.
    """
    _check_number("steps", steps, 1, schedule.T, integer=True)
    x = start_noise(schedule, n, shape, x_T, generator)
    stops = sorted({round(schedule.T * (1 - (k / steps)**1.6)) for k in range(steps + 1)}, reverse=True)
    clock = (schedule.signal_scale / schedule.noise_scale).log()           # λ at each t
    trajectory, x0_before = [x.cpu()], None
    for now, then in progress_bar(list(zip(stops[:-1], stops[1:])), "sampling", progress):
        t = torch.full((n,), now, device=x.device)
        x0 = schedule.predict_x0(x, t, model(x, t))
        if clip:
            x0 = x0.clamp(-1, 1)
        ahead = x0
        if x0_before is not None and then > 0:                             # else DDIM's step
            half_a_step = (clock[then] - clock[now]) / 2
            ahead = x0 + half_a_step * (x0 - x0_before) / (clock[now] - clock[before])
        x0_before, before = x0, now
        noise = (x - schedule.signal_scale[now] * ahead) / schedule.noise_scale[now]
        x = schedule.signal_scale[then] * ahead + schedule.noise_scale[then] * noise
        if return_trajectory:
            trajectory.append(x.cpu())
    return torch.stack(trajectory) if return_trajectory else x


def start_noise(schedule, n, shape, x_T, generator):
    """x_T: the one given, checked, or n standard normal draws of that shape on the schedule's device."""
    _check_number("n", n, 1, integer=True)
    _check(isinstance(shape, (tuple, list, torch.Size)) and all(isinstance(s, int) and s > 0 for s in shape),
           f"shape is {shape!r}; wanted the shape of one picture, as (1, 28, 28)")
    device = schedule.betas.device
    if x_T is None:
        return torch.randn(n, *shape, device=device, generator=generator)
    _check_floats("x_T", x_T)
    _check(tuple(x_T.shape) == (n, *shape), f"x_T has shape {tuple(x_T.shape)}; wanted {(n, *shape)}")
    return x_T.to(device)


# an out-of-memory error names n; the functions themselves stand above as notebooks 05 and 08 have them
ddpm_sample = _turn_down_if_out_of_memory("n")(ddpm_sample)
ddim_sample = _turn_down_if_out_of_memory("n")(ddim_sample)
dpm_solver_sample = _turn_down_if_out_of_memory("n")(dpm_solver_sample)


# ------------------------------------------------------------------ 06: measuring

class GarmentClassifier(nn.Module):
    """A small network that names garments: pictures (B, 1, 28, 28) in [-1, 1] give ten scores (B, 10).

    `.features(x)` gives the 64 numbers (B, 64) before the last layer, in which Fréchet distances are measured.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),                  # 14x14
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),                 # 7x7
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(2),       # 2x2
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


@_turn_down_if_out_of_memory("batch_size")
@torch.no_grad()
def garment_features(classifier, images, batch_size=500):
    """Features (N, 64) float32 and probabilities (N, 10) of pictures, uint8 or in [-1, 1], (N, 1, 28, 28); on the cpu."""
    _check(torch.is_tensor(images) and images.dim() == 4 and tuple(images.shape[1:]) == (1, 28, 28) and len(images) > 0
           and (images.dtype == torch.uint8 or images.is_floating_point()),
           f"images is {f'{images.dtype} {tuple(images.shape)}' if torch.is_tensor(images) else type(images)}; "
           "wanted a uint8 or float tensor of shape (N, 1, 28, 28)")
    _check_number("batch_size", batch_size, 1, integer=True)
    device = next(classifier.parameters()).device
    features, probabilities = [], []
    for batch in images.split(batch_size):
        x = to_model_range(batch) if batch.dtype == torch.uint8 else batch
        f = classifier.features(x.to(device))
        features.append(f.cpu())
        probabilities.append(classifier.head(f).softmax(dim=1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def feature_statistics(features):
    """Mean (D,) and covariance (D, D) of features (N, D), N at least 2, in float64."""
    _check_floats("features", features)
    _check(features.dim() == 2 and len(features) >= 2,
           f"features has shape {tuple(features.shape)}; wanted (N, D) with N at least 2")
    features = features.cpu().double()
    return features.mean(dim=0), torch.cov(features.T).view(features.shape[1], -1)


def _check_gaussians(mean1, cov1, mean2, cov2):
    given = {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}
    shapes = {name: tuple(x.shape) if torch.is_tensor(x) else type(x).__name__ for name, x in given.items()}
    d = shapes["mean1"][0] if torch.is_tensor(mean1) and mean1.dim() == 1 else 0
    _check(d > 0 and shapes == {"mean1": (d,), "cov1": (d, d), "mean2": (d,), "cov2": (d, d)},
           f"{', '.join(f'{name} is {shape}' for name, shape in shapes.items())}; "
           "wanted means of shape (D,) and covariances of shape (D, D)")


def frechet_distance(mean1, cov1, mean2, cov2):
    """The Fréchet distance of two Gaussians, squared, as in FID (Heusel et al. 2017, arXiv 1706.08500, Eq. 6).

    means (D,) and covariances (D, D) in float64 on the cpu; a float, 0 where the two agree.
    """
    _check_gaussians(mean1, cov1, mean2, cov2)

    def root(matrix):  # the symmetric square root
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    half = root(cov1)
    cross = torch.linalg.eigvalsh(half @ cov2 @ half).clamp(min=0).sqrt().sum()
    return float(((mean1 - mean2)**2).sum() + cov1.trace() + cov2.trace() - 2 * cross)


def load_classifier(device="cpu"):
    """The shipped GarmentClassifier, in eval mode, and the (mean, covariance) of its features on the training set."""
    content = load_checkpoint(_weights_file("classifier.pt"))
    classifier = GarmentClassifier()
    classifier.load_state_dict(content["model"])
    return classifier.to(device).eval().requires_grad_(False), (content["mean"], content["cov"])


# ------------------------------------------------------------------ python ddpm_utils.py

def _missing():
    """What a lesson would miss here: a list of sentences, empty where all is ready."""
    import importlib.metadata
    missing = []
    for package in ("torch", "torchvision", "numpy", "matplotlib", "ipywidgets", "jupyterlab", "nbval", "tqdm"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"the package {package}: pip install -r requirements.txt")
    bad = _bad_files(_data_folder())
    if bad:
        missing.append(f"Fashion-MNIST ({', '.join(f'{name} is {what}' for name, what in bad.items())}): "
                       "the first notebook downloads it, and where it can't, uses a stand-in")
    for file in ("fashion.pt", "classifier.pt", "flowers_128.pt"):
        try:
            _weights_file(file)
        except (OSError, ValueError) as error:
            missing.append(f"weights: {error}")
    return missing


if __name__ == "__main__":
    set_up()
    problems = _missing()
    print("\n".join(["missing:", *(f"- {p}" for p in problems)]) if problems else "ready")
    if not (_data_folder() / "flower_photos").is_dir():
        print("(flower_photos, 218 MiB, is not here yet: notebook 07 downloads it, or uses a stand-in)")
    sys.exit(1 if problems else 0)

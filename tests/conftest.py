"""For every test in this folder: figures without a window, no way out to the network, the same random numbers."""
import random

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision

import refresh_notebooks  # noqa: F401  importing it mends nbclient, with which some tests run notebooks

matplotlib.use("Agg")  # in this process only: the kernels that nbval starts choose for themselves


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch):
    nowhere = "http://127.0.0.1:9/"  # the discard port: refused at once
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setenv("DDPM_URL", nowhere)
    monkeypatch.setenv("no_proxy", "*")  # a proxy would stand between a test and its own server
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    plt.close("all")

"""The network: shapes, gradients, time, attention."""

import itertools
import math

import pytest
import torch
from series import defined_in

from ddpm_utils import ResidualBlock, SelfAttention, UNet, time_embedding, zero_init


def wake(model):
    """Zero-initialised layers get small random weights, as after some training."""
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def steps(n, t=5):
    return torch.full((n,), t, dtype=torch.int64)


@pytest.mark.parametrize("batch, config, size", [
    (1, {}, (28, 28)), (3, {}, (28, 28)), (7, {}, (28, 28)),
    *((n, {"in_channels": 3, "channels": (16, 32, 64, 64)}, (128, 128)) for n in (1, 3)),
    *((2, {"channels": (8, 16, 16)}, size) for size in ((4, 4), (8, 12), (32, 20)))])
def test_what_comes_out_has_the_shape_of_what_goes_in_and_is_0_at_the_start(batch, config, size):
    model = UNet(**config)
    x = torch.randn(batch, model.config["in_channels"], *size)
    out = model(x, torch.arange(1, batch + 1))
    assert out.shape == x.shape and out.dtype == torch.float32 and not out.any()
    (out - 1).square().mean().backward()  # one backward pass at that size, too
    assert model.out.weight.grad is not None and torch.isfinite(model.out.bias.grad).all()


@pytest.mark.parametrize("channels", [(16, 32, 64), (32, 64, 128)])
def test_gradients_wake_up_in_three_steps(channels):
    """2, then 28, then all 84 parameters: the zero layers let the others in one after the other."""
    torch.manual_seed(0)
    model = UNet(channels=channels)
    optimizer, awake = torch.optim.Adam(model.parameters(), lr=1e-3), []
    x, noise, t = torch.randn(8, 1, 28, 28), torch.randn(8, 1, 28, 28), torch.arange(1, 9) * 100
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t) - noise).square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        awake.append(sum(bool(p.grad.any()) for p in model.parameters()))
        optimizer.step()
    assert awake == [2, 28, 84] and len(list(model.parameters())) == 84


def test_output_depends_on_t():
    model, x = wake(UNet(channels=(16, 32))), torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1)
    out = model(x, torch.tensor([1, 2, 500, 1000]))
    for one, other in itertools.combinations(out.detach(), 2):
        assert float((one - other).abs().max()) > 1e-4


def test_output_depends_on_every_pixel():
    """Through the middle and its attention, the first pixel out sees the last one in."""
    model, x = wake(UNet(channels=(16, 32, 32))), torch.randn(1, 1, 16, 16, requires_grad=True)
    model(x, steps(1))[0, 0, 0, 0].backward()
    assert (x.grad != 0).all()


def test_eval_is_deterministic_and_images_do_not_mix():
    model = wake(UNet()).eval()
    x, t = torch.randn(4, 1, 28, 28), torch.tensor([1, 10, 100, 1000])
    with torch.no_grad():
        first = model(x, t)
        assert torch.equal(first, model(x, t))
        for i in range(4):  # an image alone gets what it gets in company
            torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1])[0], first[i], rtol=1e-3,
                                       atol=1e-4)


def test_input_is_left_alone_and_may_be_a_view():
    model = wake(UNet(channels=(8, 16))).eval()
    x = torch.randn(8, 8, 1, 2).permute(3, 2, 0, 1)  # not contiguous
    kept = x.clone()
    with torch.no_grad():
        out = model(x, steps(2))
        torch.testing.assert_close(out, model(x.contiguous(), steps(2)))
    assert torch.equal(x, kept)


def test_config_builds_the_same_network():
    model = wake(UNet(in_channels=3, channels=(8, 16, 24)))
    twin = UNet(**model.config)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x, steps(2)), twin(x, steps(2)))


def test_attention_is_the_explicit_softmax():
    heads, channels, H, W = 4, 16, 3, 5
    layer = wake(SelfAttention(channels, heads))
    x = torch.randn(2, channels, H, W)
    with torch.no_grad():
        out = layer(x)
        normed = layer.norm(x).flatten(2)  # (B, C, H*W)
        weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias
        d = channels // heads
        expected = torch.zeros_like(normed)
        for b in range(2):
            q, k, v = (weight @ normed[b] + bias[:, None]).split(channels)  # (C, H*W) each
            mixed = torch.zeros(channels, H * W)
            for head in range(heads):
                own = slice(head * d, (head + 1) * d)
                for i in range(H * W):  # pixel i asks
                    scores = torch.stack([q[own, i] @ k[own, j] for j in range(H * W)])
                    shares = (scores / math.sqrt(d)).exp()
                    mixed[own, i] = (v[own] * shares / shares.sum()).sum(dim=1)
            expected[b] = layer.out.weight[:, :, 0, 0] @ mixed + layer.out.bias[:, None]
    assert float((out - x).abs().max()) > 1e-2
    torch.testing.assert_close(out, x + expected.view_as(x), rtol=1e-4, atol=1e-5)


def test_time_embedding_is_its_formula():
    t, dim = torch.tensor([0, 1, 37, 1000]), 16
    embedding = time_embedding(t, dim)
    assert embedding.shape == (4, dim)
    for row, step in zip(embedding.tolist(), t.tolist()):
        for i in range(dim // 2):
            angle = step / 10_000 ** (2 * i / dim)
            assert row[i] == pytest.approx(math.sin(angle), abs=1e-4)
            assert row[dim // 2 + i] == pytest.approx(math.cos(angle), abs=1e-4)


def test_every_step_has_its_own_embedding():
    embedding = time_embedding(torch.arange(0, 1001), 32)
    near = torch.cdist(embedding, embedding) + 10 * torch.eye(1001)
    assert float(near.min()) > 0.1


@pytest.mark.parametrize("channels", [(16, 16), (16, 32)])
def test_residual_block_is_its_formula(channels):
    block = wake(ResidualBlock(*channels, time_dim=24))
    x, time = torch.randn(2, channels[0], 6, 6), torch.randn(2, 24)
    with torch.no_grad():
        out = block(x, time)
        h = block.conv1(torch.nn.functional.silu(block.norm1(x)))
        scale_and_shift = time @ block.time.weight.T + block.time.bias
        grouped = h.view(2, 8, -1)
        normed = (grouped - grouped.mean(dim=2, keepdim=True)) / (
            grouped.var(dim=2, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        h = normed.view_as(h) * block.norm2.weight[:, None, None] + block.norm2.bias[:, None, None]
        h = h * (1 + scale_and_shift[:, : channels[1], None, None])
        h = h + scale_and_shift[:, channels[1] :, None, None]
        shortcut = x if channels[0] == channels[1] else block.skip(x)
        torch.testing.assert_close(out, shortcut + block.conv2(h * torch.sigmoid(h)), rtol=1e-4,
                                   atol=1e-5)


# ------------------------------------------------------------------ labels

def test_an_untrained_label_changes_nothing_and_old_weights_load():
    """A zero embedding reproduces the network without labels, to the last bit."""
    torch.manual_seed(3)
    plain = wake(UNet(channels=(8, 16)))
    torch.manual_seed(4)
    labelled = UNet(channels=(8, 16), classes=10)
    missing = labelled.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["label.weight"] and missing.unexpected_keys == []
    x, t = torch.randn(11, 1, 8, 8), torch.arange(1, 12)
    for y in (None, torch.arange(11)):
        assert torch.equal(labelled(x, t, y), plain(x, t))
    assert list(plain.state_dict()) == list(UNet(channels=(8, 16), classes=0).state_dict())


def test_labels_take_no_random_number_from_the_other_layers():
    torch.manual_seed(3)
    plain = UNet(channels=(8, 16))
    torch.manual_seed(3)
    labelled = UNet(channels=(8, 16), classes=10)
    shared = labelled.state_dict()
    assert all(torch.equal(value, shared[name]) for name, value in plain.state_dict().items())


def test_no_label_is_the_last_row_and_each_label_says_something_else():
    model, x, t = wake(UNet(channels=(8, 16), classes=3)), torch.randn(1, 1, 8, 8), steps(1)
    out = [model(x, t, torch.tensor([y])).detach() for y in range(4)]
    assert torch.equal(model(x, t), out[3])
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in itertools.combinations(out, 2))


def test_zero_init():
    layer = torch.nn.Conv2d(2, 3, 3)
    assert layer.weight.any() and zero_init(layer) is layer
    assert not layer.weight.any() and not layer.bias.any()


# ------------------------------------------------------------------ the cut networks of notebook 02

def test_the_notebooks_network_with_nothing_cut_is_the_unet_and_each_cut_is_another():
    space = defined_in("02", "time_embedding", "Cut", "replace_norms", "build")
    torch.manual_seed(0)
    whole = wake(UNet(channels=(16, 32, 64)))
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([2, 400, 950])
    for without in ("nothing", "skips", "t", "attention", "norm"):
        net = space["build"](without)
        net.load_state_dict(whole.state_dict(), strict=without != "norm")
        same = torch.equal(net(x, t), whole(x, t))
        assert same == (without == "nothing"), without
    net = space["build"]("t")
    net.load_state_dict(whole.state_dict())
    assert torch.equal(net(x[:1], t[:1]), net(x[:1], t[2:]))

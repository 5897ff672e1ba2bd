"""The network: shapes, gradients, time, attention."""

import math

import pytest
import series
import torch

import ddpm_utils as d


def wake(model):
    """Zero-initialised layers get small random weights, as after some training."""
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("channels, shape", [
    *[((32, 64, 128), (batch, 1, 28, 28)) for batch in (1, 3, 7)],
    *[((16, 32, 64, 64), (batch, 3, 128, 128)) for batch in (1, 3)],  # photographs
    *[((8, 16, 16), (2, 1, *size)) for size in ((4, 4), (8, 12), (32, 20))]])
def test_it_starts_at_zero_keeps_the_shape_and_gradients_reach_every_parameter(channels, shape):
    model, x, t = d.UNet(shape[1], channels), torch.randn(shape), torch.arange(shape[0]) + 994
    assert not model(x, t).any()
    out = wake(model)(x, t)
    assert out.shape == shape and out.dtype == torch.float32
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    twin = d.UNet(**model.config)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x, t), out)


def test_output_depends_on_t_and_on_the_label_and_no_label_is_the_last_row():
    model, t = wake(series.small_unet(classes=3)), torch.full((4,), 5)
    x = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1)
    for out in (model(x, torch.tensor([1, 2, 500, 1000])), model(x, t, torch.arange(4))):
        apart = torch.cdist(out.flatten(1), out.flatten(1), p=math.inf) + torch.eye(4)
        assert (apart > 1e-4).all()
    assert torch.equal(model(x, t), model(x, t, torch.full((4,), 3)))


def test_output_depends_on_every_pixel():
    """Through the middle and its attention, the first pixel out sees the last one in."""
    model, x = wake(d.UNet(channels=(16, 32, 32))), torch.randn(1, 1, 16, 16, requires_grad=True)
    model(x, torch.tensor([5]))[0, 0, 0, 0].backward()
    assert (x.grad != 0).all()


def test_eval_is_deterministic_pictures_do_not_mix_and_the_input_is_left_alone():
    model, t = wake(d.UNet()).eval(), torch.tensor([1, 10, 100, 1000])
    x = torch.randn(28, 28, 1, 4).permute(3, 2, 0, 1)  # not contiguous
    kept = x.clone()
    with torch.no_grad():
        out = model(x, t)
        assert torch.equal(out, model(x, t)) and torch.equal(x, kept)
        torch.testing.assert_close(out, model(x.contiguous(), t))
        for i in range(4):  # a picture alone gets what it gets in company
            alone = model(x[i : i + 1], t[i : i + 1])[0]
            torch.testing.assert_close(alone, out[i], rtol=1e-3, atol=1e-4)


def test_attention_is_the_explicit_softmax():
    layer, x = d.SelfAttention(16, heads=4), torch.randn(2, 16, 3, 5)
    assert torch.equal(layer(x), x)  # fresh, it is its shortcut and nothing else
    weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias[:, None]
    with torch.no_grad():
        out, normed = wake(layer)(x), layer.norm(x).flatten(2)  # (2, 16, 15)
        mixed = torch.zeros_like(normed)
        for b in range(2):
            q, k, v = (weight @ normed[b] + bias).split(16)  # (16, 15) each
            for own in torch.arange(16).split(4):  # the channels of a head
                for i in range(15):  # pixel i asks
                    scores = torch.stack([q[own, i] @ k[own, j] for j in range(15)]) / math.sqrt(4)
                    mixed[b, own, i] = v[own] @ (scores.exp() / scores.exp().sum())
        expected = layer.out.weight[:, :, 0, 0] @ mixed + layer.out.bias[:, None]
    assert float((out - x).abs().max()) > 1e-2
    torch.testing.assert_close(out, x + expected.view_as(x), rtol=1e-4, atol=1e-5)


def test_time_embedding_is_its_formula():
    t, embedding = [0, 1, 37, 1000], d.time_embedding(torch.tensor([0, 1, 37, 1000]), 16)
    angles = [[step / 10_000 ** (2 * i / 16) for i in range(8)] for step in t]
    expected = [[*map(math.sin, row), *map(math.cos, row)] for row in angles]
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=0, atol=1e-4)


def test_every_step_has_its_own_embedding():
    embedding = d.time_embedding(torch.arange(0, 1001), 32)
    assert float((torch.cdist(embedding, embedding) + 10 * torch.eye(1001)).min()) > 0.1


@pytest.mark.parametrize("channels", [(16, 16), (16, 32)])
def test_residual_block_is_its_formula(channels):
    block = d.ResidualBlock(*channels, time_dim=24)
    x, time = torch.randn(2, channels[0], 6, 6), torch.randn(2, 24)
    shortcut = x if channels[0] == channels[1] else block.skip(x)
    assert torch.equal(block(x, time), shortcut) and shortcut.any()  # fresh, it is nothing else
    with torch.no_grad():
        out = wake(block)(x, time)
        h = block.conv1(torch.nn.functional.silu(block.norm1(x)))
        scale, shift = block.time(time)[:, :, None, None].split(channels[1], dim=1)
        grouped = h.view(2, 8, -1)
        away = grouped - grouped.mean(dim=2, keepdim=True)
        h = (away / (away.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()).view_as(h)
        h = h * block.norm2.weight[:, None, None] + block.norm2.bias[:, None, None]
        h = h * (1 + scale) + shift
        expected = shortcut + block.conv2(h * torch.sigmoid(h))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_an_untrained_label_changes_nothing_and_old_weights_load():
    """A zero embedding takes no random number from other layers, and changes no bit."""
    plain, labelled = series.small_unet(), series.small_unet(classes=10)  # of one seed
    assert all(torch.equal(labelled.state_dict()[k], v) for k, v in plain.state_dict().items())
    missing = labelled.load_state_dict(wake(plain).state_dict(), strict=False)
    assert missing.missing_keys == ["label.weight"] and missing.unexpected_keys == []
    x, t = torch.randn(11, 1, 8, 8), torch.arange(1, 12)
    for y in (None, torch.arange(11)):
        assert torch.equal(labelled(x, t, y), plain(x, t))


def test_the_notebooks_network_with_nothing_cut_is_the_unet_and_each_cut_is_another():
    space = series.defined_in("02", "time_embedding", "Cut", "replace_norms", "build")
    whole = wake(d.UNet(channels=(16, 32, 64)))
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([2, 400, 950])
    for without in ("nothing", "skips", "t", "attention", "norm"):
        net = space["build"](without)
        net.load_state_dict(whole.state_dict(), strict=without != "norm")
        assert torch.equal(net(x, t), whole(x, t)) == (without == "nothing"), without
        knows_no_t = torch.equal(net(x[:1], t[:1]), net(x[:1], t[2:]))
        assert knows_no_t == (without == "t"), without

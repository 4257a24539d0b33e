"""VisionLSTM: its block against the written-out formulas, and what every argument does."""

import copy
import inspect
import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones import VisionLSTM, layers
from vil_lightning.backbones import vision_lstm as vision_lstm_module
from vil_lightning.backbones.vision_lstm import ViLBlock

VERSION_1: dict[str, Any] = {
    "conv_kind": "causal1d",
    "conv_kernel_size": 4,
    "proj_bias": False,
    "norm_bias": False,
    "global_pool": "bilateral_avg",
}
VERSIONS = pytest.mark.parametrize("version", [VERSION_1, {}], ids=["version_1", "version_2"])


def build(**kwargs: Any) -> VisionLSTM:
    """A small model with random parameters, the same in every model that has one of that name and shape."""
    model = VisionLSTM(**{"img_size": 64, "embed_dim": 32, "depth": 4, "num_classes": 10, **kwargs}).eval()
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 10
        with torch.no_grad():
            parameter.copy_(noise / math.sqrt(fan_in) + (1 if "norm.weight" in name or "gamma" in name else 0))


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- the block, written out -------------------------------------------------------------------------------------------


def reference_block(params: dict[str, Tensor], x: Tensor, grid: tuple[int, int], reverse: bool, heads: int) -> Tensor:
    """One block in the words of the paper, slowly: a reversed scan flips the sequence, runs forwards and flips back."""
    batch, seq_len, _ = x.shape

    def linear(name: str, u: Tensor) -> Tensor:
        y = u @ params[f"{name}.weight"].T
        return y + params[f"{name}.bias"] if f"{name}.bias" in params else y

    def normalise(u: Tensor) -> Tensor:
        u = u - u.mean(-1, keepdim=True)
        return u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def affine(name: str, u: Tensor) -> Tensor:
        return u * params[f"{name}.weight"] + params.get(f"{name}.bias", torch.zeros(()))

    branch = "mixer.branches.0."
    u = affine("norm", normalise(x))
    if reverse:
        u = u.flip(1)
    a, z = linear("mixer.proj_up", u).chunk(2, dim=-1)
    inner = a.shape[-1]

    kernel = params[branch + "conv.weight"][:, 0]
    conv = torch.zeros_like(a) + params[branch + "conv.bias"]
    if kernel.ndim == 2:  # causal: token t sees t - 3 .. t
        for t in range(seq_len):
            for j in range(4):
                if t - 3 + j >= 0:
                    conv[:, t] = conv[:, t] + kernel[:, j] * a[:, t - 3 + j]
    else:  # 3 x 3 on the grid, zeros around it
        height, width = grid
        for t in range(seq_len):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    row, col = t // width + i, t % width + j
                    if 0 <= row < height and 0 <= col < width:
                        conv[:, t] = conv[:, t] + kernel[:, i + 1, j + 1] * a[:, row * width + col]
    c = conv * torch.sigmoid(conv)

    def block_diagonal(name: str, u: Tensor) -> Tensor:
        weight = torch.block_diag(*params[f"{branch}{name}.weight"])
        y = u @ weight.T
        return y + params[f"{branch}{name}.bias"] if f"{branch}{name}.bias" in params else y

    q, k, v = block_diagonal("q_proj", c), block_diagonal("k_proj", c), block_diagonal("v_proj", a)
    gate_input = torch.cat([q, k, v], dim=-1)
    igate, fgate = linear(branch + "igate", gate_input), linear(branch + "fgate", gate_input)  # (B, S, NH)

    width_h = inner // heads
    hidden = []
    for b in range(batch):
        rows = []
        for t in range(seq_len):
            parts = []
            for head in range(heads):
                of_head = slice(head * width_h, (head + 1) * width_h)
                log_f = F.logsigmoid(fgate[b, :, head])
                log_d = torch.stack([log_f[s + 1 : t + 1].sum() + igate[b, s, head] for s in range(t + 1)])
                m = log_d.max()
                scores = (k[b, : t + 1, of_head] @ q[b, t, of_head]) / math.sqrt(width_h) * torch.exp(log_d - m)
                norm = torch.maximum(scores.sum().abs(), torch.exp(-m)) + 1e-6
                parts.append(normalise(scores @ v[b, : t + 1, of_head] / norm))
            rows.append(torch.cat(parts))
        hidden.append(torch.stack(rows))
    h = affine(branch + "norm", torch.stack(hidden))
    y = linear("mixer.proj_down", (h + params[branch + "skip"] * c) * z * torch.sigmoid(z))
    return x + (y.flip(1) if reverse else y)


@VERSIONS
@pytest.mark.parametrize("index", [0, 1], ids=["even_block", "odd_block"])
def test_block__equals_the_written_out_formulas(index: int, version: dict[str, Any]) -> None:
    block = build(**version).double().blocks[index]
    x = torch.randn(2, 15, 32, dtype=torch.float64)
    expected = reference_block(dict(block.named_parameters()), x, (3, 5), reverse=index == 1, heads=4)
    torch.testing.assert_close(block(x, layers.Layout(3, 5)), expected, rtol=1e-10, atol=1e-10)


@VERSIONS
def test_forward__is_the_chain_of_its_parts(version: dict[str, Any]) -> None:
    model = build(**version).double()
    x = images(64, 96).double()
    model.set_input_size((64, 96))
    randomise(model)
    patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, h, w, 3 * 16 * 16)
    tokens = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    tokens = (tokens + model.pos_embed.embed).flatten(1, 2)
    for i, block in enumerate(model.blocks):
        tokens = reference_block(dict(block.named_parameters()), tokens, (4, 6), reverse=i % 2 == 1, heads=4)
    tokens = F.layer_norm(tokens, (32,), model.norm.weight, model.norm.bias, eps=1e-6)
    first, last = tokens[:, 0], tokens[:, -1]
    pooled = (first + last) / 2 if version else torch.cat([first, last], dim=-1)
    pooled = F.layer_norm(pooled, pooled.shape[-1:], model.fc_norm.weight, model.fc_norm.bias, eps=1e-5)
    expected = pooled @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("design, changed", [("unidirectional", 1), ("alternating", 16)])
def test_block_design__decides_which_tokens_see_the_last_patch(design: str, changed: int) -> None:
    model = build(**VERSION_1, block_design=design, depth=2)
    x = images(batch=1)
    other = x.clone()
    other[..., -16:, -16:] += 1
    differs = (model.forward_features(x) - model.forward_features(other)).abs().amax(-1)[0] > 1e-6
    assert differs.sum() == changed
    assert differs[-1]


# --- arguments --------------------------------------------------------------------------------------------------------


# Each argument: a value besides the default of `build`, and what else to set in both models for it to matter.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "img_size": ((64, 96), {}),
    "patch_size": (32, {}),
    "stride": (8, {}),
    "in_chans": (1, {}),
    "num_classes": (0, {}),
    "global_pool": ("avg", {}),
    "embed_dim": (64, {}),
    "depth": (3, {}),
    "num_heads": (2, {}),
    "block_design": ("unidirectional", {}),
    "conv_kind": ("causal1d", {}),
    "conv_kernel_size": (5, {}),
    "use_v_conv": (True, {}),
    "share_conv": (False, {}),
    "qkv_block_size": (8, {}),
    "proj_bias": (False, {}),
    "norm_bias": (False, {}),
    "init_values": (0.5, {}),
    "drop_rate": (0.5, {}),
    "drop_path_rate": (0.5, {}),
    "drop_path_decay": (True, {"drop_path_rate": 0.5}),
    "norm_eps": (0.1, {}),
    "final_norm_eps": (0.1, {}),
    "head_norm_eps": (0.1, {}),
}
TESTED_APART = {"weight_init", "mlstm_backend", "dynamic_img_size"}  # here, here, and in test_timm_conformance.py


def test_every_argument__has_a_test() -> None:
    assert set(CHANGES) | TESTED_APART == set(inspect.signature(VisionLSTM).parameters)


@pytest.mark.parametrize("name", CHANGES)
def test_argument__changes_parameters_or_output(name: str) -> None:
    value, others = CHANGES[name]

    def observe(**kwargs: Any) -> tuple[Any, Tensor]:
        model = build(**others, **kwargs).train()
        size = (64, 96) if kwargs.get("img_size") else (64, 64)
        torch.manual_seed(0)
        y = model(images(*size)[:, : kwargs.get("in_chans", 3)])
        return {n: p.shape for n, p in model.named_parameters()}, y

    shapes, y = observe()
    changed_shapes, changed_y = observe(**{name: value})
    assert shapes != changed_shapes or y.shape != changed_y.shape or (y - changed_y).abs().max() > 1e-5


def test_weight_init__fixed_divides_the_down_projections_by_depth() -> None:
    std = {}
    for kind in ("published", "fixed"):
        model = VisionLSTM(img_size=64, embed_dim=64, depth=4, weight_init=kind)
        std[kind] = torch.cat([b.mixer.proj_down.weight.detach().flatten() for b in model.blocks]).std().item()
    assert std["published"] == pytest.approx(2 / 8, rel=0.05)
    assert std["fixed"] == pytest.approx(2 / 8 / 4, rel=0.05)


@VERSIONS
@pytest.mark.parametrize("backend", ["recurrent", "parallel", "chunkwise"])
def test_mlstm_backend__reaches_the_operator_and_gives_equal_outputs(
    backend: str, version: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build(**version).double()(images().double())
    backends, original = [], layers.mlstm
    monkeypatch.setattr(layers, "mlstm", lambda *a, **k: backends.append(k["backend"]) or original(*a, **k))
    actual = build(**version, mlstm_backend=backend).double()(images().double())
    assert backends == [backend] * 4
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "pooling, width, expected",
    [
        ("bilateral_concat", 64, lambda x: torch.cat([x[:, 0], x[:, 23]], dim=1)),
        ("bilateral_avg", 32, lambda x: 0.5 * x[:, 0] + 0.5 * x[:, 23]),
        ("avg", 32, lambda x: x.sum(1) / 24),
        ("middle_patch", 32, lambda x: x[:, 12]),
        ("first", 32, lambda x: x[:, 0]),
        ("last", 32, lambda x: x[:, 23]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pooling__reads_the_named_tokens(pooling: str, width: int, expected: Any) -> None:
    model = build(global_pool=pooling, num_classes=0)
    tokens = model.forward_features(images(64, 96))
    torch.testing.assert_close(model.pool(tokens), expected(tokens))
    assert model.head_hidden_size == width
    assert model(images(64, 96)).shape == (2, width)


@VERSIONS
@pytest.mark.parametrize("size, grid", [((64, 64), (7, 7)), ((64, 96), (7, 11))], ids=["square", "wide"])
def test_stride_8__overlaps_patches(size: tuple[int, int], grid: tuple[int, int], version: dict[str, Any]) -> None:
    model = build(**version, img_size=size, stride=8, patch_size=16)
    assert model.patch_embed.grid_size == grid
    assert model.patch_embed.num_patches == grid[0] * grid[1]
    assert model.patch_embed.feat_ratio() == 8
    assert model.pos_embed.embed.shape[1:3] == (size[0] // 16, size[1] // 16)  # as published, and interpolated
    assert model.forward_features(images(*size)).shape == (2, grid[0] * grid[1], 32)
    final, maps = model.forward_intermediates(images(*size))
    assert maps[-1].shape == (2, 32, *grid)
    assert final.isfinite().all()


# --- stochastic depth, LayerScale, checkpointing ----------------------------------------------------------------------


def test_drop_path__drops_in_training_only() -> None:
    model = build(drop_path_rate=0.5)
    x = images(batch=8)
    torch.testing.assert_close(model(x), build()(x), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize("decay, expected", [(False, [0.3] * 4), (True, [0.0, 0.1, 0.2, 0.3])], ids=["flat", "linear"])
def test_drop_path__rates(decay: bool, expected: list[float]) -> None:
    model = build(drop_path_rate=0.3, drop_path_decay=decay)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("batch, rate, kept", [(128, 0.05, 122), (10, 0.2, 8), (64, 0.3, 45)])
def test_images_to_keep__is_the_nearest_number_and_every_image_equally_often(
    batch: int, rate: float, kept: int
) -> None:
    draws = torch.stack([layers.images_to_keep(batch, rate, torch.device("cpu")) for _ in range(2000)])
    assert draws.shape == (2000, kept)
    assert (draws.diff(dim=1) > 0).all()
    counts = torch.bincount(draws.flatten(), minlength=batch) / 2000
    assert (counts - kept / batch).abs().max() < 5 * (rate / 2000) ** 0.5


@pytest.mark.parametrize("batch, rate", [(8, 0.05), (4, 0.2), (128, 0.003), (1, 0.5), (2, 0.995)])
def test_images_to_keep__none_where_the_number_is_too_far_off(batch: int, rate: float) -> None:
    assert layers.images_to_keep(batch, rate, torch.device("cpu")) is None


@pytest.mark.parametrize("masked", [False, True], ids=["all_patches", "visible_ones"])
def test_drop_path__computes_kept_images_only_and_scales_them(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = build(drop_path_rate=0.3).double().blocks[1].train()
    kept = torch.tensor([0, 1, 3, 4, 6, 7, 9])
    monkeypatch.setattr(vision_lstm_module, "images_to_keep", lambda batch, rate, device: kept)
    visible = torch.stack([torch.randperm(15)[:6].sort().values for _ in range(10)]) if masked else None
    layout = layers.Layout(3, 5, visible=visible)
    x = torch.randn(10, 6 if masked else 15, 32, dtype=torch.float64, requires_grad=True)
    seen: list[int] = []
    block.mixer.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    out = block(x, layout)
    assert seen == [7]

    mask = torch.zeros(10, 1, 1, dtype=torch.float64)
    mask[kept] = 10 / 7
    expected = x + mask * block.mixer(block.norm(x), layout)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out[[2, 5, 8]], x[[2, 5, 8]], rtol=0, atol=0)
    weights = [x, *block.parameters()]
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, weights, grad), torch.autograd.grad(expected, weights, grad))


def test_drop_path__draws_for_each_image_of_a_small_batch() -> None:
    block = build(drop_path_rate=0.3).blocks[1].train()
    x = torch.randn(4, 15, 32)
    numbers = {(block(x, layers.Layout(3, 5)) == x).flatten(1).all(1).sum().item() for _ in range(50)}
    assert len(numbers) > 1


def test_layer_scale__scales_the_residual_branch() -> None:
    plain, scaled = build(), build(init_values=1.0)
    for block in scaled.blocks:
        nn.init.ones_(block.ls.gamma)
    torch.testing.assert_close(scaled(images()), plain(images()), rtol=0, atol=0)
    for block in scaled.blocks:
        nn.init.zeros_(block.ls.gamma)
    tokens, _ = scaled._embed(images())
    torch.testing.assert_close(scaled.forward_features(images()), scaled.norm(tokens), rtol=0, atol=0)
    gamma = VisionLSTM(img_size=64, embed_dim=32, depth=1, init_values=0.01).blocks[0].ls.gamma
    torch.testing.assert_close(gamma, torch.full((32,), 0.01))


@VERSIONS
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_grad_checkpointing__gives_equal_outputs_and_gradients(drop_path_rate: float, version: dict[str, Any]) -> None:
    results = []
    for enable in (False, True):
        model = build(**version, drop_path_rate=drop_path_rate).train()
        model.set_grad_checkpointing(enable)
        calls = []
        model.blocks[0].mixer.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(5)
        y = model(images())
        y.square().sum().backward()
        assert len(calls) == 1 + enable  # run once more in the backward pass
        results.append((y.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


# --- torch around it --------------------------------------------------------------------------------------------------


@VERSIONS
def test_compile__in_one_graph(version: dict[str, Any]) -> None:
    model = build(**version, depth=2).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        y = forward(images())
        y.square().sum().backward()
        results.append((y.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@VERSIONS
def test_bfloat16_autocast__is_close_to_float32(version: dict[str, Any]) -> None:
    model = build(**version)
    expected = model.forward_features(images())
    with torch.autocast("cpu", torch.bfloat16):
        actual = model.forward_features(images())
        model(images()).float().sum().backward()
    assert not torch.equal(actual, expected)
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@VERSIONS
def test_pure_bfloat16__runs(version: dict[str, Any]) -> None:
    model = build(**version).bfloat16()
    y = model(images().bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


def test_deepcopy__is_independent() -> None:
    model = build()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(images()), model(images()), rtol=0, atol=0)
    with torch.no_grad():
        twin.blocks[0].mixer.proj_up.weight.zero_()
    assert not torch.allclose(twin(images()), model(images()))


def test_batch__items_do_not_mix() -> None:
    model = build()
    torch.testing.assert_close(model(images())[1:], model(images()[1:]), rtol=1e-5, atol=1e-5)


def cubic_resampling(old: int, new: int) -> Tensor:
    """Matrix (new, old) of cubic convolution (a = -0.75) between pixel centres, borders repeated, no antialiasing."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d, a = abs(centre - j), -0.75
            inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += inner if d <= 1 else outer
    return matrix


@pytest.mark.parametrize("grid", [(6, 9), (14, 14), (3, 5)], ids=["larger", "twice", "smaller"])
def test_position_embedding__is_resampled_bicubically_between_pixel_centres(grid: tuple[int, int]) -> None:
    embed = torch.randn(1, 7, 7, 3, dtype=torch.float64)
    expected = torch.einsum("hi,bijd,wj->bhwd", cubic_resampling(7, grid[0]), embed, cubic_resampling(7, grid[1]))
    torch.testing.assert_close(layers.resize_position_embedding(embed, grid), expected)


@pytest.mark.parametrize("tile_size", [4, 16, 64])
@pytest.mark.parametrize("dim", [4, 20, 96])
def test_block_diagonal_linear__equals_the_dense_matrix_for_every_tile(
    dim: int, tile_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.BlockDiagonalLinear, "tile_size", tile_size)
    linear = layers.BlockDiagonalLinear(dim).double()
    randomise(linear)
    x = torch.randn(2, 3, dim, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ torch.block_diag(*linear.weight).T + linear.bias)


@pytest.mark.parametrize("dim, num_heads", [(96, 4), (96, 1), (20, 5), (16, 8)])  # with 8 heads a block of 4 spans two
def test_block_diagonal_linear__with_heads_equals_cutting_its_result(dim: int, num_heads: int) -> None:
    linear = layers.BlockDiagonalLinear(dim).double()
    randomise(linear)
    x = torch.randn(2, 3, dim, dtype=torch.float64)
    expected = linear(x).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    torch.testing.assert_close(linear(x, num_heads), expected)
    assert linear(x[:0], num_heads).shape == expected[:0].shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3)], ids=["batch", "heads", "tokens"])
def test_multi_head_norm__is_a_norm_of_each_head_whatever_the_memory_order(order: tuple[int, ...], bias: bool) -> None:
    norm = layers.MultiHeadNorm(12, 3, bias=bias).double()
    randomise(norm)
    x, skip, residual = (torch.randn(size, dtype=torch.float64) for size in ((2, 3, 5, 4), (12,), (2, 5, 12)))
    x = x.permute(order).contiguous().permute(order)  # an involution each
    heads = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    expected = heads.transpose(1, 2).flatten(2) * norm.weight + skip * residual
    expected = expected if norm.bias is None else expected + norm.bias
    # Version 1's convolution leaves the tokens innermost.
    for added in (residual, residual.transpose(1, 2).contiguous().transpose(1, 2)):
        output = norm(x, skip, added)
        torch.testing.assert_close(output, expected)
        assert output.is_contiguous()


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"global_pool": "max"}, r"global_pool='max' is not known. Available: 'bilateral_concat'.*'avg'"),
        ({"block_design": "zigzag"}, r"block_design='zigzag' is not known. Available: 'alternating'"),
        ({"conv_kind": "conv3d"}, r"conv_kind='conv3d' is not known. Available: 'conv2d', 'causal1d'"),
        ({"mlstm_backend": "cuda"}, r"mlstm_backend='cuda' is not known. Available: 'auto', 'recurrent'"),
        ({"weight_init": "zeros"}, r"weight_init='zeros' is not known. Available: 'published', 'fixed'"),
        ({"img_size": 100}, r"height 100 .*not divisible by patch_size=16 .*Use a multiple of 16, e\.g\. 96"),
        ({"img_size": (64, 72)}, r"width 72 .*not divisible by patch_size=16"),
        ({"num_heads": 5}, r"num_heads=5 and qkv_block_size=4 must divide the inner width 64"),
        ({"qkv_block_size": 3}, r"num_heads=4 and qkv_block_size=3 must divide the inner width 64"),
        ({"conv_kernel_size": 4}, r"conv_kernel_size=4 must be odd"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1\.0 must be in \[0, 1\)"),
        ({"depth": 0}, r"depth=0 must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument__is_named_with_what_would_fit(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(**kwargs)


def test_bad_input_size__is_named_with_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"height 100 .*not divisible by patch_size=16 .*e\.g\. 96"):
        build()(images(100, 64))


def test_reset_classifier__refuses_unknown_pooling() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"global_pool='max' is not known"):
        model.reset_classifier(3, "max")
    assert model(images()).shape == (2, 10)


def test_conv2d__refuses_tokens_that_do_not_fill_the_grid() -> None:
    block: ViLBlock = build().blocks[0]
    with pytest.raises(ValueError, match="15 tokens do not fill a grid of 4 x 4"):
        block(torch.randn(1, 15, 32), layers.Layout(4, 4))

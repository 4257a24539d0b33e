"""Encoding a part of the patches: what is hidden has no effect at all, what is visible is computed as if it were alone."""

import itertools
from typing import Any

import pytest
import timm
import torch
from test_variants import order
from test_vision_lstm import VERSION_1, build, images
from torch import Tensor, nn

from vil_lightning import VisionLSTM
from vil_lightning.backbones import layers
from vil_lightning.backbones.vision_lstm import BLOCK_DESIGNS
from vil_lightning.errors import ConfigError
from vil_lightning.masking import hidden_mask, visible_positions
from vil_lightning.methods.backbone import patch_tokens
from vil_lightning.methods.masked import check_maskable, encode_masked, encode_visible

H, W = 3, 5
HIDDEN = 8
VERSIONS: dict[str, dict[str, Any]] = {"version_1": VERSION_1, "version_2": {}}
POOLS = ("bilateral_concat", "middle_cls", "bilateral_cls_concat")
VIT: dict[str, Any] = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


def vil(version: str = "version_2", **kwargs: Any) -> VisionLSTM:
    return build(**{**VERSIONS[version], "img_size": (16 * H, 16 * W), **kwargs}).double()


def vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    torch.manual_seed(4)
    return timm.create_model(name, **{**VIT, "img_size": (16 * H, 16 * W), **kwargs}).double().eval()


def masks(batch: int = 2, h: int = H, w: int = W, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A different mask for every image, and the visible positions."""
    torch.manual_seed(seed)
    hidden = hidden_mask("random", batch, (h, w), HIDDEN / (h * w))
    return hidden, visible_positions(hidden, h * w - HIDDEN)


def pixels(hidden: Tensor, h: int = H, w: int = W, patch: int = 16) -> Tensor:
    """(B, N) -> (B, 1, H, W)."""
    image = hidden.view(-1, 1, h, w)
    return image.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def spoilt(x: Tensor, hidden: Tensor, value: float) -> Tensor:
    return torch.where(pixels(hidden), torch.full_like(x, value), x)


def encode(model: Any, x: Tensor, hidden: Tensor, visible: Tensor, mask_token: Tensor | None) -> Tensor:
    """Patch tokens, hidden patches left out or replaced."""
    if mask_token is None:
        return encode_visible(model, x, visible)
    return patch_tokens(model, encode_masked(model, x, hidden, mask_token))


# --- nothing of a hidden patch gets through ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask_token", [False, True], ids=["left out", "mask token"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("design", "pool"),
    [*((design, "bilateral_concat") for design in BLOCK_DESIGNS), *(("alternating_quad", pool) for pool in POOLS[1:])],
)
def test_vil__does_not_see_hidden_pixels(design: str, pool: str, version: str, mask_token: bool) -> None:
    model, x = vil(version, block_design=design, global_pool=pool), images(16 * H, 16 * W).double()
    hidden, visible = masks()
    token = torch.randn(32, dtype=torch.float64) if mask_token else None
    with torch.no_grad():
        expected = encode(model, x, hidden, visible, token)
        for value in (1e30, torch.nan):
            assert torch.equal(encode(model, spoilt(x, hidden, value), hidden, visible, token), expected)
        other = encode(model, spoilt(x, ~hidden, 0.5), hidden, visible, token)
    assert expected.shape == (2, H * W if mask_token else H * W - HIDDEN, 32)
    assert expected.isfinite().all()
    assert not torch.isclose(other, expected).any(-1).all()


@pytest.mark.parametrize("mask_token", [False, True], ids=["left out", "mask token"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_vit__does_not_see_hidden_pixels(name: str, dynamic: bool, mask_token: bool) -> None:
    model, x = vit(name, dynamic_img_size=dynamic), images(16 * H, 16 * W).double()
    check_maskable(model, "MAE")
    hidden, visible = masks()
    token = torch.randn(32, dtype=torch.float64) if mask_token else None
    with torch.no_grad():
        expected = encode(model, x, hidden, visible, token)
        for value in (1e30, torch.nan):
            assert torch.equal(encode(model, spoilt(x, hidden, value), hidden, visible, token), expected)
    assert expected.shape == (2, H * W if mask_token else H * W - HIDDEN, 32)
    assert expected.isfinite().all()


@pytest.mark.parametrize("version", VERSIONS)
def test_vil__no_gradient_reaches_hidden_pixels(version: str) -> None:
    model, x = vil(version, block_design="alternating_quad"), images(16 * H, 16 * W).double().requires_grad_()
    hidden, visible = masks()
    encode_visible(model, x, visible).square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum(1, keepdim=True) > 0
    assert torch.equal(reached, ~pixels(hidden))


# --- everything visible is the dense forward --------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("design", "pool"), list(itertools.product(("alternating", "quaddirectional_shared"), POOLS)))
def test_vil__all_visible_is_the_dense_forward(design: str, pool: str, version: str) -> None:
    model, x = vil(version, block_design=design, global_pool=pool), images(16 * H, 16 * W).double()
    everything = torch.arange(H * W).expand(2, -1)
    assert torch.equal(model.forward_features(x, everything), model.forward_features(x))
    token = torch.full((32,), torch.nan, dtype=torch.float64)
    nothing = torch.zeros(2, H * W, dtype=torch.bool)
    assert torch.equal(model.forward_features(x, hidden=nothing, mask_token=token), model.forward_features(x))
    patches = encode_visible(model, x, everything)
    assert torch.equal(patches, model.split_tokens(model.forward_features(x))[0])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_vit__all_visible_is_the_dense_forward(name: str) -> None:
    model, x = vit(name), images(16 * H, 16 * W).double()
    everything = torch.arange(H * W).expand(2, -1)
    assert torch.equal(encode_visible(model, x, everything), model.forward_features(x)[:, model.num_prefix_tokens :])


def test_vil__other_sizes_than_it_was_built_for() -> None:
    model, x = vil(), images(64, 32).double()  # 4 x 2 patches
    everything = torch.arange(8).expand(2, -1)
    assert torch.equal(model.forward_features(x, everything), model.forward_features(x))
    assert model.forward_features(x, everything[:, 2:5]).shape == (2, 3, 32)


# --- against the words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 0, 1), (2, 1, 3)])
def test_to_columns__of_visible_patches_against_explicit_permutations(cls: tuple[int, int, int]) -> None:
    hidden, visible = masks(batch=5)
    layout = layers.Layout(H, W, layers.ClassTokens(*cls), visible)
    count = H * W - HIDDEN
    assert layout.seq_len == count + sum(cls)
    x = torch.arange(layout.seq_len, dtype=torch.float32).view(1, -1, 1).expand(5, -1, 1)
    by_column, numbers = layout.to_columns(x), order("rows", 1, count, layout.cls)
    assert numbers == x[0].flatten().tolist()
    dense = [i * W + j for j in range(W) for i in range(H)]
    half = (count + 1) // 2
    for image in range(5):
        seen = visible[image].tolist()
        # Of the dense column-major sequence, what is left when hidden patches are taken away.
        wanted = [seen.index(place) for place in dense if place in seen]
        patch_places = [cls[0] + k + (cls[1] if k >= half else 0) for k in range(count)]
        expected = list(range(layout.seq_len))
        for place, source in zip(patch_places, wanted, strict=True):
            expected[place] = patch_places[source]
        assert by_column[image].flatten().tolist() == expected
    assert torch.equal(layout.transposed.to_columns(by_column), x)
    assert (layout.transposed.h, layout.transposed.w) == (W, H)
    column_major = [[j * H + i for j in range(W) for i in range(H) if not mask[i * W + j]] for mask in hidden.tolist()]
    assert layout.transposed.visible.tolist() == column_major


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cls", [(0, 0, 0), (1, 1, 0)])
def test_conv2d__sums_over_visible_neighbours_only(cls: tuple[int, int, int], reverse: bool) -> None:
    conv = vil().blocks[0].mixer.branches[0].conv
    hidden, visible = masks(batch=3)
    layout = layers.Layout(H, W, layers.ClassTokens(*cls), visible)
    x = torch.randn(3, layout.seq_len, 64, dtype=torch.float64)
    y, _ = layout.split(conv(x, layout, reverse))
    patches, tokens = layout.split(x)
    kernel = conv.weight[:, 0].flip(1, 2) if reverse else conv.weight[:, 0]
    for image, places in enumerate(visible.tolist()):
        for k, place in enumerate(places):
            total = conv.bias.clone()
            for down, right in itertools.product((-1, 0, 1), (-1, 0, 1)):
                i, j = place // W + down, place % W + right
                if 0 <= i < H and 0 <= j < W and not hidden[image, i * W + j]:
                    total = total + kernel[:, down + 1, right + 1] * patches[image, places.index(i * W + j)]
            torch.testing.assert_close(y[image, k], total, rtol=1e-12, atol=1e-12)
    _, of_tokens = layout.split(conv(x, layout, reverse))
    torch.testing.assert_close(of_tokens, tokens * kernel[:, 1, 1] + conv.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("design", BLOCK_DESIGNS)
def test_causal_vil__is_the_scan_of_the_kept_sequence(design: str) -> None:
    """With causal1d nothing but the order is left of the grid: a mask of whole rows is an image without them."""
    model = vil("version_1", block_design=design)
    x, places = torch.randn(2, H * W, 32, dtype=torch.float64), [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    kept = x[:, places]
    for block in model.blocks:
        masked = block(kept, layers.Layout(H, W, visible=torch.tensor([places, places])))
        torch.testing.assert_close(masked, block(kept, layers.Layout(2, W)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_mask_token__replaces_patch_embeddings(pool: str) -> None:
    model, x = vil(global_pool=pool), images(16 * H, 16 * W).double()
    hidden, _ = masks()
    token = torch.randn(32, dtype=torch.float64)
    actual = model.forward_features(x, hidden=hidden, mask_token=token)

    def replace(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        embedded.view(2, H * W, 32)[hidden] = token
        return embedded

    model.patch_embed.register_forward_hook(replace)
    assert torch.equal(actual, model.forward_features(x))  # positions are added to mask tokens, too
    assert model.split_tokens(actual)[0].shape == (2, H * W, 32)


def test_mask_token__gets_a_gradient_from_hidden_places_only() -> None:
    model, x = vil(), images(16 * H, 16 * W).double()
    token = torch.randn(32, dtype=torch.float64, requires_grad=True)
    model.forward_features(x, hidden=masks()[0], mask_token=token).sum().backward()
    assert token.grad is not None
    assert token.grad.abs().min() > 0
    token.grad = None
    model.forward_features(x, hidden=torch.zeros(2, H * W, dtype=torch.bool), mask_token=token).sum().backward()
    assert not token.grad.any()


@pytest.mark.parametrize("token", [False, True])
def test_vit__against_timms_own_forward(token: bool) -> None:
    """Attention that may not look at hidden tokens is the forward without them."""
    model, x = vit(), images(16 * H, 16 * W).double()
    hidden, visible = masks()
    mask_token = torch.randn(32, dtype=torch.float64) if token else None
    tokens = model.patch_embed(x)
    if mask_token is not None:
        tokens = torch.where(hidden[..., None], mask_token, tokens)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1) + model.pos_embed
    if mask_token is None:
        rows = [torch.cat([torch.tensor([0]), row + 1]) for row in visible]
        tokens = torch.stack([tokens[image, row] for image, row in enumerate(rows)])
    expected = model.norm(model.blocks(tokens))[:, 1:]
    assert torch.equal(encode(model, x, hidden, visible, mask_token), expected)


# --- refused, checkpointed, compiled ----------------------------------------------------------------------------------


def test_overlapping_patches__are_refused() -> None:
    model = build(stride=8)
    masked = {"hidden": torch.zeros(2, 4, dtype=torch.bool), "mask_token": torch.zeros(32)}
    for kwargs in ({"visible": torch.arange(4).expand(2, -1)}, masked):
        with pytest.raises(ValueError, match=r"overlap.*without stride"):
            model.forward_features(images(), **kwargs)
    assert model.forward_features(images()).shape == (2, 49, 32)
    with pytest.raises(ConfigError, match=r"MAE: model\.backbone\.kwargs\.stride=\(8, 8\).*Leave stride unset"):
        check_maskable(model, "MAE")


def test_hidden_and_visible__exclude_each_other() -> None:
    model, x, (hidden, visible) = vil(), images(16 * H, 16 * W).double(), masks()
    for kwargs in ({"hidden": hidden}, {"mask_token": torch.zeros(32)}, {"visible": visible, "hidden": hidden}):
        with pytest.raises(ValueError, match="either visible, or hidden together with mask_token"):
            model.forward_features(x, **kwargs)


@pytest.mark.parametrize("name", ["vil", "vit"])
def test_encode_masked__unequal_numbers_of_hidden_patches(name: str) -> None:
    """Each image as if it were alone."""
    model, x = (vil() if name == "vil" else vit()), images(16 * H, 16 * W).double()
    hidden, token = torch.zeros(2, H * W, dtype=torch.bool), torch.randn(32, dtype=torch.float64)
    hidden[0, 2:9] = True
    both = encode_masked(model, x, hidden, token)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], encode_masked(model, x[i : i + 1], hidden[i : i + 1], token))
    torch.testing.assert_close(both[1:], model.forward_features(x[1:]))


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_r_s16_p8_224"], ids=str)
def test_unmaskable__networks_that_mix_patches_before_the_blocks(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    with pytest.raises(ConfigError, match=r"SimMIM hides patches.*Set model\.backbone\.name"):
        check_maskable(model, "SimMIM")


@pytest.mark.parametrize("make", [vil, vit])
def test_gradient_checkpointing__changes_nothing(make: Any) -> None:
    model, x, visible = make().train(), images(16 * H, 16 * W).double(), masks()[1]
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        output = encode_visible(model, x, visible)
        output.square().sum().backward()
        results.append([output, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(calls) == 3  # once, and twice when what was forgotten is computed anew
    assert len(results[0]) == len(results[1])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(
    ("version", "design", "token"),
    [
        ("version_1", "quaddirectional_shared", False),
        ("version_2", "bidirectional_shared", False),
        ("version_1", "alternating", True),
    ],
)
def test_forward_features__compiles_into_one_graph(version: str, design: str, token: bool) -> None:
    torch._dynamo.reset()
    args = {**VERSIONS[version], "img_size": (16 * H, 16 * W), "global_pool": "middle_cls", "depth": 1}
    model = build(**args, block_design=design)
    x, (hidden, visible) = images(16 * H, 16 * W), masks()
    arguments: Any = {"hidden": hidden, "mask_token": torch.randn(32)} if token else {"visible": visible}
    expected = model.forward_features(x, **arguments)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")(x, **arguments)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)

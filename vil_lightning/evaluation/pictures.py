"""A picture of what a network's patch tokens tell apart."""

import torch
from torch import Tensor

from vil_lightning.callbacks.pca_maps import NUM_COMPONENTS, patch_maps, picture
from vil_lightning.evaluation.subject import Subject
from vil_lightning.representation import principal_components


@torch.no_grad()
def patch_picture(subject: Subject, num_images: int = 6, size: int = 128) -> Tensor | None:
    """Val images and the principal components of their patch tokens, uint8 (3, H, W); None for a network without these."""
    backbone, data = subject.build(), subject.data
    if not hasattr(backbone, "forward_intermediates"):
        return None
    places = torch.linspace(0, len(data.val_source) - 1, min(num_images, len(data.val_source))).round().long().tolist()
    images, _ = data.val_images(places)
    maps = patch_maps(backbone, data.normalize(images)).float()
    tokens = maps.permute(0, 2, 3, 1).flatten(0, 2)
    if min(tokens.shape) < NUM_COMPONENTS:
        return None
    mean, basis = principal_components(tokens, NUM_COMPONENTS)
    scores = (tokens - mean) @ basis
    shares = (scores.square().sum(0) / (tokens - mean).square().sum().clamp(min=1e-12)).tolist()
    components = scores.view(len(maps), *maps.shape[2:], NUM_COMPONENTS).permute(0, 3, 1, 2)
    return picture(images, components, shares, size)

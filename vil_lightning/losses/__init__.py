"""Losses that lightly and timm lack; pure functions of tensors."""

"""DINOv2-style self-supervision: iBOT's two objectives with KoLeo, more prototypes, layer-wise decay and other schedules.

Oquab et al. 2023, arXiv:2304.07193. The step is that of `methods/ibot.py`; this file holds what is different. "Style", because
the official runs of the large models add what matters at their scale only (high-resolution phase, FSDP, untied data).
"""

from typing import Literal

from vil_lightning.methods.backbone import BackboneConfig
from vil_lightning.methods.compiling import CompileMode
from vil_lightning.methods.ibot import IBOT
from vil_lightning.methods.self_distillation import Auto
from vil_lightning.schedules import Duration


class DINOv2(IBOT):
    """DINOv2 with a ViL or a plain ViT of timm. Needs a data module whose `train_transform` is `MultiCrop`.

    The defaults are those of the official short recipe on ImageNet-1k (ssl_default_config.yaml and vitl16_short.yaml of
    facebookresearch/dinov2). `base_lr` is per 1024 images and grows with the square root of the batch. The long recipe has
    `targets: sinkhorn` and `shared_head: false`. Arguments: see `IBOT`.
    """

    title = "DINOv2"
    recipe = "configs/pretrain_dinov2.yaml"
    most_prototypes = 65536
    longest_memory = 0.992
    lr_batch_size = 1024
    lr_rule: Literal["linear", "sqrt"] = "sqrt"

    def __init__(
        self,
        backbone: BackboneConfig,
        num_prototypes: int | Auto = "auto",
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        shared_head: bool = True,
        norm_last_layer: bool = False,
        freeze_last_layer: Duration = "1 epoch",
        mask_prob: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        image_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_group: int | None = None,
        targets: Literal["centering", "sinkhorn"] = "centering",
        student_temp: float = 0.1,
        teacher_temp: float | Auto = "auto",
        warmup_teacher_temp: float = 0.04,
        teacher_temp_warmup: Duration = "30 epochs",
        center_momentum: float = 0.9,
        teacher_momentum: float | Auto = "auto",
        final_teacher_momentum: float = 1.0,
        base_lr: float = 4e-3,
        lr_warmup: Duration = "10 epochs",
        final_lr: float = 1e-6,
        layer_decay: float = 0.9,
        patch_embed_lr_scale: float = 0.2,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        clip_grad: float | None = 3.0,
        compile: CompileMode = False,
    ) -> None:
        super().__init__(
            backbone,
            num_prototypes=num_prototypes,
            head_hidden_dim=head_hidden_dim,
            head_bottleneck_dim=head_bottleneck_dim,
            shared_head=shared_head,
            norm_last_layer=norm_last_layer,
            freeze_last_layer=freeze_last_layer,
            mask_prob=mask_prob,
            mask_ratio=mask_ratio,
            image_weight=image_weight,
            patch_weight=patch_weight,
            koleo_weight=koleo_weight,
            koleo_group=koleo_group,
            targets=targets,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            warmup_teacher_temp=warmup_teacher_temp,
            teacher_temp_warmup=teacher_temp_warmup,
            center_momentum=center_momentum,
            teacher_momentum=teacher_momentum,
            final_teacher_momentum=final_teacher_momentum,
            base_lr=base_lr,
            lr_warmup=lr_warmup,
            final_lr=final_lr,
            layer_decay=layer_decay,
            patch_embed_lr_scale=patch_embed_lr_scale,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            clip_grad=clip_grad,
            compile=compile,
        )

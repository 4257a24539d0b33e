"""Features of augmented training images, as linear probes are published: a new view of every image in every epoch."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vil_lightning.data.loading import ResumableLoader, TransformedDataset, collate
from vil_lightning.data.transforms import TrainTransform
from vil_lightning.evaluation.probes import Views
from vil_lightning.evaluation.readouts import read_out
from vil_lightning.evaluation.subject import Subject
from vil_lightning.methods.backbone import weights_hash


def crop_transform(img_size: int, scale: tuple[float, float], hflip_prob: float) -> TrainTransform:
    """Random resized crops (bicubic) and flips, and nothing else."""
    none = (0.0, 0.0, 0.0, 0.0)
    return TrainTransform(
        img_size, scale=(scale[0], scale[1]), hflip_prob=hflip_prob, three_augment=False, color_jitter=none
    )


def augmented_views(subject: Subject, transform: TrainTransform, readouts: Sequence[str], places: Tensor) -> Views:
    """For `probe`: views of training images, passed once through the frozen network for all heads.

    A view depends on the seed of the data, the step and the image, whatever the number of workers.

    Args:
        places: Where in the source the image of each row of features stands, (N,).
    """

    def views(batches: Iterator[Tensor]) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        data, place = subject.data, torch.device(subject.place)
        network = subject.build().to(place)
        before = weights_hash(network)
        rows: list[Tensor] = []  # of the batches on their way through the loader, which asks for them in advance

        def keys() -> Iterator[list[tuple[int, int]]]:
            for step, batch in enumerate(batches):
                rows.append(batch)
                yield [(step, index) for index in places[batch].tolist()]

        dataset = TransformedDataset(data.train_source, transform, data.seed, data.max_bad_fraction, data.known_bad)
        loader = ResumableLoader(
            dataset,
            batch_sampler=keys(),
            num_workers=data.num_workers,
            collate_fn=collate,
            timeout=data.worker_timeout if data.num_workers else 0,
            pin_memory=place.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws a seed from the run's random numbers
        )
        finisher = subject.finisher(transform)
        for batch in loader:
            planned, _ = finisher.on_before_batch_transfer(batch, 0)
            images, _ = finisher.on_after_batch_transfer(finisher.transfer_batch_to_device((planned, 0), place, 0), 0)
            half = subject.precision == "bf16"
            with torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=half):
                features = read_out(network, images.float(), readouts)
            # As they are in the cache, from which the winner is chosen.
            yield rows.pop(0), {name: x.bfloat16() if half else x for name, x in features.items()}
        if weights_hash(network) != before:
            raise RuntimeError("the probe changed the frozen backbone")

    return views

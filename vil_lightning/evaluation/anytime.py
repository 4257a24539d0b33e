"""Accuracy against the fraction of the scan that was read: a recurrent network can answer before it has seen all."""

from collections.abc import Sequence
from dataclasses import replace

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.features import FeatureSet
from vil_lightning.evaluation.logistic import LinearClassifier, logistic_regression
from vil_lightning.evaluation.readouts import LAST4
from vil_lightning.evaluation.scores import Score, accuracy_score
from vil_lightning.evaluation.subject import Subject
from vil_lightning.evaluation.tasks import Task, check_readouts, named, pair
from vil_lightning.methods.masked import check_maskable


class Anytime(Task):
    """Logistic regression on what a network makes of the upper part of an image.

    The network is given the first rows of patches and never computes the others, as masked pretraining does; all its scans, in
    whatever direction, run over what is there. There are two classifiers: one of whole training images, which tells what an
    early answer is worth without preparation, and one of training images that are cut alike.

    Args:
        fractions: Shares of the rows of patches, rounded up to whole rows. 1 is the ordinary logistic regression.
        readout: One of `READOUT_NAMES` without `/last4`; `auto` is the one that the network is made for.
        C: Inverse strength of the L2 penalty, the same for all, so that one number changes at a time.
    """

    def __init__(
        self, fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0), readout: str = "auto", C: float = 0.01
    ) -> None:
        check_readouts("Anytime", readout)
        if readout.endswith(LAST4):
            raise ConfigError(f"Anytime: readout={readout!r} is not computed of parts of images. Leave {LAST4} away.")
        if not fractions or not all(0 < fraction <= 1 for fraction in fractions) or C <= 0:
            raise ConfigError(f"Anytime: fractions={list(fractions)} must be in (0, 1], and C={C} positive.")
        self.fractions = list(fractions)
        self.readout = readout
        self.C = C

    def check(self, subject: Subject) -> None:
        check_maskable(subject.build(), "Anytime")

    def run(self, subject: Subject) -> list[Score]:
        readout = subject.readout(self.readout)
        train, val = (features[readout] for features in pair(subject, [readout]))
        whole = self._fitted(subject, train, val)
        scores = []
        for fraction in self.fractions:
            shown, classifiers = val, {"whole images": whole}
            if fraction < 1:
                cut = subject.features("train", [readout], fraction)[readout]
                shown = subject.features("val", [readout], fraction)[readout]
                classifiers["equal parts"] = self._fitted(subject, cut, shown)
            for of, classifier in classifiers.items():
                hits, _ = classifier.evaluate(shown.features, shown.labels)
                how = f"logistic-of-{of.replace(' ', '-')}/C={self.C:g}/{named(self.readout)}"
                score = accuracy_score(f"{100 * fraction:g} % of the rows, {of}", hits, f"anytime/f={fraction:g}/{how}")
                scores.append(replace(score, readout=readout))
        return scores

    def _fitted(self, subject: Subject, train: FeatureSet, val: FeatureSet) -> LinearClassifier:
        images = (train.features, train.labels, val.features, val.labels)
        return logistic_regression(*images, Cs=[self.C], seed=subject.seed, device=subject.place).classifier

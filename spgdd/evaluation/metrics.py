"""What is measured, in percent: images and pixels told apart, verdicts, places and kinds named.

A metric is None where it is not defined, for example an AUROC without a good picture.
"""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

import numpy as np
from scipy import ndimage
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from spgdd.agreement import FORMS, KIND, any_word, says_defective
from spgdd.data.grammar import base
from spgdd.places import PLACES

BINS = 0x7C01  # the float16 numbers from 0 to infinity; their bit patterns rise with them
FALSE_POSITIVES = 0.3  # PRO is integrated up to this share of good pixels
PLACE = any_word(*PLACES)


def named_places(text: str) -> set[str]:
    """Cells of the 3x3 grid that an answer names."""
    return {place.lower() for place in PLACE.findall(text)}


def named_kind(text: str) -> str | None:
    """The defect type of the first kind that an answer names: "scratch" for "two scratches on the head"."""
    found = KIND.search(text)
    return FORMS[found.group().lower()] if found else None


class PixelCounts:
    """Pixels of many maps, counted by their map value in float16: memory does not grow with the pictures.

    A pixel of the map that a defect covers in part counts with that share as defective and with the rest as
    good, which equals counting the picture's own pixels under a map enlarged without smoothing.
    """

    def __init__(self):
        self.good, self.bad, self.regions = np.zeros((3, BINS))
        self.count = 0  # of regions

    def add(self, square_map: np.ndarray, coverage: np.ndarray | None) -> None:
        """A map (224, 224), not negative but for rounding, and the share 0..1 of each of its pixels that is
        defective (224, 224), None for a good picture. Regions are 8-connected."""
        bins = (np.maximum(square_map, 0) + 0.0).astype(np.float16).view(np.uint16).ravel()
        if coverage is None:
            self.good += np.bincount(bins, minlength=BINS)
            return
        weights = coverage.ravel()
        bad = np.bincount(bins, weights, BINS)
        self.bad += bad
        self.good += np.bincount(bins, minlength=BINS) - bad
        labels, count = ndimage.label(coverage > 0, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), weights)
        inside = labels.ravel() > 0
        share = weights[inside] / sizes[labels.ravel()[inside]]
        self.regions += np.bincount(bins[inside], share, BINS)
        self.count += count

    def metrics(self) -> dict[str, float | None]:
        """AUROC and average precision of pixels, and PRO at 30 % false positives, normalised to 0..100.

        PRO: mean over regions of the share found, over the false-positive rate of pixels (Bergmann et al.
        2021, "The MVTec anomaly detection dataset", IJCV 129, section 5).
        """
        if not self.count or not self.good.any():
            return {"pixel_auroc": None, "pixel_ap": None, "pro": None}
        truth, values = np.repeat((0, 1), BINS), np.tile(np.arange(BINS), 2)
        weights = np.concatenate([self.good, self.bad])
        some = weights > 0
        truth, values, weights = truth[some], values[some], weights[some]
        fpr, overlap = (
            np.concatenate([[0], counts[::-1].cumsum() / total])
            for counts, total in ((self.good, self.good.sum()), (self.regions, self.count))
        )
        end = np.interp(FALSE_POSITIVES, fpr, overlap)
        kept = fpr < FALSE_POSITIVES
        area = auc([*fpr[kept], FALSE_POSITIVES], [*overlap[kept], end])
        return {
            "pixel_auroc": 100 * roc_auc_score(truth, values, sample_weight=weights),
            "pixel_ap": 100 * average_precision_score(truth, values, sample_weight=weights),
            "pro": 100 * area / FALSE_POSITIVES,
        }


def image_metrics(defective: Sequence[bool], scores: Sequence[float]) -> dict[str, float | None]:
    """AUROC, average precision and the best F1 over all thresholds, of image scores."""
    if len(set(defective)) < 2:
        return {"image_auroc": None, "image_ap": None, "image_f1_max": None}
    precision, recall, _ = precision_recall_curve(defective, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "image_auroc": 100 * roc_auc_score(defective, scores),
        "image_ap": 100 * average_precision_score(defective, scores),
        "image_f1_max": 100 * float(f1.max()),
    }


def share(flags: Iterable[bool]) -> float | None:
    """Percentage of true ones, None of nothing."""
    flags = list(flags)
    return 100 * sum(flags) / len(flags) if flags else None


def verdict_metrics(pictures: Sequence[dict]) -> dict[str, float | None]:
    """Metrics of the map's calibrated verdict and, where pictures have an ``answer``, of the text.

    Overkill is the share of good pictures called defective, miss that of defective ones called good; unsure verdicts
    (among them pictures unlike the normal ones as a whole; "unlike" is the share of good ones) and answers without a
    clear Yes or No are counted apart, as wrong in accuracies. A place is right
    where at least one is named (by the map: that of the strongest region) and each one named holds a defect;
    only true positives count. So with the kind, where the answer could know it.
    """
    good = [p for p in pictures if p["kind"] == "good"]
    bad = [p for p in pictures if p["kind"] != "good"]
    flagged = [p for p in bad if p["regions"] and p["places"]]
    result = {
        "map_overkill": share(p["verdict"] == "defective" for p in good),
        "map_miss": share(p["verdict"] == "normal" for p in bad),
        "map_unsure": share(p["verdict"] == "unsure" for p in pictures),
        "map_unlike": share(p["unlike"] for p in good),
        "map_above_threshold": share(p["score"] > p["threshold"] for p in good),
        "map_place": share(p["regions"][0]["place"] in p["places"] for p in flagged),
    }
    if "answer" not in pictures[0]:
        return result
    said = {id(p): says_defective(p["answer"]) for p in pictures}
    hits = [p for p in bad if said[id(p)]]
    rates = [share(said[id(p)] is False for p in good), share(said[id(p)] is True for p in bad)]
    return result | {
        "text_accuracy": share(said[id(p)] is (p["kind"] != "good") for p in pictures),
        "text_balanced": None if None in rates else mean(rates),
        "text_overkill": share(said[id(p)] is True for p in good),
        "text_miss": share(said[id(p)] is False for p in bad),
        "text_unparsed": share(said[id(p)] is None for p in pictures),
        "text_cut": share(p["cut"] for p in pictures),
        "text_place": share(
            bool(named := named_places(p["answer"])) and named <= set(p["places"]) for p in hits if p["places"]
        ),
        "text_kind": share(named_kind(p["kind_answer"]) == base(p["kind"]) for p in hits if "kind_answer" in p),
    }


def summarise(runs: Sequence[dict]) -> list[dict]:
    """Rows of subset, shots and, per metric, mean and standard deviation over the shot sets.

    ``runs`` have subset, product, shots, seed and metrics. A subset's figure is the mean over its products;
    the rows of subset "mean" are means over the subsets. ``std`` is None of a single shot set.
    """
    rows = []
    for shots in sorted({run["shots"] for run in runs}):
        these = [run for run in runs if run["shots"] == shots]
        names = list(dict.fromkeys(run["subset"] for run in these))
        groups = {name: [[run for run in these if run["subset"] == name]] for name in names}
        groups["mean"] = [subset for (subset,) in groups.values()]
        for name, subsets in groups.items():
            row = {"subset": name, "shots": shots, "metrics": {}}
            for metric in dict.fromkeys(key for subset in subsets for run in subset for key in run["metrics"]):
                sets = [
                    _mean(_mean(r["metrics"].get(metric) for r in subset if r["seed"] == seed) for subset in subsets)
                    for seed in dict.fromkeys(run["seed"] for run in these)
                ]
                sets = [value for value in sets if value is not None]
                row["metrics"][metric] = {"mean": _mean(sets), "std": stdev(sets) if len(sets) > 1 else None}
            rows.append(row)
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None

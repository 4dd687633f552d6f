"""Tell whether annotations are a published data set, whole, so that published figures stand beside no other."""

from fmdistill.evaluate.truth.instances import JoinedTruth
from fmdistill.registry import UserError, suggest

DATASETS = {  # the numbers of images and annotations in the file of each
    "coco_val2017": (5_000, 36_781),
    "lvis_v1_val": (19_809, 244_707),
}


def check_name(dataset: str | None) -> None:
    """Raise a UserError for the name of an unknown data set."""
    if dataset is not None and dataset not in DATASETS:
        raise UserError(f"dataset={dataset}: unknown.{suggest(dataset, DATASETS)} Use null for images of your own")


def check_whole(dataset: str | None, joined: JoinedTruth) -> None:
    """Raise a UserError if the annotations are not those of `dataset`, or if images of it are missing."""
    if dataset is None:
        return
    expected = DATASETS[dataset]
    if joined.stated != expected:
        raise UserError(
            f"dataset={dataset}: has {expected[0]} images and {expected[1]} annotations, these annotations have "
            f"{joined.stated}; for other data add dataset=null"
        )
    missing = [skip.place for skip in joined.skipped if skip.reason == "annotated image missing"]
    if missing:
        raise UserError(
            f"dataset={dataset}: {len(missing)} of its {expected[0]} images are missing, {missing[0]} first; for a "
            f"part of it add dataset=null"
        )

"""Read the instances of COCO's and LVIS's JSON files, and join them with images by file name."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from fmdistill.evaluate.segmenters import SegmentedImage
from fmdistill.evaluate.truth.instances import (
    MALFORMED,
    Category,
    ImageTruth,
    Instance,
    JoinedTruth,
    Skip,
    instance,
    problem,
    stem,
)
from fmdistill.registry import UserError

FREQUENCIES = ("r", "c", "f")


@dataclass(frozen=True)
class CocoTruth:
    """Instances of COCO's JSON `annotations`, {"images": [...], "annotations": [...], "categories": [...]}.

    An image is joined with the record whose `file_name`, or the end of whose `coco_url`, has the same name without
    folders and suffix; if several have it, with the one whose folders agree too. Crowds and annotations with an area
    of 0 are included: evaluators decide.
    """

    annotations: str = ""

    lvis: ClassVar[bool] = False

    def check(self) -> None:
        """Raise a UserError if the file is missing."""
        if not Path(self.annotations).expanduser().is_file():
            raise UserError(f"annotations={self.annotations or 'none'}: no such file; name COCO's JSON of the images")

    def join(self, names: Sequence[str]) -> JoinedTruth:
        """Read the file and join it with images, SHARD/KEY each. Raises UserError if it is none or fits none."""
        self.check()
        stored = _read(self.annotations)
        where = f"annotations={self.annotations}"
        categories = self._categories(stored["categories"], where)
        records = _records(stored["images"], where)
        skipped: list[Skip] = []
        by_image = _by_image(stored["annotations"], records, categories, skipped)
        joined = _joined(names, records, where)
        present = {record["id"] for record in joined.values()}
        missing = [record for number, record in records.items() if number not in present]
        skipped += [Skip("annotated image missing", f"image {r['id']}, {_path(r)}") for r in missing]
        skipped += [Skip("image not annotated", name) for name in names if name not in joined]
        if not joined:
            raise UserError(
                f"{where}: annotates none of the {len(names)} images; '{next(iter(names), '')}' is none of its "
                f"{len(records)}, such as '{_path(next(iter(records.values())))}'"
            )
        counts = (len(records), len(stored["annotations"]))
        of = partial(_of, {name: _truth(record, by_image) for name, record in joined.items()}, joined)
        ids = {name: record["id"] for name, record in joined.items()}
        return JoinedTruth([name for name in names if name in joined], of, tuple(skipped), categories, counts, ids)

    def _categories(self, stored: Any, where: str) -> dict[int, Category]:
        categories: dict[int, Category] = {}
        try:
            for entry in stored:
                category = Category(str(entry.get("name", entry["id"])), entry.get("frequency"))
                if entry["id"] in categories:
                    raise UserError(f"{where}: category id {entry['id']} occurs twice; give each its own")
                if self.lvis and category.frequency not in FREQUENCIES:
                    raise ValueError(f"category {entry['id']} has the frequency {category.frequency!r}, not r, c or f")
                categories[int(entry["id"])] = category
        except UserError:
            raise
        except (*MALFORMED, AttributeError) as error:
            raise UserError(f"{where}: its categories cannot be read: {problem(error)}") from None
        return categories


@dataclass(frozen=True)
class LvisTruth(CocoTruth):
    """Instances of LVIS's JSON, which states for each image the categories that are absent, or not all annotated."""

    lvis: ClassVar[bool] = True


def _read(path: str) -> Mapping[str, Any]:
    try:
        stored = json.loads(Path(path).expanduser().read_bytes())
        lists = {name: stored[name] for name in ("images", "annotations", "categories")}
    except (*MALFORMED, OSError) as error:
        raise UserError(f"annotations={path}: not COCO's JSON of instances: {problem(error)}") from None
    for name, value in lists.items():
        if not isinstance(value, list):
            raise UserError(f"annotations={path}: its {name} are a {type(value).__name__}, expected a list")
    return lists


def _records(stored: list[Any], where: str) -> dict[int, Mapping[str, Any]]:
    """Return the records of images by id."""
    records: dict[int, Mapping[str, Any]] = {}
    try:
        for record in stored:
            if record["id"] in records:
                raise UserError(f"{where}: image id {record['id']} occurs twice; give each image its own")
            if type(record["id"]) is not int or not isinstance(_path(record), str):
                raise ValueError(f"image {str(record['id'])[:40]!r} has no number as id, or no text as file_name")
            for name in ("height", "width"):
                if type(record[name]) is not int:
                    raise ValueError(f"image {record['id']} has the {name} {str(record[name])[:40]!r}")
            for name in ("neg_category_ids", "not_exhaustive_category_ids"):
                frozenset(map(int, record.get(name, ())))
            records[record["id"]] = record
    except UserError:
        raise
    except (*MALFORMED, AttributeError) as error:
        raise UserError(f"{where}: its images cannot be read: {problem(error)}") from None
    if not records:
        raise UserError(f"{where}: lists no images")
    return records


def _path(record: Mapping[str, Any]) -> str:
    """Return the path of a record's image: `file_name`, or for LVIS the folder and the name at the end of the URL."""
    if "file_name" in record:
        return record["file_name"]
    return "/".join(record["coco_url"].split("/")[-2:])


def _by_image(
    stored: list[Any], records: Mapping[int, Any], categories: Mapping[int, Category], skipped: list[Skip]
) -> dict[int, list[Instance]]:
    """Return the instances by the id of their image; those that cannot be used are appended to `skipped`."""
    by_image: dict[int, list[Instance]] = defaultdict(list)
    ids: set[Any] = set()
    for number, annotation in enumerate(stored):
        place = f"annotation {number}"
        try:
            place = f"annotation {annotation['id']}"
            image, category = annotation["image_id"], annotation["category_id"]
            if annotation["id"] in ids:
                skipped.append(Skip("annotation id repeated", place))
            elif image not in records:
                skipped.append(Skip("annotation of an unknown image", f"{place} is of image {image}"))
            elif category not in categories:
                skipped.append(Skip("annotation of an unknown category", f"{place} is of category {category}"))
            else:
                by_image[image].append(instance(annotation, int(annotation["id"]), category))
            ids.add(annotation["id"])
        except (*MALFORMED, AttributeError) as error:
            skipped.append(Skip("annotation malformed", f"{place}: {problem(error)}"))
    return by_image


def _joined(names: Sequence[str], records: Mapping[int, Mapping[str, Any]], where: str) -> dict[str, Mapping[str, Any]]:
    """Return the record of each image that has one, by the image's name."""
    by_stem: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records.values():
        by_stem[stem(_path(record))].append(record)
    joined: dict[str, Mapping[str, Any]] = {}
    takers: dict[int, str] = {}
    for name in names:
        key = name.partition("/")[2]
        candidates = by_stem.get(stem(key), [])
        if len(candidates) > 1:
            candidates = [record for record in candidates if _agree(key, _path(record))]
        if len(candidates) > 1:
            raise UserError(f"{where}: {len(candidates)} of its images have the name of '{key}'; name the folders too")
        for record in candidates:
            if record["id"] in takers:
                raise UserError(
                    f"{where}: '{_path(record)}' may be '{takers[record['id']]}' or '{key}'; evaluate one folder of "
                    f"images, or name the folders in the JSON"
                )
            takers[record["id"]], joined[name] = key, record
    return joined


def _agree(key: str, path: str) -> bool:
    """Return whether two paths without suffixes are equal as far as both go, from the end."""
    ends = [reversed(PurePosixPath(text).with_suffix("").parts) for text in (key, path)]
    return all(a == b for a, b in zip(*ends, strict=False))


def _truth(record: Mapping[str, Any], by_image: Mapping[int, list[Instance]]) -> ImageTruth:
    negative, incomplete = (
        frozenset(map(int, record.get(name, ()))) for name in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    return ImageTruth(tuple(by_image.get(record["id"], ())), (), record["id"], negative, incomplete)


def _of(
    truths: Mapping[str, ImageTruth], records: Mapping[str, Mapping[str, Any]], image: SegmentedImage
) -> ImageTruth:
    truth, record = truths[image.name], records[image.name]
    stated = (record["height"], record["width"])
    if stated != image.original:
        text = f"{image.name} is of {list(image.original)}, annotated for {list(stated)}"
        return ImageTruth((), (Skip("image of another size", text),), truth.image_id)
    return truth

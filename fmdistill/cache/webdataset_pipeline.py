"""Open a cache as a webdataset pipeline, for training code that is written for webdataset."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from webdataset.cache import StreamingOpen
from webdataset.compat import WebDataset, check_empty
from webdataset.handlers import reraise_exception

from fmdistill import recipe as recipes
from fmdistill.cache import manifest, sidecar, store
from fmdistill.cache.dataset import fetch_image
from fmdistill.cache.outputs import StoredOutput, from_json
from fmdistill.cache.reader import ShardReader
from fmdistill.cache.store import Store
from fmdistill.images import Images, Shard
from fmdistill.images import build as build_images
from fmdistill.images.source import SPLITS
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.settings import foreign_names

UNUSED = ("cache_dir", "cache_size", "url_to_name", "select_files", "rename_files")  # of tars that webdataset reads


def webdataset(
    root: str | Path,
    split: str = "train",
    images: bool | Images | Recipe = False,
    *,
    local_folder: str = "",
    local_gb: float | None = None,
    **options: Any,
) -> WebDataset:
    """Return a `webdataset.WebDataset` of the finished shards of one split of the cache at `root`, a folder or a URL.

    A sample has "__key__", as the source of images gives it, each output by its name, float32 (C, g, g) or (D,), and
    "label" if the image has one. With `images` it has "image" too, uint8 (H, W, 3) RGB: True reads the images that the
    recipe in the cache names, a recipe or what `fmdistill.images.build` returns reads those.

    `options` are WebDataset's own, such as shardshuffle=100 or nodesplitter. For a URL, `local_folder` and `local_gb`
    are what `cache.local` and `cache.local_gb` are in a recipe. UserError if no shard of the split is finished; while
    samples are read, if one is damaged or its image is missing.
    """
    if split not in SPLITS:
        raise UserError(f"split='{split}': expected one of {', '.join(SPLITS)}")
    if unused := [name for name in UNUSED if name in options]:
        raise UserError(f"{unused[0]}={options[unused[0]]!r}: has no effect on a cache, whose tars fmdistill reads")
    opened = store.opened(recipes.CacheSettings(root=str(root), local=local_folder, local_gb=local_gb))
    described = manifest.read(opened.folder)
    handler = options.get("handler", reraise_exception)
    reading = _Reading(opened, split, described, _images(opened.folder, described, images), handler)
    if not reading.addresses:
        raise UserError(f"{root}: no shard of split={split} is finished; run `fmdistill cache RECIPE`")
    dataset = WebDataset(list(reading.addresses), **{"shardshuffle": False, **options})
    # fmdistill reads the tars itself: a vector is a row of a member at the tar's end, shapes and checksums are in the
    # sidecar, and reading by offset is several times as fast (benchmarks/reading.py).
    first = next(place for place, stage in enumerate(dataset.pipeline) if isinstance(stage, StreamingOpen))
    dataset.pipeline[first:] = [reading, *(stage for stage in dataset.pipeline[first:] if stage is check_empty)]
    return dataset


@dataclass(frozen=True)
class _Reading:
    """The pipeline's stage from shards to samples."""

    store: Store
    split: str
    manifest: Mapping[str, Any]
    images: Images | None
    handler: Callable[[Exception], bool]  # returns whether to go on, or raises

    def __call__(self, sources: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the samples of the shards {"url": address}."""
        for source in sources:
            try:
                reader = self._open(source["url"])
            except Exception as error:
                if self.handler(error):
                    continue
                return
            for index in range(len(reader.samples)):
                try:
                    sample = self._sample(reader, index)
                except Exception as error:
                    if self.handler(error):
                        continue
                    return
                yield sample

    @cached_property
    def addresses(self) -> dict[str, str]:
        """The names of the split's finished shards by their tars' paths or URLs, in the order of the names."""
        return {reader.address: name for name in self.store.names() if (reader := self._reader(name))}

    def _open(self, address: str) -> ShardReader:
        reader = self._reader(self.addresses[address])
        if reader is None:
            raise UserError(f"{address}: deleted or damaged since the cache was opened; run `fmdistill cache` again")
        return reader

    def _reader(self, name: str) -> ShardReader | None:
        """Return the shard's reader; None if it is not finished or is of another split."""
        any_cut = Shard(name, self.split, take=0)  # a shard in which `images.limit` fell is finished too
        identity = manifest.identity_hash(self.manifest)
        finished = sidecar.finished(self.store, any_cut, identity, self._outputs)
        if finished is None or finished.fields["split"] != self.split:
            return None
        return ShardReader(self.store, Shard(name, self.split), finished, "", self._outputs)

    def _sample(self, reader: ShardReader, index: int) -> dict[str, Any]:
        stored = reader.samples[index]
        sample = {"__key__": stored["key"], "__url__": reader.address, **reader.read(index)}
        if stored.get("label") is not None:
            sample["label"] = stored["label"]
        if self.images is not None:
            sample["image"] = self.images.decode(fetch_image(self.images, reader, index), reader.name)
        return sample

    @cached_property
    def _outputs(self) -> dict[str, StoredOutput]:
        """What is stored of each output."""
        return from_json(self.manifest["outputs"])


def _images(folder: Path, opened: Mapping[str, Any], images: bool | Images | Recipe) -> Images | None:
    """Return the images to read, if any; UserError if they would be decoded in another way than for the teacher."""
    if images is False:
        return None
    if images is True:
        path = folder / recipes.SAVED
        if not path.is_file():
            raise UserError(f"{path}: missing, so give images=fmdistill.recipe.load(RECIPE) instead of images=True")
        settings = recipes.read_yaml(path).get("images")
        if foreign := foreign_names(settings):
            raise UserError(
                f"{path}: its images name code outside fmdistill ({', '.join(foreign)}); to import it, give "
                f"images=fmdistill.recipe.load(RECIPE)"
            )
        images = build_images(settings if isinstance(settings, dict) else {})
    source = images if isinstance(images, Images) else build_images(images.images)
    manifest.check_decoding(folder, opened, source.decoding)
    return source

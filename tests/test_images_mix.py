import pytest

from fmdistill.images import build, check
from fmdistill.images.mix import Mix
from fmdistill.registry import UserError


@pytest.fixture
def settings(tmp_path):
    for folder, count in (("x", 3), ("y", 12)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{i}.jpg").write_bytes(f"{folder}{i}".encode())
    few = {"name": "folder", "root": str(tmp_path / "x"), "validation": 0}
    many = {"name": "folder", "root": str(tmp_path / "y"), "validation": 0.4, "shard_size": 3}
    return {"few": few, "many_2": many}


def test_shards_carry_their_sources_name_and_alternate(settings):
    mix = Mix(settings)
    shards = mix.shards()
    many = mix.members["many_2"].shards()
    assert len(many["train"]) > 1
    assert shards["train"] == ["few-train-all", *(f"many_2-{shard}" for shard in many["train"])]
    assert shards["validation"] == [f"many_2-{shard}" for shard in many["validation"]]
    both = Mix({"a": settings["many_2"], "b": settings["many_2"]}).shards()["train"]
    assert [name[0] for name in both] == ["a", "b"] * (len(both) // 2) and len(set(both)) == len(both)


def test_reading_goes_to_the_source(settings):
    mix = Mix(settings)
    assert [image.data for image in mix.read("few-train-all")] == [b"x0", b"x1", b"x2"]
    assert mix.count("few-train-all") == 3
    assert mix.fetch("few-train-all", "1.jpg").data == b"x1"
    assert mix.keys("few-train-all") == ["0.jpg", "1.jpg", "2.jpg"]
    with pytest.raises(KeyError):
        mix.fetch("few-train-all", "7.jpg")
    total = sum(mix.count(name) for names in mix.shards().values() for name in names)
    assert total == 15


def test_identity_contains_no_path(settings, tmp_path):
    identity = Mix(settings).identity()
    assert set(identity["sources"]) == {"few", "many_2"} and str(tmp_path) not in str(identity)


def keys_by_source(settings, limit, split="train") -> dict[str, list[str]]:
    """Return the keys by source of a mix with this `limit`, checking that each shard reads `take` images."""
    images = build({"name": "mix", "sources": settings, "limit": limit})
    keys: dict[str, list[str]] = {}
    for shard in (s for s in images.shards() if s.split == split):
        read = [image.key for image in images.read(shard)]
        assert shard.take is None or len(read) == shard.take < images.source.count(shard.name)
        assert read == images.source.keys(shard.name)[: len(read)] and read
        keys.setdefault(images.group(shard.name), []).extend(read)
    return keys


@pytest.mark.parametrize(
    ("limit", "few", "many"),
    [(1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (6, 3, 3), (8, 3, 5), ("7", 3, 4), (1000, 3, None), (None, 3, None)],
)
def test_a_limit_is_shared_evenly_and_the_rest_of_a_small_source_goes_to_the_others(settings, limit, few, many):
    whole = keys_by_source(settings, None)
    cut = keys_by_source(settings, limit)
    assert cut["few"] == whole["few"][:few]
    assert cut.get("many_2", []) == whole["many_2"][:many]
    assert len(whole["many_2"]) > 5


def test_a_limit_applies_to_each_split_and_cuts_several_shards(settings):
    shards = build({"name": "mix", "sources": {"a": settings["few"], "b": settings["few"]}, "limit": 4}).shards()
    assert [(shard.name, shard.take) for shard in shards] == [("a-train-all", 2), ("b-train-all", 2)]
    assert list(keys_by_source(settings, 2, "validation")) == ["many_2"]
    assert len(keys_by_source(settings, 2, "validation")["many_2"]) == 2


def test_a_limit_counts_only_the_shards_that_it_can_need(settings, monkeypatch):
    images = build({"name": "mix", "sources": settings, "limit": 2})
    real, counted = Mix.count, []
    monkeypatch.setattr(Mix, "count", lambda self, shard: (counted.append(shard), real(self, shard))[1])
    images.shards()
    for split in ("train", "validation"):
        many = [name for name in counted if name.startswith(f"many_2-{split}")]
        assert len(many) < len(images.source.members["many_2"].shards()[split]), many


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({}, "images.sources: empty"),
        ({"a-b": {"name": "photos"}}, "images.sources.a-b: expected a name of"),
        ({"a": {"name": "fodler"}}, "images.sources.a.name: unknown name 'fodler'. Did you mean 'folder'"),
        ({"a": {"name": "folder"}}, "images.sources.a.root: required"),
        ({"a": {"name": "folder", "root": "x", "shards": 2}}, "images.sources.a.shards: no such setting"),
        ({"a": {"name": "folder", "root": "x", "shard_size": 0}}, "images.sources.a: images.shard_size=0"),
        ({"a": "folder"}, "images.sources"),
    ],
)
def test_check_raises_for_a_wrong_source(sources, says):
    with pytest.raises(UserError, match=says):
        check({"name": "mix", "sources": sources})


def test_a_missing_folder_raises_when_listed_and_not_before(tmp_path):
    settings = {"name": "mix", "sources": {"a": {"name": "folder", "root": str(tmp_path / "none")}}}
    check(settings)
    with pytest.raises(UserError, match="images.sources.a: images.root=.*none: no such folder"):
        build(settings).shards()

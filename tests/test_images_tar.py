import io
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader, Dataset

from fmdistill.images import tar as tar_source
from fmdistill.images.tar import Tar
from fmdistill.registry import UserError

SA1B = {"./sa_1.jpg": b"one", "./sa_2.jpg": b"two" * 400, "./sa_2.json": b"{2}", "./sa_1.json": b"{1}"}


def pack(members: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    """Return a tar of the members in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def one(folder: Path, members: dict[str, bytes] | list[tuple[str, bytes]] | bytes, name: str = "a") -> Tar:
    """Return a source of one tar of these members, or of these very bytes."""
    (folder / f"{name}.tar").write_bytes(members if isinstance(members, bytes) else pack(members))
    return Tar(str(folder), train=[f"{name}.tar"])


def read(tar: Tar, shard: str = "a") -> dict[str, tuple[bytes, dict]]:
    return {image.key: (image.data, dict(image.extra)) for image in tar.read(shard)}


def test_sa1b_where_image_and_json_lie_apart(tmp_path):
    tar = one(tmp_path, SA1B, "sa_000020")
    assert read(tar, "sa_000020") == {"sa_1": (b"one", {"json": b"{1}"}), "sa_2": (b"two" * 400, {"json": b"{2}"})}
    assert tar.shards() == {"train": ["sa_000020"], "validation": []} and tar.count("sa_000020") == 2
    assert tar.keys("sa_000020") == [image.key for image in tar.read("sa_000020")] == ["sa_1", "sa_2"]
    for image in tar.read("sa_000020"):
        assert tar.fetch("sa_000020", image.key) == image
    with pytest.raises(KeyError):
        tar.fetch("sa_000020", "sa_3")


def test_keys_end_at_the_last_dot(tmp_path):
    members = {"d.1/a.v1.jpg": b"1", "d.1/a.v2.JPG": b"2", "d.1/a.v1.json": b"j1", "d.1/a.v2.meta.JSON": b"j2"}
    found = read(one(tmp_path, members))
    assert found == {"d.1/a.v1": (b"1", {"json": b"j1"}), "d.1/a.v2": (b"2", {"meta.json": b"j2"})}


def test_img2dataset_and_webdataset_columns_and_labels(tmp_path):
    members = {"0.txt": b"a cat", "0.webp": b"w", "0.cls": b"7\n", "1.png": b"p", "1.cls": b"cat", "alone.json": b"{}"}
    images = list(one(tmp_path, members).read("a"))
    assert [(i.key, i.data, i.label) for i in images] == [("0", b"w", 7), ("1", b"p", None)]
    assert images[0].extra == {"txt": b"a cat", "cls": b"7\n"}


def test_what_is_not_a_file_of_the_set_is_left_out(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("dev.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("x/._a.jpg", "../up.jpg", "/root.jpg", "long" * 60 + ".jpg", "\u00fc.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert list(read(one(tmp_path, buffer.getvalue()))) == ["../up", "/root", "long" * 60, "\u00fc"]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a.jpg", b"1"), ("a.png", b"2")], "two images of the key 'a'"),
        ([("a.jpg", b"1"), ("./a.jpg", b"2")], "two images of the key 'a'"),
        ([("a.jpg", b"1"), ("a.json", b"2"), ("a.json", b"3")], "two columns 'json' of the key 'a'"),
    ],
)
def test_two_members_for_one_place_are_refused(tmp_path, members, says):
    tar = one(tmp_path, members)
    for use in (tar.count, lambda shard: list(tar.read(shard))):
        with pytest.raises(UserError, match=rf"a\.tar: holds {says}"):
            use("a")


def test_a_truncated_tar_gives_what_is_whole_at_every_length(tmp_path):
    members = {f"{i}.{suffix}": bytes([i]) * 700 for i in range(3) for suffix in ("jpg", "json")}
    whole = pack(members)
    complete = [(f"{i}", bytes([i]) * 700) for i in range(3)]
    end_of_members = 6 * (512 + 1024)
    for length in [1, 511, *range(512, end_of_members + 1, 200), end_of_members]:
        tar = one(tmp_path, whole[:length])
        found = []
        with pytest.raises(UserError) as error:
            for image in tar.read("a"):
                found.append((image.key, image.data))
                # The cut can fall where nothing tells that the last image had a column; never inside one.
                assert image.extra.get("json", bytes([int(image.key)]) * 700) == bytes([int(image.key)]) * 700
        assert found == complete[: len(found)] and len(found) == tar.count("a")
        assert tar.keys("a") == [key for key, _ in found]
        assert len(found) >= length // (2 * 1536)
        assert "a.tar" in str(error.value) and "Download it again" in str(error.value)
        if found:
            assert f"truncated at byte {length}, after the image '{found[-1][0]}'" in str(error.value)
            assert tar.fetch("a", found[-1][0]).data == found[-1][1]
    assert len(read(one(tmp_path, whole))) == 3


def test_an_image_whose_column_is_cut_is_not_whole(tmp_path):
    tar = one(tmp_path, pack({"0.jpg": b"0", "1.jpg": b"1", "1.json": b"x" * 600})[: 5 * 512 + 300])
    assert tar.count("a") == 1
    with pytest.raises(UserError, match="after the image '0'; 1 images"):
        list(tar.read("a"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (b"<html>not found</html>" * 100, "not a tar"),
        (pack({"note.txt": b"x"}), "holds no images"),
        (pack({"a.jpg": b"1"})[:1024] + b"garbage!" * 200, "damaged at byte 1024, where .*'a'; 1 images"),
    ],
)
def test_a_tar_that_is_none_is_named(tmp_path, data, says):
    with pytest.raises(UserError, match=rf"a\.tar: .*{says}") as error:
        list(one(tmp_path, data).read("a"))
    assert "\n" not in str(error.value)


def test_lists_with_braces_globs_and_one_text(tmp_path):
    root = tmp_path / "with [brackets]"
    root.mkdir()
    for name in ("sa_09", "sa_10", "sa_11", "sa_12", "v_b", "v_a", "odd[1]"):
        one(root, SA1B, name)
    tar = Tar(str(root), train=["sa_{11..12}.tar", "odd[1].tar", "sa_{09..10}.tar"], validation="v_?.tar")
    assert tar.shards() == {"train": ["sa_11", "sa_12", "odd[1]", "sa_09", "sa_10"], "validation": ["v_a", "v_b"]}
    assert Tar(str(root), train="[sa_10.tar, sa_09.tar]").shards()["train"] == ["sa_10", "sa_09"]
    assert Tar(train=[str(root / "sa_10.tar")]).shards()["train"] == ["sa_10"]
    assert len(read(tar, "v_b")) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "images.train: lists no tars"),
        ({"train": ["b.tar"]}, "images.train: .*b.tar: no such tar"),
        ({"train": ["a.tar"], "validation": ["c*.tar"]}, r"images.validation: .*c\*.tar: no such tar"),
        ({"train": ["a.tar"], "validation": ["a.tar"]}, "images.validation: .*a.tar is the same tar in images.train"),
        ({"train": ["a.tar", "sub/a.tar"]}, "images.train: .*sub/a.tar is a tar of the same name as .*a.tar"),
        ({"train": ["a.tar.gz"]}, "expected a name that ends in .tar"),
        ({"train": ["{a.tar"]}, "images.train: '{a.tar'"),
        ({"train": "[a.tar"}, "no such tar|ends in .tar"),
        ({"train": ["nosuch://a.tar"]}, "images.root: 'nosuch://a.tar'"),
    ],
)
def test_a_wrong_list_gives_one_line(tmp_path, settings, says):
    (tmp_path / "sub").mkdir()
    one(tmp_path, SA1B)
    one(tmp_path / "sub", SA1B)
    with pytest.raises(UserError, match=says) as error:
        Tar(str(tmp_path), **settings).shards()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("before", ["", "simplecache::"])
def test_a_url_reads_as_a_disk_does(before):
    fsspec.filesystem("memory").pipe_file("/bucket/sa_1.tar", pack(SA1B))
    fsspec.filesystem("memory").pipe_file("/bucket/cut.tar", pack(SA1B)[:2048])
    tar = Tar(f"{before}memory://bucket", train=["sa_{1..1}.tar"], validation=["cu*.tar"])
    assert tar.shards() == {"train": ["sa_1"], "validation": ["cut"]}
    assert read(tar, "sa_1")["sa_1"] == (b"one", {"json": b"{1}"})
    assert tar.fetch("sa_1", "sa_2").data == b"two" * 400
    with pytest.raises(UserError, match="cut.tar: truncated"):
        list(tar.read("cut"))
    with pytest.raises(UserError, match="gone.tar: no such tar"):
        Tar(f"{before}memory://bucket", train=["gone.tar"]).shards()


def test_indices_are_bounded_and_travel_to_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_source, "KEPT", 2)
    for name in "abcd":
        one(tmp_path, SA1B, name)
    tar = Tar(str(tmp_path), train="{a,b,c,d}.tar")
    assert [tar.count(name) for name in "abcda"] == [2] * 5
    assert len(tar._indices) == 2
    assert read(pickle.loads(pickle.dumps(tar)), "b") == read(tar, "b")


def test_forked_workers_inherit_the_index_that_the_parent_has_built(tmp_path, monkeypatch):
    tar = one(tmp_path, SA1B)
    tar.count("a")
    monkeypatch.setattr(tar_source, "scan", None)  # reading the headers again would fail
    loader = DataLoader(Fetched(tar), num_workers=2, batch_size=None, multiprocessing_context="fork")
    assert list(loader) == [b"one", b"two" * 400]


class Fetched(Dataset):
    """The images of SA1B, fetched one by one."""

    def __init__(self, tar: Tar) -> None:
        self.tar = tar

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bytes:
        return self.tar.fetch("a", f"sa_{index + 1}").data


def test_a_tar_that_shrinks_under_the_reader_is_named(tmp_path):
    tar = one(tmp_path, SA1B)
    tar.count("a")
    (tmp_path / "a.tar").write_bytes(pack(SA1B)[:600])
    with pytest.raises(UserError, match="changed while it was read, at 'sa_2'"):
        tar.fetch("a", "sa_2")

import io
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset

from fmdistill.images import build, captions
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


def tar_of(folder: Path, members: dict[str, bytes] | list[tuple[str, bytes]] | bytes, name: str = "a") -> Tar:
    """Return a source of a single tar with these members, or with exactly these bytes."""
    (folder / f"{name}.tar").write_bytes(members if isinstance(members, bytes) else pack(members))
    return Tar(str(folder), train=[f"{name}.tar"])


def read(tar: Tar, shard: str = "a") -> dict[str, tuple[bytes, dict]]:
    return {image.key: (image.data, dict(image.extra)) for image in tar.read(shard)}


def test_sa1b_with_images_and_jsons_in_any_order(tmp_path):
    tar = tar_of(tmp_path, SA1B, "sa_000020")
    assert read(tar, "sa_000020") == {"sa_1": (b"one", {"json": b"{1}"}), "sa_2": (b"two" * 400, {"json": b"{2}"})}
    assert tar.shards() == {"train": ["sa_000020"], "validation": []} and tar.count("sa_000020") == 2
    assert tar.keys("sa_000020") == [image.key for image in tar.read("sa_000020")] == ["sa_1", "sa_2"]
    for image in tar.read("sa_000020"):
        assert tar.fetch("sa_000020", image.key) == image
    with pytest.raises(KeyError):
        tar.fetch("sa_000020", "sa_3")


def by_webdataset(path: Path) -> dict[str, dict[str, bytes]]:
    """Return the samples of a tar as webdataset reads them: {key: {column: bytes}}."""
    samples = WebDataset(str(path), shardshuffle=False)
    return {sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")} for sample in samples}


def test_samples_are_those_of_webdataset(tmp_path):
    members = {}
    for key in ("0001", "d.1/a", "d.1/b c", "d/.e/x", "\u00fc", "%2E"):
        members |= {f"{key}.input.JPG": b"<%d>" % len(members), f"{key}.Meta.json": b"{}", f"{key}.outputs.txt": b"cat"}
    tar = tar_of(tmp_path, members)
    assert read(tar) == {
        key: (columns.pop("input.jpg"), columns) for key, columns in by_webdataset(tmp_path / "a.tar").items()
    }
    assert len(read(tar)) == 6


def test_columns_with_dots_are_used_if_they_are_the_only_candidates(tmp_path):
    members = {f"s{i}.{name}": data for i in range(3) for name, data in
               (("input.jpg", b"x"), ("outputs.txt", b"a\nb"), ("cls", b"%d" % i))}  # fmt: skip
    tar = tar_of(tmp_path, members)
    assert [(image.key, image.data, image.label) for image in tar.read("a")] == [
        ("s0", b"x", 0),
        ("s1", b"x", 1),
        ("s2", b"x", 2),
    ]
    assert [captions("a", image) for image in tar.read("a")] == [["a", "b"]] * 3


def test_a_column_without_a_dot_is_preferred(tmp_path):
    tar = tar_of(tmp_path, {"a.seg.png": b"s", "a.labels.png": b"l", "a.png": b"p", "a.x.txt": b"x", "a.txt": b"t"})
    (image,) = tar.read("a")
    assert image.data == b"p" and set(image.extra) == {"seg.png", "labels.png", "x.txt", "txt"}
    assert captions("a", image) == ["t"]


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a.v1.jpg", "a.v2.jpg")])
def test_two_candidates_for_the_image_raise_unless_one_is_named(tmp_path, names):
    members = {name: name.encode() for name in names}
    tar = tar_of(tmp_path, members)
    chosen = names[1].partition(".")[2]
    for use in (tar.count, lambda shard: list(tar.read(shard))):
        with pytest.raises(UserError, match=r"a\.tar: the sample 'a' has several .*images.columns=.image: ") as error:
            use("a")
        assert "\n" not in str(error.value) and chosen in str(error.value)
    (image,) = build({**SETTINGS, "root": str(tmp_path), "columns": {"image": chosen}}).source.read("a")
    assert image.data == names[1].encode()


SETTINGS = {"name": "tar", "train": ["a.tar"]}


def test_named_columns_are_read_and_samples_without_them_are_counted(tmp_path, caplog):
    members = {}
    for i in range(4):
        members |= {
            f"{i}.left.jpg": b"l%d" % i,
            f"{i}.right.jpg": b"r%d" % i,
            f"{i}.kind.cls": b"%d" % i,
            f"{i}.cls": b"9",
        }
        members |= {f"{i}.en.txt": b"cat", f"{i}.de.txt": b"Katze"}
    del members["2.right.jpg"], members["3.de.txt"], members["1.kind.cls"]
    tar_of(tmp_path, members)
    columns = "{image: right.jpg, label: kind.cls, caption: de.txt}"
    tar = build({**SETTINGS, "root": str(tmp_path), "columns": columns}).source
    with caplog.at_level("WARNING"):
        images = list(tar.read("a"))
    assert [(image.key, image.data, image.label) for image in images] == [
        ("0", b"r0", 0),
        ("1", b"r1", None),
        ("3", b"r3", 3),
    ]
    assert [captions("a", image) for image in images] == [["Katze"], ["Katze"], []]
    assert [record.getMessage().partition(".tar: ")[2] for record in caplog.records] == [
        "ignored 1 samples without a column right.jpg (1 .cls, 1 .de.txt, 1 .en.txt, 1 .kind.cls, 1 .left.jpg), "
        "first '2'",
        "1 images have no column kind.cls for the label, first '1'",
        "1 images have no column de.txt for the caption, first '3'",
    ]
    assert tar.identity() != Tar(str(tmp_path)).identity()


def test_an_ambiguous_caption_is_counted_and_not_read(tmp_path, caplog):
    tar = tar_of(tmp_path, {"0.jpg": b"x", "0.en.txt": b"cat", "0.de.txt": b"Katze", "1.jpg": b"x", "1.txt": b"dog"})
    with caplog.at_level("WARNING"):
        images = list(tar.read("a"))
    assert [captions("a", image) for image in images] == [[], ["dog"]]
    assert "1 images have several columns that may be the caption, and none is read: first '0'" in caplog.text


def test_a_named_column_that_no_sample_has_raises_with_the_existing_columns(tmp_path):
    tar_of(tmp_path, {"0.input.jpg": b"x", "1.input.jpg": b"x"})
    tar = build({**SETTINGS, "root": str(tmp_path), "columns": {"image": "inputs.jpg"}}).source
    with pytest.raises(UserError, match=r"a\.tar: contains no images \(inputs.jpg\); its columns are 2 \.input\.jpg"):
        list(tar.read("a"))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"imag": "jpg"}, "images.columns.imag: no such setting.*Did you mean 'image'"),
        ({"image": ".jpg"}, "images.columns.image='.jpg': expected the part of a member's name after its first dot"),
        ({"caption": "TXT"}, "images.columns.caption='TXT': .*lower case"),
        ({"label": 3}, "images.columns.label=3: expected"),
    ],
)
def test_wrong_columns_are_named(columns, says):
    with pytest.raises(UserError, match=says):
        build({**SETTINGS, "root": "x", "columns": columns})


@pytest.mark.parametrize("word", [b"cat", b"", b"-1", b"1.5", b"3 4", "\u0664".encode(), b"9" * 19])
def test_a_label_that_is_no_number_is_named_with_its_tar_and_key(tmp_path, word):
    tar = tar_of(tmp_path, {"0.jpg": b"x", "0.cls": b"\xef\xbb\xbf7\r\n", "1.jpg": b"y", "1.cls": word})
    assert tar.fetch("a", "0").label == 7
    with pytest.raises(
        UserError, match=r"a\.tar: '1\.cls' contains '.*', but a label is a whole number, 0 or more"
    ) as error:
        list(tar.read("a"))
    assert "\n" not in str(error.value) and (word.isascii() and word.decode() in str(error.value) or word[0] > 127)
    without = build({**SETTINGS, "root": str(tmp_path), "columns": "{label: null}"}).source
    assert [image.label for image in without.read("a")] == [None, None]


def test_a_caption_in_another_encoding_is_named_with_its_tar_key_and_column(tmp_path):
    tar = tar_of(
        tmp_path,
        {"0.jpg": b"x", "0.txt": "caf\xe9".encode("latin-1"), "1.jpg": b"x", "1.txt": b"\xef\xbb\xbfa  b\r\n\r\nc"},
    )
    assert captions("a", tar.fetch("a", "1")) == ["a b", "c"]
    with pytest.raises(UserError, match="a: image '0', column txt: not UTF-8 .*Latin-1"):
        captions("a", tar.fetch("a", "0"))


def linked(members: list[tuple[str, bytes | tuple[bytes, str]]]) -> bytes:
    """Return a tar of files, and of links given as (type, target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE


def test_links_are_resolved_as_in_the_unpacked_tar(tmp_path, caplog):
    data = linked([
        ("./d/a.jpg", b"one"), ("./d/hard.jpg", (HARD, "./d/a.jpg")), ("./d/soft.jpg", (SOFT, "a.jpg")),
        ("./e/up.jpg", (SOFT, "../d/soft.jpg")), ("./e/ahead.jpg", (SOFT, "late.jpg")), ("./e/late.jpg", b"two"),
        ("./d/a.jpg", b"three"), ("./d/again.jpg", (HARD, "d/a.jpg")), ("./e/late.txt", b"text"),
        ("./e/ahead.txt", (SOFT, "late.txt")), ("loop.jpg", (SOFT, "pool.jpg")), ("pool.jpg", (SOFT, "loop.jpg")),
        ("gone.jpg", (SOFT, "nowhere.jpg")), ("away.jpg", (SOFT, "/etc/passwd")), ("lost.jpg", (HARD, "x/y.jpg")),
    ])  # fmt: skip
    tar = tar_of(tmp_path, data)
    with caplog.at_level("WARNING"):
        images = read(tar)
    unpacked = tmp_path / "unpacked"
    with tarfile.open(tmp_path / "a.tar") as file:  # by tarfile itself
        for member in file:
            if not member.name.startswith(("loop", "pool", "gone", "away", "lost")):
                (unpacked / member.name).unlink(missing_ok=True)
                file.extract(member, unpacked, filter="data")
    expected = {str(p.relative_to(unpacked).with_suffix("")): p.read_bytes() for p in unpacked.rglob("*.jpg")}
    assert {key: data for key, (data, _) in images.items()} == expected
    assert expected["d/hard"] == b"one" and expected["d/soft"] == expected["d/again"] == b"three"
    assert images["e/ahead"] == (b"two", {"txt": b"text"}) and len(images) == 7
    assert "ignored 5 links whose targets are not in the tar, first 'away.jpg' (to '/etc/passwd')" in caplog.text
    assert tar.fetch("a", "e/up").data == b"three"


def test_the_last_of_two_members_of_one_name_counts(tmp_path):
    images = read(
        tar_of(tmp_path, [("a.jpg", b"1"), ("a.json", b"2"), ("./a.jpg", b"3"), ("a.json", b"4"), ("b.jpg", b"5")])
    )
    assert images == {"a": (b"3", {"json": b"4"}), "b": (b"5", {})}


def test_members_outside_samples_are_counted(tmp_path, caplog):
    members = {"a.jpg": b"1", "b.heic": b"2", "c.heic": b"3", "c.json": b"4", "README": b"5", ".hidden.jpg": b"6"}
    with caplog.at_level("WARNING"):
        assert list(read(tar_of(tmp_path, members))) == ["a"]
    assert "ignored 2 samples without an image (2 .heic, 1 .json), first 'b'" in caplog.text
    assert "ignored 1 members without a suffix, first 'README'" in caplog.text


def test_tars_of_one_name_in_several_folders_are_shards_of_their_own(tmp_path):
    for place, data in (("x", b"1"), ("y", b"2"), ("y/z%", b"3"), (".", b"4")):
        (tmp_path / place).mkdir(exist_ok=True)
        tar_of(tmp_path / place, {"0.jpg": data})
    tar = Tar(str(tmp_path), train=["*/a.tar", str(tmp_path / "y/z%/a.tar")], validation="a.tar")
    assert tar.shards() == {"train": ["x%2Fa", "y%2Fa", "y%2Fz%25%2Fa"], "validation": ["a"]}
    assert [read(tar, name)["0"][0] for names in tar.shards().values() for name in names] == [b"1", b"2", b"3", b"4"]
    assert Tar(str(tmp_path), train="y/a.tar").shards()["train"] == ["y%2Fa"]  # the same without the other tars
    assert Tar(train=[str(tmp_path / "y/a.tar")]).shards()["train"] == ["a"]  # outside the root
    with pytest.raises(
        UserError, match=rf"x/a.tar, and at least one of them is outside .* such as images.root={tmp_path}"
    ):
        Tar(train=[str(tmp_path / "x/a.tar"), str(tmp_path / "y/a.tar")]).shards()


def test_img2dataset_and_webdataset_columns_and_labels(tmp_path):
    members = {"0.txt": b"a cat", "0.webp": b"w", "0.cls": b"7\n", "1.png": b"p", "alone.json": b"{}"}
    images = list(tar_of(tmp_path, members).read("a"))
    assert [(i.key, i.data, i.label) for i in images] == [("0", b"w", 7), ("1", b"p", None)]
    assert images[0].extra == {"txt": b"a cat", "cls": b"7\n"}


def test_hidden_and_special_files_are_ignored(tmp_path):
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
    assert list(read(tar_of(tmp_path, buffer.getvalue()))) == ["../up", "/root", "long" * 60, "\u00fc"]


def test_two_members_for_one_column_raise(tmp_path):
    tar = tar_of(tmp_path, [("a.jpg", b"1"), ("a.JPG", b"2")])
    for use in (tar.count, lambda shard: list(tar.read(shard))):
        with pytest.raises(
            UserError, match=r"a\.tar: contains two columns 'jpg' of the key 'a' \('a.jpg' and 'a.JPG'\)"
        ):
            use("a")


def test_a_truncated_tar_yields_its_complete_images_at_every_length(tmp_path):
    members = {f"{i}.{suffix}": bytes([i]) * 700 for i in range(3) for suffix in ("jpg", "json")}
    whole = pack(members)
    complete = [(f"{i}", bytes([i]) * 700) for i in range(3)]
    end_of_members = 6 * (512 + 1024)
    for length in [1, 511, *range(512, end_of_members + 1, 200), end_of_members]:
        tar = tar_of(tmp_path, whole[:length])
        images = []
        with pytest.raises(UserError) as error:
            for image in tar.read("a"):
                images.append((image.key, image.data))
                # The cut may lose a whole column of the last image, but an image never has part of a column.
                assert image.extra.get("json", bytes([int(image.key)]) * 700) == bytes([int(image.key)]) * 700
        assert images == complete[: len(images)] and len(images) == tar.count("a")
        assert tar.keys("a") == [key for key, _ in images]
        assert len(images) >= length // (2 * 1536)
        assert "a.tar" in str(error.value) and "Download it again" in str(error.value)
        if images:
            assert f"truncated at byte {length}, after the image '{images[-1][0]}'" in str(error.value)
            assert tar.fetch("a", images[-1][0]).data == images[-1][1]
    assert len(read(tar_of(tmp_path, whole))) == 3


def test_an_image_with_a_cut_column_is_incomplete(tmp_path):
    tar = tar_of(tmp_path, pack({"0.jpg": b"0", "1.jpg": b"1", "1.json": b"x" * 600})[: 5 * 512 + 300])
    assert tar.count("a") == 1
    with pytest.raises(UserError, match="after the image '0'; 1 images"):
        list(tar.read("a"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (b"<html>not images</html>" * 100, "not a tar"),
        (pack({"note.txt": b"x"}), "contains no images"),
        (pack({"a.jpg": b"1"})[:1024] + b"garbage!" * 200, "damaged at byte 1024, in place .*'a'; 1 images"),
    ],
)
def test_a_damaged_tar_is_named(tmp_path, data, says):
    with pytest.raises(UserError, match=rf"a\.tar: .*{says}") as error:
        list(tar_of(tmp_path, data).read("a"))
    assert "\n" not in str(error.value)


def test_lists_may_have_braces_and_globs_and_be_a_single_text(tmp_path):
    root = tmp_path / "with [brackets]"
    root.mkdir()
    for name in ("sa_09", "sa_10", "sa_11", "sa_12", "v_b", "v_a", "odd[1]"):
        tar_of(root, SA1B, name)
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
        ({"train": ["a.tar"], "validation": ["a.tar"]}, "images.validation: .*a.tar is also in images.train"),
        ({"train": ["a.tar", "./a.tar"]}, "images.train: .*a.tar is also in images.train"),
        ({"train": ["a.tar.gz"]}, "expected a name that ends in .tar"),
        ({"train": ["{a.tar"]}, "images.train: '{a.tar'"),
        ({"train": "[a.tar"}, "no such tar|ends in .tar"),
        ({"train": ["nosuch://a.tar"]}, "images.root: 'nosuch://a.tar'"),
    ],
)
def test_a_wrong_list_raises_one_line(tmp_path, settings, says):
    (tmp_path / "sub").mkdir()
    tar_of(tmp_path, SA1B)
    tar_of(tmp_path / "sub", SA1B)
    with pytest.raises(UserError, match=says) as error:
        Tar(str(tmp_path), **settings).shards()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("before", ["", "simplecache::"])
def test_a_url_is_read_like_a_disk(before):
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


def test_indices_are_bounded_and_reach_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_source, "CACHED_INDICES", 2)
    for name in "abcd":
        tar_of(tmp_path, SA1B, name)
    tar = Tar(str(tmp_path), train="{a,b,c,d}.tar")
    assert [tar.count(name) for name in "abcda"] == [2] * 5
    assert len(tar._indices) == 2
    assert read(pickle.loads(pickle.dumps(tar)), "b") == read(tar, "b")


def test_forked_workers_inherit_the_parents_index(tmp_path, monkeypatch):
    tar = tar_of(tmp_path, SA1B)
    tar.count("a")
    monkeypatch.setattr(tar_source, "scan", None)  # reading the headers again would fail
    loader = DataLoader(KeyedImages(tar), num_workers=2, batch_size=None, multiprocessing_context="fork")
    assert list(loader) == [b"one", b"two" * 400]


class KeyedImages(Dataset):
    """The images of SA1B, each read by its key."""

    def __init__(self, tar: Tar) -> None:
        self.tar = tar

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bytes:
        return self.tar.fetch("a", f"sa_{index + 1}").data


def test_a_tar_that_shrinks_while_it_is_read_is_named(tmp_path):
    tar = tar_of(tmp_path, SA1B)
    tar.count("a")
    (tmp_path / "a.tar").write_bytes(pack(SA1B)[:600])
    with pytest.raises(UserError, match="changed while it was read, at 'sa_2'"):
        tar.fetch("a", "sa_2")

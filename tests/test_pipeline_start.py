"""Tests of `fmdistill init`: what it counts, what it writes, and what it refuses before it writes anything."""

import io
import tarfile
from pathlib import Path

import PIL.Image
import pytest

from fmdistill import pipeline, recipe
from fmdistill.pipeline import own_images, start
from fmdistill.pipeline.sizes import Machine, Workload, sizes
from fmdistill.recipe import Train
from fmdistill.registry import UserError

CPU, GPU = Machine("", 16.0, 2), Machine("A GPU", 24.0, 16)
MINI = {"teacher.name": "sam_mini"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder of eight images in the working folder."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "photos"
    images.mkdir()
    for number in range(8):
        PIL.Image.new("RGB", (40, 30), (30 * number, 0, 0)).save(images / f"{number}.{'jpg' if number else 'png'}")
    return images


@pytest.fixture
def big_file(tmp_path) -> str:
    """Return the path of a file that is named as Meta's checkpoint; `init` does not read it."""
    path = tmp_path / "sam_vit_h_4b8939.pth"
    path.touch()
    return str(path)


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = io.BytesIO()
            PIL.Image.new("RGB", (40, 30), (number, 0, 0)).save(data, "PNG")
            for suffix, content in (("png", data.getvalue()), ("txt", b"a red rectangle")):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sam", {"teacher.name": "sam_mini"}),
        ("sam", {"teacher.weights": "sam_vit_h_4b8939.pth"}),
        ("clip", {}),
        ("clip", {"teacher.name": "clip_mini"}),
        ("timm", {}),
    ],
)
def test_the_file_is_a_recipe_of_these_images_that_passes_the_check(kind, settings, big_file):
    new = start.init("mine.yaml", kind, {"images.root": "photos", **settings})
    assert pipeline.check_files(["mine.yaml"]) == ["mine.yaml"]
    loaded = recipe.load("mine.yaml")
    pipeline.check_before(loaded)
    assert (loaded.out, loaded.cache and loaded.cache.root) == ("runs/mine", "caches/mine")
    assert loaded.images["name"] == "folder" and loaded.images["root"] == "photos"
    assert "8 images (7 .jpg, 1 .png) in photos" in str(new) and "6 to train on, 2 held out" in str(new)
    text = Path("mine.yaml").read_text()
    assert text.count("#") > 8 and len(text.splitlines()) < 35 and "extends: recipes/" in text


def test_the_name_of_meta_s_file_decides_the_teacher(tmp_path):
    (tmp_path / "sam_vit_b_01ec64.pth").touch()
    start.init("b.yaml", "sam", ["images.root=photos", "teacher.weights=sam_vit_b_01ec64.pth"])
    assert recipe.load("b.yaml").teacher == {"name": "sam_vit_b", "weights": "sam_vit_b_01ec64.pth"}


def test_the_settings_of_the_user_are_in_the_file_as_they_would_be_on_the_command_line(folder):
    folder.rename("1e3")
    start.init("mine.yaml", "sam", ["images.root=1e3", "train.steps=12", "out=runs/other", *["teacher.name=sam_mini"]])
    loaded = recipe.load("mine.yaml")
    assert (loaded.images["root"], loaded.train.steps, loaded.out) == ("1e3", 12, "runs/other")
    assert "train:\n  steps: 12\n" in Path("mine.yaml").read_text()


def test_a_hint_that_is_uncommented_weighs_patches_by_srw():
    start.init("mine.yaml", "sam", {"images.root": "photos", **MINI})
    Path("srw.yaml").write_text(Path("mine.yaml").read_text().replace("# objective:", "objective:"))
    assert recipe.load("srw.yaml").objective["embedding"]["weighting"]["name"] == "srw"
    pipeline.check(recipe.load("srw.yaml"))


@pytest.mark.parametrize(
    ("kind", "model", "width", "side"),
    [("clip", "RN50", 1024, 224), ("timm", "test_convnext", 64, 160), ("timm", "resnet18", 512, 224)],
)
def test_the_student_of_another_model_has_its_embedding_and_its_side(kind, model, width, side):
    teacher = {"teacher.model": model, "teacher.pretrained": "none" if kind == "clip" else "false"}
    start.init("mine.yaml", kind, {"images.root": "photos", **teacher})
    loaded = recipe.load("mine.yaml")
    pipeline.check_before(loaded)
    assert (loaded.student["embed_dim"], loaded.student["image_size"]) == (width, side)
    assert "embed_dim: " in Path("mine.yaml").read_text() and "# the teacher's\n" in Path("mine.yaml").read_text()
    assert loaded.teacher and loaded.teacher["model"] == model and loaded.teacher.get("pool") is None


def test_tars_are_read_as_tars_and_the_last_is_held_out(tmp_path):
    (tmp_path / "tars").mkdir()
    for number in range(3):
        write_tar(tmp_path / f"tars/{number:05d}.tar", range(6))
    new = start.init("mine.yaml", "clip", {"images.root": "tars"})
    loaded = recipe.load("mine.yaml")
    assert loaded.images["train"] == "{00000..00001}.tar" and loaded.images["validation"] == "00002.tar"
    assert loaded.protocols == ["eval/clip_retrieval.yaml"]
    assert "18 images in tars" in str(new) and "12 to train on, 6 held out" in str(new)


@pytest.mark.parametrize(
    ("tars", "pattern"),
    [
        (["sa_08.tar", "sa_09.tar", "sa_10.tar"], "sa_{08..10}.tar"),
        (["sa_08.tar", "sa_10.tar"], ["sa_08.tar", "sa_10.tar"]),
        (["a.tar", "b.tar"], ["a.tar", "b.tar"]),
        (["a.tar"], ["a.tar"]),
    ],
)
def test_consecutive_tars_are_written_as_one_pattern(tars, pattern):
    assert own_images._pattern(tars) == pattern


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sam", {"images.root": "nowhere", **MINI}, "images.root=nowhere: no such folder"),
        ("sam", {"images.root": "empty", **MINI}, "images.root=empty: contains no images"),
        ("sam", {"images.root": "single", **MINI}, "contains one image; at least 2"),
        ("sam", MINI, "images.root: not set"),
        ("sam", {"images.root": "photos"}, r"download https://\S+/sam_vit_h_4b8939.pth.*sam_mini"),
        ("sam", {"images.root": "photos", "teacher.weights": "x.pth"}, r"x.pth: no such file; download \S+_4b8939"),
        ("sam", {"images.root": "photos", "teacher.name": "sam_minn"}, "Did you mean 'sam_mini'"),
        ("sam", {"images.root": "photos", "images.rot": 1, **MINI}, "images.rot: no such setting"),
        ("sam", {"images.root": "photos", "train.step": 1, **MINI}, "train.step: no such setting"),
        ("sam", {"images.root": "photos", "images.name": "photos", **MINI}, "not a source of your own images"),
        ("samm", {"images.root": "photos"}, "Did you mean 'sam'"),
        ("clip", {"images.root": "photos", "teacher.pretrained": "no/such.pt"}, r"no/such.pt: no such file"),
        ("timm", {"images.root": "photos", "teacher.model": "resnet19"}, "none of timm's .* Did you mean 'resnet18"),
        (
            "timm",
            {"images.root": "photos", "teacher.model": "xcit_nano_12_p8_224", "teacher.image_size": 216},
            r"sees images of 216 x 216, but a TinyViT's side is a multiple of 32; set teacher.image_size=192",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(kind, settings, message):
    Path("empty").mkdir()
    Path("single").mkdir()
    PIL.Image.new("RGB", (4, 4)).save("single/a.png")
    with pytest.raises(UserError, match=message) as error:
        start.init("mine.yaml", kind, settings)
    assert str(error.value).endswith("mine.yaml was not written") and not Path("mine.yaml").exists()


def test_nothing_that_exists_is_overwritten():
    Path("mine.yaml").write_text("kept")
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        start.init("mine.yaml", "sam", {"images.root": "photos", **MINI})
    assert Path("mine.yaml").read_text() == "kept"
    Path("runs/other").mkdir(parents=True)
    Path("runs/other/recipe.yaml").touch()
    with pytest.raises(UserError, match="runs/other: holds a run already"):
        start.init("other.yaml", "sam", {"images.root": "photos", **MINI})
    with pytest.raises(UserError, match="ends in .yaml"):
        start.init("mine", "sam", {"images.root": "photos", **MINI})


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["", "", "photos", ""], ("mine.yaml", "sam", ["images.root=photos", "teacher.name=sam_mini"])),
        (["a.yaml", "sam", "photos", "x.pth"], ("a.yaml", "sam", ["images.root=photos", "teacher.weights=x.pth"])),
        (["a.yaml", "clip", ""], ("a.yaml", "clip", ["images.root=."])),
    ],
)
def test_without_arguments_it_asks_and_enter_takes_the_default(monkeypatch, answers, expected):
    replies = iter(answers)
    monkeypatch.setattr("builtins.input", lambda question: next(replies))
    assert start.complete([], ask=True) == expected


def test_it_asks_only_for_what_is_missing():
    arguments = ["mine.yaml", "sam", "images.root=photos"]
    assert start.complete(arguments, ask=True) == ("mine.yaml", "sam", ["images.root=photos"])
    with pytest.raises(UserError, match="'photos': expected FILE KIND key=value"):
        start.complete(["mine.yaml", "sam", "photos"], ask=False)


def test_sizes_follow_the_images_and_the_machine():
    work = Workload(side=1024, gigabytes=1.4, epochs=8, least=1000)
    base = Train(epochs=8, batch_size=64, validate_every=2000, checkpoint_every=1000)
    few, _ = sizes(work, 90, base, CPU)
    assert (few["batch_size"], few["steps"], few["workers"], few["image_memory"]) == (8, 1000, 1, 0.3)
    assert few["accumulate"] == 4 and few["checkpoint_every"] == 250
    many, comments = sizes(work, 100_000, base, GPU)
    assert (many["batch_size"], many["accumulate"], many["steps"], many["workers"]) == (64, 8, 12_500, 8)
    assert "image_memory" not in many and many["checkpoint_every"] == 1000 and comments["train.steps"] == "8 epochs"
    tiny, _ = sizes(Workload(256, 0.05, 8, 400, 2000), 1, base, CPU)
    assert (tiny["batch_size"], tiny["steps"]) == (1, 400)
    first_try, _ = sizes(Workload(256, 0.05, 8, 400, 2000), 50_000, base, CPU)
    assert first_try["steps"] == 2000

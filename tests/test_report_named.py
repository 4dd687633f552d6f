"""Images that the user names: files are as the cache has them, and whatever is missing is a one-line error."""

import pytest
import tiny
import torch

from fmdistill import cache, cli, distill
from fmdistill.cache.dataset import CachedImages
from fmdistill.registry import UserError
from fmdistill.report import examples, named, rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a run's recipe, its cache's validation images, and a folder with the files of two of them."""
    folder = tmp_path_factory.mktemp("named")
    recipe = tiny.load(folder, "train.steps=2", "teacher.exact=true")
    cache.run(recipe)
    distill.run(recipe)
    data = CachedImages(cache.open_cache(recipe), "validation")
    (folder / "pictures").mkdir()
    for index in (1, 3):
        (folder / "pictures" / f"{index}.png").write_bytes(data.encoded(0, index).data)
    return recipe, data, folder / "pictures"


def test_a_file_has_the_outputs_that_the_cache_has_of_the_same_image(made):
    recipe, data, pictures = made
    names = [data.shards[0].keys[5], str(pictures), str(pictures / "3.png")]
    opened = named.batches(names, recipe, data.cache)
    assert [(group, batch["keys"]) for group, batch in opened] == [
        ("images", [names[0]]), ("files", ["1.png"]), ("files", ["3.png"]), ("files", ["3.png"]),
    ]  # fmt: skip
    for (_, batch), index in zip(opened, (5, 1, 3, 3), strict=True):
        stored = data.batch([(0, index)])
        for name in ("pixels", "sizes", "originals"):
            assert torch.equal(batch[name], stored[name])
        assert batch["outputs"].keys() == stored["outputs"].keys()
        for name, output in batch["outputs"].items():
            torch.testing.assert_close(output, stored["outputs"][name], atol=1e-5, rtol=1e-5)
    whole = named.merged([batch for _, batch in opened])
    assert whole["keys"] == [names[0], "1.png", "3.png", "3.png"] and len(whole["pixels"]) == 4


def test_pictures_of_a_report_are_those_of_the_named_images(made):
    recipe, data, pictures = made
    runs = rows.read_runs([recipe.out])
    shown, _ = examples.gather(runs, trust=True, images=[str(pictures)])
    assert [(example.key, example.group) for example in shown] == [("1.png", "files"), ("3.png", "files")]
    keys = [data.shards[0].keys[index] for index in (1, 3)]
    same, _ = examples.gather(runs, trust=True, images=keys)
    for one, other in zip(shown, same, strict=True):
        assert (one.image == other.image).all() and one.prompts.keys() == other.prompts.keys()
        for kind, prompt in one.prompts.items():
            assert prompt.point == other.prompts[kind].point
            assert all((mask == other.prompts[kind].masks[name]).all() for name, mask in prompt.masks.items())


def test_what_is_missing_is_a_one_line_error(made, tmp_path, capsys):
    recipe, data, pictures = made
    with pytest.raises(UserError, match="images=nowhere.jpg: neither a file, a folder, nor the key"):
        named.batches(["nowhere.jpg"], recipe, data.cache)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"broken\.png"):
        named.batches([str(tmp_path / "broken.png")], recipe, data.cache)
    other = tiny.load(pictures.parent, "teacher.seed=1")
    with pytest.raises(UserError, match="not the one of .*: other weights"):
        named.batches([str(pictures)], other, data.cache)
    assert cli.main(["report", str(tmp_path / "out"), recipe.out, "trust=true", "images=nowhere.jpg"]) == 2
    assert "images=nowhere.jpg" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert cli.main(["report", str(tmp_path / "out"), recipe.out, "image=x"]) == 2
    assert "report.image: no such setting" in capsys.readouterr().err


def test_the_command_takes_one_image_or_a_list(made, tmp_path, capsys):
    recipe, data, pictures = made
    key = data.shards[0].keys[0]
    for images, shown in ((f"images={pictures / '1.png'}", False), (f"images=[{key}, {pictures}]", True)):
        assert cli.main(["report", str(tmp_path / "out"), recipe.out, "trust=true", images]) == 0
        html = (tmp_path / "out" / "index.html").read_text()
        assert "files, 1.png" in html and (f"images, {key}" in html) is shown

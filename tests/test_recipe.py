import dataclasses
from pathlib import Path

import pytest

from fmdistill import recipe
from fmdistill.recipe import load, load_saved, merge, parse_overrides, save
from fmdistill.registry import UserError

YAML = """
out: runs/a
seed: 3
images: {name: folder, root: photos, shard_size: 4}
student: {name: tinyvit_sam_mini}
teacher: {name: sam_mini}
task: {name: distill}
optimizer: {name: adamw, lr: 1e-3}
schedule: {name: cosine}
cache: {root: caches/a}
train: {steps: 10}
"""


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "base.yaml"
    path.write_text(YAML)
    return path


def test_load_is_typed_frozen_and_full_of_defaults(base):
    loaded = load("base.yaml", ["train.batch_size=8"])
    assert (loaded.seed, loaded.train.steps, loaded.train.batch_size, loaded.train.window) == (3, 10, 8, 8)
    assert loaded.cache == recipe.CacheSettings("caches/a") and loaded.optimizer["lr"] == 1e-3
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.seed = 4  # type: ignore[misc]


def test_text_settings_are_literal(base):
    loaded = load(base, ["images.root=007", "title=${oc.env:HOME}", "out=1e-3", "cache.root=null"])
    assert (loaded.images["root"], loaded.title, loaded.out) == ("007", "${oc.env:HOME}", "1e-3")
    assert loaded.cache is not None and loaded.cache.root == "null"


def test_interpolation_in_a_file_is_off(base, monkeypatch):
    monkeypatch.setenv("SECRET", "leaked")
    base.write_text(YAML + "title: ${oc.env:SECRET} and ${seed}\n")
    assert load(base).title == "${oc.env:SECRET} and ${seed}"


def test_null_removes_a_part(base):
    loaded = load(base, ["teacher=null", "train.steps=null", "train.epochs=2"])
    assert loaded.teacher is None and loaded.train.steps is None and loaded.train.epochs == 2.0


def test_another_name_replaces_the_arguments(base):
    assert load(base, ["images.name=tar", "images.train=a.tar"]).images == {"name": "tar", "train": "a.tar"}
    same = load(base, ["images.name=folder", "images.root=x"]).images
    assert same == {"name": "folder", "root": "x", "shard_size": 4}


def test_merge_does_not_change_its_arguments():
    old, new = {"a": {"name": "x", "b": {"c": 1}}}, {"a": {"b": {"d": 2}}}
    assert merge(old, new) == {"a": {"name": "x", "b": {"c": 1, "d": 2}}}
    assert old == {"a": {"name": "x", "b": {"c": 1}}} and new == {"a": {"b": {"d": 2}}}
    assert merge({"a": {"name": "x", "b": 1}}, {"a": {"name": "y"}}) == {"a": {"name": "y"}}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


def test_extends_merges_a_child_into_its_parents(base, tmp_path):
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nseed: 4\noptimizer: {name: sgd, lr: 1}\n")
    (tmp_path / "child.yaml").write_text("extends: middle.yaml\ntrain: {batch_size: 2}\nimages: {root: other}\n")
    loaded = load("child.yaml", ["seed=5"])
    assert loaded.seed == 5 and loaded.train.steps == 10 and loaded.train.batch_size == 2
    assert loaded.images == {"name": "folder", "root": "other", "shard_size": 4}
    assert loaded.optimizer == {"name": "sgd", "lr": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trian: {steps: 1}", "trian: no such setting.* Did you mean 'train'"),
        ("train: {step: 1}", "a.yaml: train.step: no such setting.* Did you mean 'steps'"),
        ("train: {steps: many}", "train.steps='many': expected"),
        ("seed: 1.5", "seed=1.5: expected int, got float"),
        ("out: 2024", "out=2024: expected str, got int; quote it"),
        ("cache: {codec: fp161, root: x}", "cache.codec='fp161': unknown.* Did you mean 'fp16'"),
        ("cache: {codec: fp16}", None),
        ("extends: gone.yaml", "gone.yaml: no such file"),
        ("extends: a.yaml", "a.yaml: extends itself"),
        ("extends: 3", "3: no such file"),
        ("- a list", "a.yaml: expected a mapping of settings"),
        ("a: [1", "a.yaml: not YAML"),
        ("title: ${", "a.yaml: not YAML"),
        ("a: 1\na: 2", "a.yaml: not YAML: .*duplicate key"),
        ("out: {a: 1}", "out={'a': 1}: expected str, got dict"),
    ],
)
def test_a_wrong_recipe_raises_one_line(base, tmp_path, text, says):
    alone = text.startswith(("extends", "-", "a:", "title"))
    (tmp_path / "a.yaml").write_text(text if alone else f"extends: base.yaml\n{text}")
    if says is None:
        assert load("a.yaml").cache == recipe.CacheSettings("caches/a", codec="fp16")
        return
    with pytest.raises(UserError, match=says) as error:
        load("a.yaml")
    assert "\n" not in str(error.value)


def test_a_binary_file_is_not_yaml(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="a.yaml: not YAML"):
        load(tmp_path / "a.yaml")


def test_a_missing_setting_and_a_missing_file(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="a.yaml: out: required but not set"):
        load(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="no/such.yaml: no such file in the working folder or in the package"):
        load("no/such.yaml")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.steps"], "'train.steps': expected key=value"),
        (["=3"], "'=3': expected key=value"),
        (["seed=1", "seed.a=2"], "'seed.a=2': another argument sets seed itself"),
        (["seed.a=2", "seed=1"], "'seed=1': another argument sets a part of seed"),
        (["seed.a=2"], "seed={'a': '2'}: expected int"),
        (["train.stpes=2"], "train.stpes: no such setting.* Did you mean 'steps'"),
        (["train.steps=[1"], r"train.steps='\[1': not a YAML value"),
        (["train.clip=true"], "train.clip=True: expected float"),
        (["seed="], "seed=None: expected int"),
        (["cache.root="], "cache.root='': expected a folder"),
        (["cache.root=s3://"], "cache.root='s3://': expected a folder, or a URL such as s3://bucket/"),
        (["cache.root=s3:///caches"], "cache.root='s3:///caches': expected"),
        (["cache.max_failed=-0.1"], "cache.max_failed=-0.1: expected a fraction .* 0 to 1"),
        (["cache.max_failed=5"], "cache.max_failed=5.0: expected"),
        (["cache.max_failed=.nan"], "cache.max_failed=nan: expected"),
        (["cache.local_gb=0"], "cache.local_gb=0.0: expected gigabytes"),
        (["cache.local_gb=.inf"], "cache.local_gb=inf: expected"),
    ],
)
def test_a_wrong_override_raises_one_line(base, overrides, says):
    with pytest.raises(UserError, match=says) as error:
        load(base, overrides)
    assert "\n" not in str(error.value)


def test_the_ends_of_a_range_and_every_kind_of_root_are_valid(base):
    for root in ("caches/a", "/", "s3://bucket", "gs://bucket/a", "file:///data/caches", "memory://a"):
        assert load(base, [f"cache.root={root}", "cache.max_failed=0"]).cache == recipe.CacheSettings(
            root, max_failed=0
        )
    ends = ["cache.root=memory://a", "cache.max_failed=1", "cache.local_gb=0.001"]
    assert load(base, ends).cache.local_gb == 0.001


def test_an_override_keeps_what_follows_the_first_equals_sign():
    assert parse_overrides(["a.b=c=d", "a.e="]) == {"a": {"b": "c=d", "e": ""}}


TEXTS = ["007", "1e-3", "yes", "null", "~", "", "${oc.env:HOME}", "a: b", "# x", "\u00e9", "a\nb", "'", "2020-01-01"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_saved_recipe_loads_as_the_same_value(base, tmp_path, text):
    first = load(base, [f"title={text}", f"images.root={text}", "train.clip=1e-5"])
    save(first, tmp_path / "run")
    assert load_saved(tmp_path / "run") == first
    assert load_saved(tmp_path / "run", ["seed=9"]) == dataclasses.replace(first, seed=9)


def test_a_text_that_cannot_be_saved_raises(base, tmp_path):
    with pytest.raises(UserError, match="unclosed"):
        save(load(base, ["title=${"]), tmp_path / "run")


@pytest.mark.parametrize(
    "override",
    ["student.name=os:system", "objective.mse.weighting.name=os:system", "images.sources.a.name=os:system"],
)
def test_a_saved_recipe_may_not_name_code(base, tmp_path, override):
    save(load(base, [override]), tmp_path / "run")
    with pytest.raises(UserError, match=r"recipe.yaml: names code outside fmdistill \(os:system\); add trust=true"):
        load_saved(tmp_path / "run")
    assert load_saved(tmp_path / "run", ["trust=true"]) == load(base, [override])


def test_a_saved_recipe_may_not_name_code_through_its_parent(base, tmp_path):
    base.write_text(YAML.replace("tinyvit_sam_mini", "os:system"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(f"extends: {base}\n")
    with pytest.raises(UserError, match="names code"):
        load_saved(tmp_path / "run")


def test_a_recipe_that_extends_a_saved_one_needs_trust_for_its_code(base, tmp_path):
    save(load(base, ["student.name=os:system"]), tmp_path / "run")
    (tmp_path / "child.yaml").write_text(f"extends: {tmp_path}/run/recipe.yaml\nseed: 4\n")
    with pytest.raises(UserError, match=r"run/recipe.yaml: names code outside fmdistill \(os:system\)"):
        load(tmp_path / "child.yaml")
    assert load(tmp_path / "child.yaml", ["trust=true"]).seed == 4
    (tmp_path / "own.yaml").write_text(f"extends: {tmp_path}/child.yaml\n")
    with pytest.raises(UserError, match="names code"):
        load(tmp_path / "own.yaml")


def test_a_path_may_begin_with_the_home_folder(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: ~/{base.name}\nout: ~/run\nprotocols: [~/a.yaml, b.yaml]\n")
    loaded = load("~/child.yaml", ["cache.root=~/cache", "images.root=~/data", "train.clip=~"])
    assert (loaded.out, loaded.protocols) == (f"{tmp_path}/run", [f"{tmp_path}/a.yaml", "b.yaml"])
    assert loaded.cache.root == f"{tmp_path}/cache" and loaded.images["root"] == f"{tmp_path}/data"
    assert loaded.train.clip is None
    assert load(base, ["title=~approximately", "cache.root=a~/b"]).title == "~approximately"


def test_settings_that_do_not_affect_weights_are_free():
    free = recipe.free_settings()
    assert {"out", "title", "protocols", "cache.executor", "cache.local", "cache.local_gb", "cache.max_failed"} <= free
    assert {"train.workers", "train.device", "train.checkpoint_every"} <= free
    assert not {"seed", "train", "cache", "cache.codec", "train.batch_size", "train.precision", "train.clip"} & free


def test_a_folder_that_is_not_a_run_raises(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        load_saved(tmp_path)

"""Tests of the names of recipes, with settings and methods of studies, and of the settings in a study's file."""

import pytest
from test_recipe import YAML

from fmdistill.recipe import SAVED, load, variants
from fmdistill.registry import UserError
from fmdistill.settings import RecipeName, folder_name, is_override, parse_recipe_name

METHODS = """
title: plain
methods:
  base: {}
  fast: {train.steps: 5, optimizer.lr: 2e-3}
  faster: {extends: fast, train: {steps: 2}, title: own}
  tar: {images: {name: tar, train: a.tar}, out: runs/tar}
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    (tmp_path / "few/study.yaml").write_text(YAML + METHODS)
    return "few"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.yaml", RecipeName("a/b.yaml")),
        ("studies/x:kd", RecipeName("studies/x", "kd")),
        ("x.yaml:srw_0.5", RecipeName("x.yaml", "srw_0.5")),
        ("x.yaml:seed=1", RecipeName("x.yaml", "", ("seed=1",))),
        ("x:kd,seed=1,out=a", RecipeName("x", "kd", ("seed=1", "out=a"))),
        ("x.yaml:a.b=[1,2],c={d: 1, e: 2}", RecipeName("x.yaml", "", ("a.b=[1,2]", "c={d: 1, e: 2}"))),
        ("x:kd,w.name=losses:Hard", RecipeName("x", "kd", ("w.name=losses:Hard",))),
        ("x.yaml:out=a,b", RecipeName("x.yaml", "", ("out=a,b",))),
        ("s3://bucket/x.yaml", RecipeName("s3://bucket/x.yaml")),
        ("x.yaml:", RecipeName("x.yaml:")),
        ("x.yaml:" + "a" * 5000, RecipeName("x.yaml", "a" * 5000)),
    ],
)
def test_a_name_is_a_file_a_method_and_settings(name, expected):
    assert parse_recipe_name(name) == expected


def test_a_file_whose_name_contains_a_colon_is_loaded(tmp_path):
    path = tmp_path / "a:b"
    path.write_text(YAML)
    assert load(path).seed == 3


def test_a_setting_is_distinguished_from_a_recipe_with_settings():
    assert is_override("train.steps=3") and is_override("objective.x.weighting.name=losses:Hard")
    assert not is_override("x.yaml:train.steps=3") and not is_override("x.yaml")


def test_each_method_is_the_recipe_with_its_settings_merged_in(study):
    assert variants(study) == [f"few:{name}" for name in ("base", "fast", "faster", "tar")]
    assert variants("few:fast") == ["few:fast"] and variants("few/study.yaml") == variants(study)
    base, fast, faster, tar = map(load, variants(study))
    assert (base.out, base.title, base.train.steps) == ("runs/a/base", "plain, base", 10)
    assert (fast.out, fast.train.steps, fast.optimizer["lr"]) == ("runs/a/fast", 5, 2e-3)
    assert (faster.out, faster.title, faster.train.steps) == ("runs/a/faster", "own", 2)
    assert faster.optimizer == fast.optimizer == {"name": "adamw", "lr": 2e-3}
    assert tar.images == {"name": "tar", "train": "a.tar"} and tar.out == "runs/tar"


def test_a_name_with_settings_has_a_run_of_its_own(study):
    loaded = load("few:fast,seed=7,train.steps=6")
    assert (loaded.seed, loaded.train.steps, loaded.out) == (7, 6, "runs/a/fast-seed_7-train.steps_6")
    assert load("few:fast,train.steps=6,seed=7").out == loaded.out
    assert loaded.title == "plain, fast, seed=7, train.steps=6"
    assert load("few:fast,out=runs/own_folder").out == "runs/own_folder"
    assert load("few:fast", ["out=runs/own_folder", "seed=9"]).out == "runs/own_folder"


def test_folder_names_contain_no_path_and_differ_for_different_settings():
    assert folder_name(["b=2", "a.b=0.5"]) == "a.b_0.5-b_2"
    texts = ["a=../x", "a=.._x", "a=[1,2]", "a=[1, 2]", "a=1_2", "a=x y", "a=" + "x" * 300, "a=" + "x" * 301]
    names = [folder_name([text]) for text in texts]
    assert len(set(names)) == len(texts) and all("/" not in name and len(name) < 150 for name in names)


def test_a_recipe_extends_a_method(study, tmp_path):
    (tmp_path / "own.yaml").write_text("extends: few:faster\nout: runs/own\nseed: 5\n")
    own = load("own.yaml")
    assert (own.out, own.seed, own.train.steps) == ("runs/own", 5, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methods: [a]", r"methods=\['a'\]: expected a mapping"),
        ("methods:", "methods=None: expected a mapping"),
        ("methods: {a: 3}", "methods.a=3: expected a mapping of settings"),
        ("methods: {a/b: {}}", "methods.a/b: a name consists of letters"),
        ("methods: {..: {}}", "methods...: a name consists of letters"),
        ("methods: {a: {}, a: {seed: 1}}", "not YAML: .*duplicate key"),
        ("methods: {a: {seed: 3}}", "methods.a.seed: changes nothing"),
        ("methods: {a: {extends: b}}", "methods.a.extends=b: no other method"),
        ("methods: {a: {extends: a}}", "methods.a.extends=a: no other method"),
        ("methods: {a: {extends: b}, b: {extends: a}}", "extends=.: no other method"),
        ("methods: {a: {extends: [b]}}", "methods.a.extends=.*no other method"),
        ("methods: {a: {trian.steps: 1}}", "trian: no such setting"),
        ("methods: {b: {}}", "no method 'a'. Known: b"),
        ("", "no method 'a'. Known: none"),
    ],
)
def test_a_wrong_study_raises_one_line(study, tmp_path, text, says):
    (tmp_path / "few/study.yaml").write_text(YAML + text)
    with pytest.raises(UserError, match=says) as error:
        load("few:a")
    assert "\n" not in str(error.value)


def test_a_study_without_a_method_raises_and_so_do_settings_in_extends(study, tmp_path):
    with pytest.raises(UserError, match="a study of several recipes; name one as .*:METHOD.* Known: base, fast"):
        load(study)
    (tmp_path / "own.yaml").write_text("extends: few:fast,seed=5\nout: x\n")
    with pytest.raises(UserError, match="extends=few:fast,seed=5: name a recipe or a study's method, and set seed=5"):
        load("own.yaml")


def test_code_in_a_saved_recipe_s_methods_needs_trust(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SAVED).write_text(YAML + "methods: {a: {student.name: 'evil:Student'}}\n")
    for name in (f"{SAVED}:a", SAVED):
        with pytest.raises(UserError, match=r"names code outside fmdistill \(evil:Student\)"):
            load(name)
    assert load(f"{SAVED}:a", ["trust=true"]).student["name"] == "evil:Student"

"""How a recipe is named, with settings and as a method of a study, and what a study's file may say."""

import pytest
from test_recipe import YAML

from fmdistill.recipe import SAVED, load, variants
from fmdistill.registry import UserError
from fmdistill.settings import Reference, folder_name, is_override, refer

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
    ("name", "reference"),
    [
        ("a/b.yaml", Reference("a/b.yaml")),
        ("studies/x:kd", Reference("studies/x", "kd")),
        ("x.yaml:srw_0.5", Reference("x.yaml", "srw_0.5")),
        ("x.yaml:seed=1", Reference("x.yaml", "", ("seed=1",))),
        ("x:kd,seed=1,out=a", Reference("x", "kd", ("seed=1", "out=a"))),
        ("x.yaml:a.b=[1,2],c={d: 1, e: 2}", Reference("x.yaml", "", ("a.b=[1,2]", "c={d: 1, e: 2}"))),
        ("x:kd,w.name=mine:Hard", Reference("x", "kd", ("w.name=mine:Hard",))),
        ("x.yaml:out=a,b", Reference("x.yaml", "", ("out=a,b",))),
        ("s3://bucket/x.yaml", Reference("s3://bucket/x.yaml")),
        ("x.yaml:", Reference("x.yaml:")),
        ("x.yaml:" + "a" * 5000, Reference("x.yaml", "a" * 5000)),
    ],
)
def test_a_name_is_a_file_a_method_and_settings(name, reference):
    assert refer(name) == reference


def test_a_file_that_is_called_so_is_that_file(tmp_path):
    path = tmp_path / "a:b"
    path.write_text(YAML)
    assert load(path).seed == 3


def test_a_setting_is_told_from_a_recipe_with_settings():
    assert is_override("train.steps=3") and is_override("objective.x.weighting.name=mine:Hard")
    assert not is_override("x.yaml:train.steps=3") and not is_override("x.yaml")


def test_each_method_is_the_recipe_with_its_settings_on_top(study):
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
    assert load("few:fast,out=runs/mine").out == "runs/mine"
    assert load("few:fast", ["out=runs/mine", "seed=9"]).out == "runs/mine"


def test_a_folder_s_name_never_leaves_its_folder_and_tells_settings_apart():
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
        ("methods: {a/b: {}}", "methods.a/b: a name is made of letters"),
        ("methods: {..: {}}", "methods...: a name is made of letters"),
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
def test_a_wrong_study_gives_one_line(study, tmp_path, text, says):
    (tmp_path / "few/study.yaml").write_text(YAML + text)
    with pytest.raises(UserError, match=says) as error:
        load("few:a")
    assert "\n" not in str(error.value)


def test_a_study_alone_is_no_recipe_and_extends_takes_no_settings(study, tmp_path):
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

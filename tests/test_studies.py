"""Tests of the package's studies: each compares what its README says, and nothing else differs."""

import re
from pathlib import Path

import pytest

from fmdistill import recipe
from fmdistill.pipeline import variants
from fmdistill.recipe import Recipe

ROOT = Path(__file__).parent.parent
STUDIES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "recipes/studies").iterdir())]
# For each study: the number of its methods, its baseline, and the settings that may differ from it.
WEIGHTING = {"objective.embedding.weighting"}
EXPECTED = {
    "cifar100_pad": (10, "l2", {"objective", "teacher.maps"}),
    "cifar100_srw": (8, "kd", {"objective", "teacher.maps"}),
    "clip_mini_beyond_mse": (16, "unit_mse", {"objective", "optimizer"}),
    "clip_mini_weightings": (2, "mse", WEIGHTING),
    "codecs": (12, "fp32", {"cache.root", "cache.codec", "cache.trim", "objective.embedding.padding"}),
    "codecs_clip": (4, "fp32", {"cache.root", "cache.codec"}),
    "codecs_digits": (5, "fp32", {"cache.root", "cache.codec"}),
    "digits": (28, "kd", {"objective"}),
    "finetune": (3, "scratch", {"student", "optimizer"}),
    "imagenet_srw": (2, "kd", {"objective.teacher.weighting"}),
    "sam_mini_compensate": (9, "mse", WEIGHTING),
    "sam_mini_standardize": (4, "mse", {"objective.embedding.standardize", "objective.embedding.distance"}),
    "sam_mini_weightings": (12, "mse", WEIGHTING),
}


def differing(recipe: Recipe, other: Recipe) -> set[str]:
    """Return the dotted names of the settings in which two recipes differ, except their folders and titles."""
    first, second = variants.settled(recipe), variants.settled(other)
    return {key for key in first | second if first.get(key) != second.get(key)} - {"out", "title"}


def test_every_study_is_expected():
    assert [Path(study).name for study in STUDIES] == list(EXPECTED)


@pytest.mark.parametrize("study", STUDIES)
def test_a_studys_methods_differ_from_its_baseline_only_in_what_it_compares(study):
    count, baseline, allowed = EXPECTED[Path(study).name]
    names = recipe.variants(study)
    loaded = variants.load(names)
    variants.check_distinct(loaded)
    assert len(names) == count and names[0] == f"{study}:{baseline}"
    first, *others = loaded.values()
    assert len({settings.out for settings in loaded.values()}) == count
    for settings in others:
        changed = differing(first, settings)
        assert changed and all(any(f"{key}.".startswith(f"{part}.") for part in allowed) for key in changed)
        assert settings.protocols == first.protocols and settings.protocols


@pytest.mark.parametrize("study", STUDIES)
def test_a_studys_page_and_file_have_the_claim_the_command_and_the_table(study):
    page, head = (ROOT / study / "README.md").read_text(), (ROOT / study / "study.yaml").read_text()
    table = Path(recipe.load(recipe.variants(study)[0]).out).parent / "comparison.md"
    assert page.startswith("# ") and "**Claim.**" in page and f"**Table.** `{table}`" in page
    for text in (page, head):
        assert re.search(rf"fmdistill compare {study}\b", text)
    assert all(f"# {part}:" in head for part in ("Claim", "Command", "Cost", "Result"))


def test_the_settings_of_several_methods_are_those_of_the_papers():
    temperatures = [
        recipe.load(f"recipes/studies/sam_mini_weightings:srw_{t}").objective for t in ("0.5", "1", "2", "4")
    ]
    weights = [terms["embedding"]["weighting"] for terms in temperatures]
    assert weights == [{"name": "srw", "temperature": t} for t in (0.5, 1.0, 2.0, 4.0)]
    digits = {name: recipe.load(f"recipes/studies/digits:{name}") for name in ("kd", "dkd", "label", "wsld")}
    assert [*digits["label"].objective] == ["label"] and [*digits["wsld"].objective] == ["label", "teacher"]
    dkd = digits["dkd"].objective
    assert dkd["teacher"]["distance"] == {"name": "dkd", "alpha": 1.0, "beta": 2.0} and dkd["label"]["scale"] == 1.0
    assert digits["wsld"].objective["teacher"]["distance"] == digits["kd"].objective["teacher"]["distance"]
    at = recipe.load("recipes/studies/cifar100_pad:at").objective
    assert [term["distance"]["name"] for term in at.values()] == ["cross_entropy", "at", "at", "at"]
    assert [term.get("warmup", 0) for term in at.values()] == [0, 20, 20, 20]
    masked, trimmed = (recipe.load(f"recipes/studies/codecs:int8_{kind}") for kind in ("masked", "trimmed"))
    assert masked.cache and trimmed.cache and (masked.cache.codec, trimmed.cache.codec) == ("int8", "int8")
    assert (masked.cache.trim, trimmed.cache.trim) == (False, True)

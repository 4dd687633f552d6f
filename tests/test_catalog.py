"""The catalogue is read from source files; here it is compared with the registries and classes themselves."""

import dataclasses
import importlib
import inspect

import pytest

from fmdistill import catalog, recipe
from fmdistill.registry import UserError, resolve
from fmdistill.teachers import FAMILIES, load_family


def registry(kind: str) -> dict:
    module, _, name = catalog.KINDS[kind].registry.partition(":")
    if kind == "teacher":
        return {name: builder for family in FAMILIES for name, builder in load_family(family).teachers.items()}
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_the_components_read_from_source_are_those_of_the_registry(kind):
    table, listed = registry(kind), catalog.components(kind)
    assert [entry.name for entry in listed] == list(table)
    for entry in listed:
        value = resolve(entry.name, table, "test")
        assert (entry.module, entry.attribute) == (value.__module__, value.__name__)
        own = inspect.getdoc(value)
        assert entry.doc == (own or inspect.getdoc(importlib.import_module(entry.module)))
        assert own and entry.summary and "\n" not in entry.summary


@pytest.mark.parametrize("group", catalog.GROUPS)
def test_the_settings_read_from_source_are_the_fields_of_the_class(group):
    fields = dataclasses.fields(getattr(recipe, catalog.GROUPS[group]))
    settings = catalog.group_settings(group)
    assert [setting.name for setting in settings] == [field.name for field in fields]
    for setting, field in zip(settings, fields, strict=True):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        assert (setting.default != "required") == has_default
        assert setting.about or group == "cache" and setting.name == "root"
        assert "Literal" not in setting.type and "None" not in setting.type + setting.default


def test_files_are_listed_with_the_first_sentence_of_their_comment():
    recipes, studies, protocols = map(catalog.files, catalog.FILES)
    assert recipes["recipes/sam/mobilesam.yaml"].startswith("MobileSAM's encoder, distilled as")
    assert "recipes/studies/digits" in studies and "recipes/studies/digits" not in recipes
    assert "eval/cosine.yaml" in protocols
    assert all({**recipes, **studies, **protocols}.values())


def test_a_name_with_any_parents_finds_its_component():
    for address in ("srw", "weighting.srw", "objective.*.weighting.srw", "objective.embedding.weighting.srw"):
        assert [(entry.kind, entry.name) for entry in catalog.find(address)] == [("weighting", "srw")]
    assert [entry.kind for entry in catalog.find("cosine")] == ["distance", "schedule", "evaluator"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("weighting.sr", "unknown name 'sr'. Did you mean 'srw'"),
        ("weightin.srw", "no kind 'weightin'. Did you mean 'weighting'"),
        ("sam_vit_hh", "Did you mean 'teacher.sam_vit_"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(address, message):
    with pytest.raises(UserError, match=message):
        catalog.find(address)


def test_a_sentence_ends_at_a_full_stop_before_a_capital():
    assert catalog.sentence("Reads a, b.\nWrites c.\n\nMore.") == "Reads a, b."
    assert catalog.sentence("Weight 0.5 to 1: half of\nit") == "Weight 0.5 to 1: half of it"

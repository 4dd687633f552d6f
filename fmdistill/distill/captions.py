"""Check, before anything is spent, that a recipe's teacher caches the captions that its objective needs."""

from fmdistill.cache import captions, finished
from fmdistill.distill import objective
from fmdistill.distill.distances import DISTANCES
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, resolve


def check(recipe: Recipe) -> None:
    """Raise a UserError for a term that compares images with captions if the recipe caches none, or if it alters them.

    A teacher of another package is asked only when it is built.
    """
    for name, term in (objective.check(recipe.objective) if recipe.objective else {}).items():
        distance = term.distance["name"]
        if not getattr(resolve(distance, DISTANCES, f"objective.{name}.distance"), "needs_captions", False):
            continue
        where = f"objective.{name}.distance={distance}"
        if recipe.teacher is None or finished.is_live(recipe.teacher) or captions.requested(recipe.teacher) == 0:
            raise UserError(
                f"{where}: compares images with their captions, whose embeddings a CLIP teacher caches with "
                f"teacher.captions=1; set it, or choose another distance"
            )
        for part, value in (("standardize", term.standardize), ("rectify", term.rectify)):
            if value not in ("none", None):
                raise UserError(
                    f"objective.{name}.{part}: distance {distance} compares the embeddings with those of texts, which "
                    f"it leaves as they are; remove `{part}`"
                )

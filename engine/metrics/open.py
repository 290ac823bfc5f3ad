"""Which evaluator measures a recipe?"""

from collections.abc import Callable

from engine.metrics.compared import ComparedEvaluator
from engine.metrics.evaluator import Evaluator
from engine.metrics.translation import TranslationEvaluator
from engine.settings import Algorithm, Recipe
from engine.world import Ranks

Measuring = Evaluator | TranslationEvaluator | ComparedEvaluator


def open_evaluator(recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> Measuring:
    """That of generated images for a family that makes them from latent vectors; else that of
    images that each have one to be compared with, themselves for what reconstructs, or of
    translated ones. Raises ValueError naming a setting, and what finding and decoding a dataset
    raise."""
    kind = type(recipe.step)
    if kind.latent_dim is not Algorithm.latent_dim:
        return Evaluator(recipe, ranks, say)
    compared = kind.remade is not Algorithm.remade or kind.reconstruct is not Algorithm.reconstruct
    return (ComparedEvaluator if compared else TranslationEvaluator)(recipe, ranks, say)

"""Which evaluator measures a recipe?"""

from collections.abc import Callable

from engine.algorithm import Algorithm
from engine.metrics.compared import ComparedEvaluator
from engine.metrics.evaluator import Evaluator
from engine.metrics.translation import TranslationEvaluator
from engine.settings import Recipe
from engine.world import Ranks

Measuring = Evaluator | TranslationEvaluator | ComparedEvaluator


def open_evaluator(recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> Measuring:
    """That of generated images for a family that makes them from latent vectors alone; that of
    translated ones for a family that goes between two domains; else that of held-out images, by
    what each is to be equal to or by the family's own figures. Raises ValueError naming a setting,
    and what finding and decoding a dataset raise."""
    kind = type(recipe.step)
    if kind.sampler is not Algorithm.sampler:
        return Evaluator(recipe, ranks, say)
    translates = kind.translate is not Algorithm.translate and kind.remade is Algorithm.remade
    return (TranslationEvaluator if translates else ComparedEvaluator)(recipe, ranks, say)

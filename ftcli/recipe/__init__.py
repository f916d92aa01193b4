"""What is asked for: the recipe, its schema, and how a file becomes one."""

from ftcli.recipe.load import LoadedRecipe, build_recipe, load_recipe
from ftcli.recipe.schema import Recipe
from ftcli.recipe.section import (
    BUNDLED_TEMPLATES,
    CheckpointSection,
    DataSection,
    DatasetSection,
    EvalSection,
    ModelSection,
    PeftSection,
    QuantizationSection,
    RowsSection,
    Section,
    TokenizerSection,
    TrainSection,
)
from ftcli.recipe.text import compare_recipes, dump_recipe, recipe_json_schema

__all__ = [
    "BUNDLED_TEMPLATES",
    "CheckpointSection",
    "DataSection",
    "DatasetSection",
    "EvalSection",
    "LoadedRecipe",
    "ModelSection",
    "PeftSection",
    "QuantizationSection",
    "Recipe",
    "RowsSection",
    "Section",
    "TokenizerSection",
    "TrainSection",
    "build_recipe",
    "compare_recipes",
    "dump_recipe",
    "load_recipe",
    "recipe_json_schema",
]

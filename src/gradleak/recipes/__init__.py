"""Published experiments, one short file each. RECIPES is the only place where a recipe has a name."""

from gradleak.recipes import fresh_vs_saved

RECIPES = {"fresh-vs-saved": fresh_vs_saved.run}

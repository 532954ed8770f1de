"""mergekit's YAML recipes, on this engine: read strictly, checked whole before any weights are, and merged lazily."""

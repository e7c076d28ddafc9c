"""What `bandpo train` runs: recipes, tasks, models, evaluation and the report (extra: bandpo[train])."""

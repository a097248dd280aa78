"""One self-contained file per method: its models, its scheduler, its pipeline."""

"""One model card template per method (Jinja)."""

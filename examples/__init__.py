"""Scripts and a notebook that a user runs."""

"""Sequence models: one recurrence, trained in parallel over time and served one step per bar."""

"""Structured pruning: which channels a detector can lose (graph), which matter (importance), in which order they go and
how many (order), and the smaller detector (cut)."""

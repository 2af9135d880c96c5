"""Pseudo labels: boxes that teachers found, written as if a person had drawn them.

`merge` is arithmetic on arrays, `thresholds` finds which scores to believe, `label` runs teachers over images.
"""

"""Pseudo labels: boxes that teachers found, written as if a person had drawn them.

`merge` is arithmetic on arrays, `label` runs teachers over images.
"""

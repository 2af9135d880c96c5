"""Teachers of all kinds behind one contract: whatever finds boxes is a `BoxTeacher` (`base`).

`settings` is how a recipe names one, `load` opens it, `check` measures it before anybody learns from it. The kinds have
a module each.
"""

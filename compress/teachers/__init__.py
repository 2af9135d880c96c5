"""Teachers of all kinds behind one contract: everything that finds boxes is a `BoxTeacher` (`base`).

`settings` is how a recipe names one, `load` opens it, `check` measures it before a student learns from it. The kinds
have a module each.
"""

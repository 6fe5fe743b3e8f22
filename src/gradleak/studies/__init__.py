"""Experiments: one short file each, and the engine that runs them.

A study is a question, settings and one cell: `study.py`. `run.py` runs it, here, in processes or on Ray; `catalogue.py` names all
that come with gradleak; `sweep.py` makes one of a file.
"""

"""Benchmarks: cases → contests → rows → figures. ``python -m benchmarks`` is the one entry point.

cases.py has what is measured, as data; suite_*.py make contests of it (peers.py has the rivals); harness.py applies the
gate and makes rows, with timers.py and, for the roofs, roofline.py and formulas.py; runner.py goes through a run, and
earlier_runs.py has what several runs add up to. gpu.py is ``make gpu``, with correctness.py before it and processes.py
to watch over what it starts. compare.py, tables.py, report.py and figures.py read rows.
"""

"""Benchmarks: cases → harness → results/*.csv → the tables of README.md."""

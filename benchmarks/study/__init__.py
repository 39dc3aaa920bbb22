"""A study on a real chat model, SmolLM2-135M-Instruct: every method side by side, from the same triples.

`make study` runs it, `QUICK=1 make study` runs all of it at toy size; docs/study.md has what was found.
"""

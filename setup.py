"""Requirements, package data, and the ahead-of-time build of the op in csrc/.

    pip install -e .                        scripts run from the checkout; the op compiles on first use
    pip install .                           the package alone, importable from anywhere; the op compiles on first use
    pip install --no-build-isolation .      compiles the op now, against the torch that is installed
"""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def extension():
    """The op as an extension, or nothing where it can't or shouldn't be built now."""
    if {"develop", "editable_wheel", "egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}  # an editable install is for people who edit: they get the build on first use, which sees changes
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:  # pip's isolated build has no torch: the op then compiles on first use
        return {}
    sys.path.insert(0, str(ROOT))
    from personality.op import build_arguments, cuda_home, find_cuda

    cuda = bool(torch.version.cuda and cuda_home())
    if cuda and not torch.cuda.is_available():  # on a login node, or for a container: for all cards that torch and the op know
        known = sorted(int(name[3:]) for name in torch.cuda.get_arch_list() if name[3:].isdigit() and int(name[3:]) >= 80)
        every = ";".join(f"{arch // 10}.{arch % 10}" for arch in known or [80]) + "+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or every
    sources, flags, nvcc_flags = build_arguments(cuda)
    kind, links = CUDAExtension if cuda else CppExtension, find_cuda(Path(tempfile.mkdtemp())) if cuda else []
    arguments = {"cxx": flags, "nvcc": nvcc_flags} if cuda else {"cxx": flags}
    return {"ext_modules": [kind("_neurons", [os.path.relpath(source, ROOT) for source in sources], extra_compile_args=arguments,
                                 extra_link_args=links)], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="personality-neurons",
    version="0.2.0",
    description="Find the neurons that carry a Big Five trait in a language model, and set them while it writes",
    python_requires=">=3.10",
    license="Apache-2.0",
    packages=["personality", "personality.csrc", "personality.texts"],  # the op's sources too: an installed package compiles them
    package_dir={"personality.csrc": "csrc"},
    package_data={"personality.csrc": ["*.h", "*.cpp", "*.cu"], "personality.texts": ["*"]},
    entry_points={"vllm.general_plugins": ["personality = personality.vllm:register"]},
    py_modules=[],  # not the scripts: a module named evaluate would be in the way of Hugging Face's
    install_requires=["torch>=2.9", "transformers>=5.17", "accelerate", "gguf>=0.17.1", "safetensors", "datasets", "filelock>=4",
                      "huggingface_hub", "jinja2", "matplotlib", "ninja", "numpy", "packaging", "pandas", "rich", "scipy>=1.15",
                      "setuptools", "tqdm", "tomli; python_version < '3.11'"],
    extras_require={
        "judge": ["openai"], "capability": ["lm_eval"], "norms": ["five-factor-e"], "finetune": ["peft"],
        "bench": ["openai", "datasketch", "py3langid"], "serve": ["transformers>=5.19", "fastapi", "uvicorn", "pydantic>=2"],
        "quantize": ["bitsandbytes", "torchao", "compressed-tensors"],
        # CUDA's compiler, for a torch that is built with CUDA 13
        "cuda": [f"nvidia-{part}>=13,<14" for part in ("cuda-nvcc", "nvvm", "cuda-runtime", "cuda-crt", "cuda-cccl")],
        "test": ["transformers>=5.19", "pytest", "hypothesis", "openai", "five-factor-e", "datasketch", "py3langid", "peft",
                 "fastapi", "uvicorn", "playwright"]},
    **extension(),
)

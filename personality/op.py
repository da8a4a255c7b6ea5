"""Build and load the op, torch.ops.neurons.glu_ (its contract: csrc/neurons.h).

It is registered in C++, so there is no wrapper here. What is no tensor op (build facts, the sketch's bins) is on the extension
module that op() returns. SiteTensors are what it reads and writes at each of a model's sites.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from .store import cache_folder, digest, only_run
from .terminal import UserError, say

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc" if (HERE / "csrc").exists() else HERE.parent / "csrc"  # of an installed package, or of a checkout
SOURCES = ("neurons.cpp", "neurons_cpu.cpp", "neurons_cuda.cu")


def source_digest() -> str:
    content = b"".join((CSRC / name).read_bytes() for name in ("neurons.h", *SOURCES))
    return "v" + hashlib.sha256(content).hexdigest()[:12]  # a C++ token cannot begin with a digit


def build_arguments(cuda: bool) -> tuple[list[str], list[str], list[str]]:
    """(source files, C++ flags, nvcc flags: none without CUDA), for setup.py and the build on first use."""
    # no errno and no trapping: else the compiler may not vectorise comparisons. OpenMP for at::parallel_for, which without
    # it runs on one thread; it is not linked, so that torch's own runtime and threads serve it
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", f"-DNEURONS_SOURCE={source_digest()}"]
    files = [str(CSRC / name) for name in SOURCES]
    if not cuda:
        return files[:2], flags, []
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", "_").replace(" ", "_").replace("+", "")
    if not archs and torch.cuda.is_available():
        archs = "{}.{}".format(*torch.cuda.get_device_capability())
    return files, [*flags, f"-DNEURONS_CUDA=v{archs}"], ["-O3"]


def cuda_home() -> str | None:
    """Where CUDA's compiler is: $CUDA_HOME, that of the nvcc in PATH, where it is installed by default, or NVIDIA's packages on
    PyPI, of torch's major version; one beside which its runtime lies before others, since an nvcc in PATH can be a script that
    calls another."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    spec, major = importlib.util.find_spec("nvidia"), (torch.version.cuda or "").partition(".")[0]
    packaged = [Path(place) / f"cu{major}" for place in (spec.submodule_search_locations if spec else ()) if major]
    in_path = [Path(nvcc).resolve().parent.parent] if (nvcc := shutil.which("nvcc")) else []
    found = [place for place in (*in_path, Path("/usr/local/cuda"), *packaged) if (place / "bin/nvcc").exists()]
    runtime = ("lib*/libcudart.so*", "lib/*/libcudart.so*", "targets/*/lib/libcudart.so*")  # NVIDIA's, Debian's, conda's
    return next((str(place) for place in found if any(any(place.glob(name)) for name in runtime)), str(found[0]) if found else None)


def check_cuda(device) -> None:
    """Raise where the op has no CUDA kernels, and none can be compiled."""
    built = importlib.util.find_spec("_neurons") is not None
    if not (op().cuda if built else cuda_home()):
        version, mend = torch.version.cuda or "13", "pip install -e '.[cuda]'"
        if int(version.partition(".")[0]) < 13:  # which that extra does not bring
            mend = f"install the toolkit of CUDA {version}, or torch for CUDA 13 and then {mend}"
        raise UserError(f"--device {device}: the op needs CUDA's compiler, and nvcc was not found: {mend}, or pass --device cpu")


@functools.cache
def op():
    """Load neurons::glu_, once; returns the extension module. An installed build (`pip install --no-build-isolation .`) is used if
    it was made of these sources; else the op is compiled, and cached."""
    if importlib.util.find_spec("_neurons") is None:
        return compiled()
    import _neurons

    if _neurons.source != source_digest():
        raise UserError(f"the installed build {_neurons.__file__} is of other sources ({_neurons.source}) than {CSRC} "
                        f"({source_digest()}): pip install --no-build-isolation . again, or pip uninstall it")
    say(f"using the installed build of the op, {_neurons.__file__}")
    return _neurons


def compiled():
    # without nvcc check_cuda() says what is missing, if a GPU is to be used
    sources, flags, nvcc_flags = build_arguments(torch.cuda.is_available() and bool(cuda_home()))
    directory = cache_folder(f"build/{digest(source_digest(), torch.__version__, sys.version_info[:2], flags, nvcc_flags)}")
    library, done = directory / "_neurons.so", directory / "done"
    with only_run(directory / "lock.own"):  # two runs at once: the second waits, then finds the build
        if not (done.exists() and library.exists() and done.read_text() == str(library.stat().st_size)):  # else it was cut off
            for left in ("lock", "_neurons.so"):  # torch's own lock, which a killed build leaves behind
                (directory / left).unlink(missing_ok=True)
            takes = "a minute or two" if nvcc_flags else "half a minute"
            say(f"compiling the op (once for this version of torch and of csrc/, {takes}) ...")
            start = time.time()
            build(sources, flags, nvcc_flags, directory)
            done.write_text(str(library.stat().st_size))
            say(f"compiled in {time.time() - start:.0f} s: {library}")
    spec = importlib.util.spec_from_file_location("_neurons", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_cuda(directory: Path) -> list[str]:
    """Have torch's builds use the compiler in cuda_home(), and link with its runtime: linker flags, of a folder that is there."""
    from torch.utils import cpp_extension

    home = cuda_home()
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = home  # where torch has looked already, perhaps in vain
    runtime = next(iter(sorted(Path(home).glob("lib/libcudart.so.*"))), None)
    if runtime and not (directory / "libcudart.so").exists():  # PyPI's package has it under its full name only
        (directory / "libcudart.so").symlink_to(runtime)
    return [f"-L{directory}"]


def find_ninja() -> None:
    """Put pip's ninja in PATH: it is there already only where the environment of this Python is active."""
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join(filter(None, (os.environ.get("PATH"), ninja.BIN_DIR)))


def build(sources: list[str], flags: list[str], nvcc_flags: list[str], directory: Path) -> None:
    from torch.utils import cpp_extension

    find_ninja()
    links = find_cuda(directory) if nvcc_flags else []
    with contextlib.suppress(AttributeError):  # else torch takes it for built where this process has tried before, in a notebook
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop("_neurons", None)
    try:
        cpp_extension.load("_neurons", sources, extra_cflags=flags, extra_cuda_cflags=nvcc_flags, extra_ldflags=links,
                           build_directory=str(directory), is_python_module=False, with_cuda=bool(nvcc_flags))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        text = str(error)
        remedy = "; ".join([line.strip() for line in text.splitlines() if "error: " in line][:3]) or text[-500:]
        if "Python.h" in text:
            remedy = "Python's headers are missing: install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
        elif "ninja" in text.lower() and "install" in text.lower():
            remedy = "pip install ninja"
        elif not shutil.which(os.environ.get("CXX", "c++").split()[0]):
            remedy = "no C++ compiler was found: install g++"
        raise UserError(f"the op could not be compiled: {remedy}") from error


class SiteTensors:
    """What the op takes of each of a model's sites (mlp.Site), zeros at first: each[i] are those of site i, of the (shape, dtype)
    pairs[i] on devices[i]. Where all sites are alike, as in most models, one tensor holds all sites' of a kind, and compiled code
    takes in these: before each call it checks its inputs, and a GPU waits for that. (Inductor writes to parts of an input in place;
    a backend that does not, such as "aot_eager", copies all of it for each site.)"""

    def __init__(self, pairs: list[list[tuple]], devices: list):
        alike = all(of == (pairs[0], devices[0]) for of in zip(pairs, devices))
        if alike:
            self.whole = tuple(torch.zeros((len(pairs), *shape), dtype=dtype, device=devices[0]) for shape, dtype in pairs[0])
            self.each = list(zip(*(tensor.unbind() for tensor in self.whole)))
        else:
            self.whole = ()
            self.each = [tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in of)
                         for of, device in zip(pairs, devices)]
        for tensor in self.whole or (tensor for tensors in self.each for tensor in tensors):
            torch._dynamo.mark_static_address(tensor)  # else compiled code that writes them can't use CUDA graphs

    def at(self, site: int) -> tuple:
        """Those of a site, for the forward that runs."""
        if self.whole and torch.compiler.is_compiling():
            return tuple(tensor[site] for tensor in self.whole)
        return self.each[site]

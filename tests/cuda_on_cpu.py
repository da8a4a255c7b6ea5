"""Run csrc/neurons_cuda.cu on a CPU: what that shows of its kernels, and what not, says cuda_on_cpu.h."""

import ctypes
import os
import re
import subprocess
from pathlib import Path

import torch

from conftest import ROOT

# What is no C++ of g++, and what stands for it.
REWRITTEN = (
    (r"#include <cuda_\w+\.h>\n", ""),
    (r"extern __shared__ .* dynamic\[\];", "unsigned char* const dynamic = cuda_on_cpu::shared;"),
    (r"(\w+(?:<[\w, ]+>)?)<<<(.*), stream>>>\((.*)\);",
     r"cuda_on_cpu::launch((const void*)(void (*)(const Args, const int))(\1), \2, [=] { \1(\3); });"),
    (r'asm volatile\("red\.shared\.add\.u32 \[%0\], 1;" ::"r"\((.*)\)\);', r"cuda_on_cpu::add_shared(\1);"))
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Args(ctypes.Structure):
    """neurons::Args of csrc/neurons.h."""

    _fields_ = [("gate", POINTER), ("up", POINTER), ("tokens", LONG), ("width", LONG), ("gate_stride", LONG), ("up_stride", LONG),
                ("act", INT), ("dtype", INT), ("token_profile", POINTER), ("edit_ptr", POINTER), ("edit_index", POINTER),
                ("edit_value", POINTER), ("profiles", INT), ("capacity", INT), ("groups", INT), ("rings", INT),
                ("token_group", POINTER), ("count", POINTER), ("sketch", POINTER), ("moments", POINTER), ("pending", POINTER)]


def build(folder: Path):
    """The library, of the kernels as they are in csrc/."""
    text = (ROOT / "csrc/neurons_cuda.cu").read_text()
    for pattern, plain in REWRITTEN:
        text, found = re.subn(pattern, plain, text)
        assert found, f"neurons_cuda.cu has nothing like {pattern}"
    source, library = folder / "neurons_cuda_on_cpu.cpp", folder / "neurons_cuda_on_cpu.so"
    source.write_text(f'#include "cuda_on_cpu.h"\n{text}\nextern "C" const char* glu(const neurons::Args* args) {{ '
                      "return neurons::glu_cuda(*args, nullptr); }\n"
                      'extern "C" int size_of_args() { return sizeof(neurons::Args); }\n'
                      'extern "C" void be_card(int processors, int room) {\n'
                      "  cuda_on_cpu::processors = processors, cuda_on_cpu::room = room;\n}\n")
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run([*compiler, "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared",
                    "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", f"-I{Path(__file__).parent}",
                    f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.glu.restype = ctypes.c_char_p
    assert loaded.size_of_args() == ctypes.sizeof(Args), "Args is not what csrc/neurons.h has"
    return loaded


def glu_of(library, processors=132, room=227 * 1024):
    """neurons::glu_ by it, on tensors of the CPU, as on a card of so many multiprocessors and bytes of shared memory a block."""
    def glu_(gate, up, act, token_profile=None, edit_ptr=None, edit_index=None, edit_value=None, token_group=None, count=None,
             sketch=None, moments=None):
        at = lambda tensor: None if tensor is None else tensor.data_ptr()  # noqa: E731
        some = lambda tensor: 0 if tensor is None else len(tensor)  # noqa: E731
        args = Args(at(gate), at(up), *gate.shape, gate.stride(0), 0 if up is None else up.stride(0), act,
                    (torch.float32, torch.bfloat16, torch.float16).index(gate.dtype), at(token_profile), at(edit_ptr),
                    at(edit_index), at(edit_value), some(edit_ptr), some(edit_index), some(count), 1, at(token_group), at(count),
                    at(sketch), at(moments), None)
        library.be_card(processors, room)
        error = library.glu(ctypes.byref(args))
        assert error is None, error

    glu_.library = library
    return glu_

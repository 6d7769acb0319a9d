"""The compiler of clorae.cu, as a command: python fast/compiler.py SOURCE FOLDER."""

import shutil
import sys
from pathlib import Path


def compile_extension(source: str, folder: str) -> None:
    """clorae.cu twice, by nvcc (kernels) and by the C++ compiler (binding), into folder."""
    from torch.utils import cpp_extension
    copies = [shutil.copy(source, Path(folder, name)) for name in ("kernels.cu", "binding.cpp")]
    cpp_extension.load("clorae_kernels", [str(copy) for copy in copies],
                       extra_cflags=["-O2"], extra_cuda_cflags=["-O3"],
                       build_directory=folder, is_python_module=False)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose cuda.py is not NVIDIA's package of that name
    compile_extension(*sys.argv[1:])

"""Compile the fake CANN for the torch_npu of this Python: python build_cann.py FOLDER.

Writes FOLDER/cann in the layout of CANN's toolkit (set_env.sh, lib64, opp, ...). Symbols that torch_npu links against
and that fakecann.c does not have become functions that say their name and fail.
"""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import zlib

HERE = pathlib.Path(__file__).resolve().parent
CANN_SYMBOL = re.compile(r"^(acl|rt|Msprof|Hccl|ge|Adx)[A-Z]\w*$|^aclrt\w+$|^aclmdl\w+$|^aclop\w+$")
ALIASES = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "hcomm", "ascend_hal", "msprofiler")


def checksum():
    """Return a number of the files that are built, by which the tests know an old build."""
    patterns = ("*.c", "*.cpp", "build_cann.py", "requirements.txt", "set_env.sh", "site/*.py")
    files = [path for pattern in patterns for path in sorted(HERE.glob(pattern))]
    return str(zlib.crc32(b"".join(path.read_bytes() for path in files)))


def package_folder(name):
    """Return the folder of the package `name`, which is not imported: without CANN torch_npu cannot be."""
    return pathlib.Path(importlib.util.find_spec(name).submodule_search_locations[0])


def check_build(torch):
    """Leave with a line where torch is a CUDA build, which torch_npu does not work with."""
    if re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE):
        sys.exit("[Error] torch is a CUDA build: pip install torch --index-url https://download.pytorch.org/whl/cpu")


def undefined_symbols(path):
    """Return the names that the shared library `path` wants from others."""
    lines = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in lines.splitlines()}


def compile_library(source, out, *options):
    """Compile one C or C++ file to the shared library `out`."""
    compiler = "g++" if source.suffix == ".cpp" else "gcc"
    command = [
        compiler,
        "-O1",
        "-fPIC",
        "-shared",
        "-Wno-unused",
        "-o",
        out,
        source,
        "-Wl,-soname," + out.name,
        *options,
    ]
    subprocess.run(command, check=True)


def main(folder):
    torch_npu, torch = package_folder("torch_npu"), package_folder("torch")
    check_build(torch)
    cann = pathlib.Path(folder).resolve() / "cann"
    lib = cann / "lib64"
    shutil.rmtree(cann, ignore_errors=True)
    for name in ("lib64", "opp", "runtime", "compiler"):
        (cann / name).mkdir(parents=True)
    wanted = set()
    for library in [torch_npu / "lib/libtorch_npu.so", *torch_npu.glob("_C*.so")]:
        wanted |= {name for name in undefined_symbols(library) if CANN_SYMBOL.match(name)}
    written = set(re.findall(r"\b((?:acl|Hccl)\w+)\(", (HERE / "fakecann.c").read_text()))
    missing = cann / "missing.c"
    fail = 'int {0}(void) {{ fprintf(stderr, "fake CANN: {0} is not emulated\\n"); return 207000; }}\n'
    missing.write_text("#include <stdio.h>\n" + "".join(fail.format(name) for name in sorted(wanted - written)))
    compile_library(HERE / "fakecann.c", lib / "libascendcl.so", missing)
    options = ["-L{}".format(lib), "-Wl,--no-as-needed", "-lascendcl", "-lpthread", "-lrt"]
    compile_library(HERE / "fakehccl.c", lib / "libhccl.so", *options)
    compile_library(HERE / "fakeopapi.c", lib / "libopapi.so")
    for name in ALIASES:
        (lib / "lib{}.so".format(name)).symlink_to("libascendcl.so")
    includes = ["-I{}".format(torch / "include"), "-I{}".format(torch / "include/torch/csrc/api/include")]
    links = ["-L{}".format(torch / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
    compile_library(HERE / "kernels.cpp", lib / "libfake_kernels.so", "-std=c++20", *includes, *options, *links)
    shutil.copytree(HERE / "site", cann / "python")
    shutil.copy(HERE / "set_env.sh", cann / "set_env.sh")
    (cann / "checksum").write_text(checksum())
    print("{} CANN functions fail when called; source {}/set_env.sh".format(len(wanted - written), cann))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

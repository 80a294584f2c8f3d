"""The CUDA sources on a machine without a GPU: they compile, and they match the C++ sources.

test_ops.py tests their results: there they run on the CPU with cuda_emulation.h.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "src" / "ops"
# The operators that have a kernel; linear.h is only for the CPU.
OPERATORS = sorted({path.stem for path in FOLDER.glob("*.*h")
                    if path.with_suffix(".py").is_file()
                    and re.search("^(KERNEL|__global__) ", path.read_text(), re.MULTILINE)})

# The code that Jittor's code operator (code_op.cc) puts around the code that calls our functions.
AROUND = """
namespace call{index} {{
struct CodeOp {{ void jit_run(); std::vector<Var*> _inputs, _outputs; DataMap data; }};
void CodeOp::jit_run() {{
{names}
{call}
}}
}}
"""
START = """
#include <string>
#include <unordered_map>
#include <vector>
typedef long long int64;
typedef int index_t;
typedef int int32;
typedef float float32;
typedef std::unordered_map<std::string, double> DataMap;
struct Var { int64 num; index_t shape[8]; template <class T> T* ptr() { return nullptr; } };
"""


@pytest.fixture(scope="module")
def calls(jittor):
    """The CUDA code that one use of each operator passes to Jittor, by operator:
    {code: [(name, number of dimensions, type) of inputs and outputs]}."""
    import ops
    from ops.native import cuda_file, header

    headers = {header(cuda_file(name)): name for name in OPERATORS}
    found, code = {name: {} for name in OPERATORS}, jittor.code

    def record(shapes, dtypes, inputs, cuda_header=None, cuda_src=None, **others):
        outputs = code(shapes, dtypes, inputs, **others)
        each = outputs if isinstance(shapes, list) else [outputs]
        if cuda_src:
            found[headers[cuda_header]][cuda_src] = [
                (f"{kind}{i}", len(v.shape), v.dtype)
                for kind, some in (("in", inputs), ("out", each)) for i, v in enumerate(some)]
        return outputs

    def floats(*shape):
        return jittor.array(np.ones(shape, np.float32))

    def ints(values):
        return jittor.array(np.int32(values))

    def use(function, *arguments):
        variables = [a for a in arguments if isinstance(a, jittor.Var) and a.dtype == "float32"]
        jittor.grad(function(*arguments).sum(), variables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jittor, "code", record)
        use(ops.cross_entropy, floats(2, 3), ints([0, 1]))
        use(ops.layer_norm, floats(2, 3), floats(3), floats(3), 1e-5)
        use(ops.bias_gelu, floats(2, 3), floats(3))
        use(ops.lora_up, floats(2, 4), floats(4), floats(2, 1), floats(4, 1), 1.0, [0])
        use(ops.dropout, floats(2, 3), 0.5, [1])
        use(ops.causal_attention, floats(3, 3, 1, 2), [3])
        ops.causal_attention(floats(4, 3, 1, 2), [3, 1], [(0, 0), (0, 3)])
        ops.beam_attention(floats(1, 3, 1, 2), floats(1, 3, 1, 2), ints([[0, 1]]), None,
                           ints([[0]]), 1, 1, 1)
        ops.adamw_update(*[floats(3)] * 4, beta1=0.9, beta2=0.9, epsilon=1e-6, step_size=0.1,
                         decay=0.1)
        ops.top_log_probs(floats(2, 3), 1)
    return found


def functions_of(name: str, cuda: bool) -> dict[str, str]:
    """The functions of a file or, for ``cuda``, the kernels: {name: arguments}."""
    from ops.native import text_of

    ours = re.sub(r"^#include <.*", "", text_of(name), flags=re.MULTILINE)
    flags = ["-D__CUDACC__"] if cuda else []
    text = subprocess.run(["g++", "-E", "-P", "-xc++", *flags, "-"], input=ours, check=True,
                          capture_output=True, text=True).stdout
    qualifier = "__global__ " if flags else ""
    found = re.findall(rf"{qualifier}static void (\w+)\(([^)]*)\) \{{", " ".join(text.split()))
    return {name: " ".join(arguments.split()) for name, arguments in found}


def launched_kernels(calls: dict) -> dict[str, str]:
    """{name: arguments} of the launches, such as ``f<64><<<rows, THREADS>>>(y, x);``."""
    return dict(found for code in calls
                for found in re.findall(r"^(\w+)(?:<\d+>)?<<<.+>>>\((.+)\);$", code, re.MULTILINE))


@pytest.mark.parametrize("operator", OPERATORS)
def test_c_and_cuda_take_the_same_arguments(calls, operator):
    from ops.native import cuda_file

    on_cpu = functions_of(f"{operator}.h", cuda=False)
    on_cuda = functions_of(cuda_file(operator), cuda=True)
    launched = launched_kernels(calls[operator])
    assert launched and on_cuda.keys() == launched.keys()
    for name, names in launched.items():
        assert on_cpu[name] == on_cuda[name]
        assert re.findall(r"(\w+)(?:,|$)", on_cuda[name]) == names.split(", ")


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_nvcc_compiles_them(calls, operator, tmp_path):
    from ops.native import cuda_file, text_of

    if not shutil.which("nvcc"):
        pytest.skip("no nvcc; it comes with a CUDA toolkit")
    kernels, units = text_of(cuda_file(operator)), []
    for index, (call, variables) in enumerate(calls[operator].items()):
        names = [f"""
            auto {name} = _{name[:-1]}puts[{name[-1]}];
            auto* __restrict__ {name}_p = {name}->ptr<{dtype}>();
            """ + "".join(f"index_t {name}_shape{j} = {name}->shape[{j}];\n"
                          for j in range(dimensions))
                 for name, dimensions, dtype in variables]
        units.append(AROUND.format(index=index, names="\n".join(names), call=call))
    file = tmp_path / "operator.cu"
    file.write_text("\n".join([kernels, START, *units]))
    for standard in ("14", "17"):  # Jittor uses 14; newer toolkits require 17
        compiled = subprocess.run(
            ["nvcc", f"-std=c++{standard}", "-arch=sm_80", "--use_fast_math", "-ptx", file,
             "-o", tmp_path / "operator.ptx"], capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stdout + compiled.stderr
        entries = (tmp_path / "operator.ptx").read_text().count(".entry")
        assert entries >= len(functions_of(cuda_file(operator), cuda=True))

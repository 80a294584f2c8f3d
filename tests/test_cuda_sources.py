"""The CUDA sources on a machine without a GPU: does nvcc compile them?

What they compute is tested in test_ops.py, where they run on the CPU under cuda_emulation.h.
"""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

# What Jittor's code operator (src/ops/code_op.cc) puts around the code that launches kernels.
AROUND = """
namespace op{index} {{
{kernels}
struct CodeOp {{ void jit_run(); std::vector<Var*> _inputs, _outputs; DataMap data; }};
void CodeOp::jit_run() {{
{names}
{launch}
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


@pytest.fixture()
def sources(jittor, monkeypatch):
    """Every pair of kernels and launch that one use of each operator hands to Jittor, and what it
    hands them: (kernels, launch, [(name, number of dimensions, type) of inputs and outputs])."""
    import ops

    found, code = {}, jittor.code

    def record(shape, dtypes, inputs, cuda_header=None, cuda_src=None, **others):
        outputs = code(shape, dtypes, inputs, **others)
        if cuda_src:
            each = outputs if isinstance(shape, list) else [outputs]
            found[cuda_header, cuda_src] = [
                (name, i, len(v.shape), v.dtype) for name, some in (("in", inputs), ("out", each))
                for i, v in enumerate(some)]
        return outputs

    monkeypatch.setattr(jittor, "code", record)

    def floats(*shape):
        return jittor.array(np.ones(shape, np.float32))

    def ints(values):
        return jittor.array(np.int32(values))

    def use(function, *arguments):
        variables = [a for a in arguments if isinstance(a, jittor.Var) and a.dtype == "float32"]
        jittor.grad(function(*arguments).sum(), variables)

    use(ops.cross_entropy, floats(2, 3), ints([0, 1]))
    use(ops.layer_norm, floats(2, 3), floats(3), floats(3), 1e-5)
    use(ops.bias_gelu, floats(2, 3), floats(3))
    use(ops.lora_up, floats(2, 4), floats(4), floats(2, 1), floats(4, 1), 1.0, [0])
    use(ops.dropout, floats(2, 3), 0.5, 1)
    use(ops.causal_attention, floats(3, 3, 1, 2), [3])
    ops.beam_attention(floats(1, 3, 1, 2), floats(1, 3, 1, 2), ints([[0, 1]]), None, ints([[0]]),
                       1, 1)
    ops.adamw_update(*[floats(3)] * 4, beta1=0.9, beta2=0.9, epsilon=1e-6, step_size=0.1,
                     decay=0.1)
    ops.top_log_probs(floats(2, 3), 1)
    return found


def test_nvcc_compiles_them(sources, tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc; it comes with a CUDA toolkit")
    assert len(sources) == 16
    includes, units = set(), []
    for index, ((kernels, launch), variables) in enumerate(sources.items()):
        lines = kernels.splitlines()
        includes.update(line for line in lines if line.startswith("#include"))
        names = [f"""
            auto {name}{i} = _{name}puts[{i}];
            auto* __restrict__ {name}{i}_p = {name}{i}->ptr<{dtype}>();
            """ + "".join(f"index_t {name}{i}_shape{j} = {name}{i}->shape[{j}];\n"
                          for j in range(dimensions))
                 for name, i, dimensions, dtype in variables]
        units.append(AROUND.format(
            index=index, launch=launch, names="\n".join(names),
            kernels="\n".join(line for line in lines if not line.startswith("#include"))))
    file = tmp_path / "operators.cu"
    file.write_text("\n".join([*sorted(includes), START, *units]))
    for standard in ("14", "17"):  # Jittor's own, and what newer toolkits ask for
        compiled = subprocess.run(
            ["nvcc", f"-std=c++{standard}", "-arch=sm_80", "--use_fast_math", "-ptx", file,
             "-o", tmp_path / "operators.ptx"], capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stdout + compiled.stderr
        assert (tmp_path / "operators.ptx").read_text().count(".entry") >= len(sources)

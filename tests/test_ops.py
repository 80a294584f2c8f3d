"""Each operator compared with NumPy in float64 and its ``plain_`` version, forward and backward.

Each test runs twice: natively on this device, and with the text of the CUDA kernels on the CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_emulation import toolkit


@pytest.fixture(scope="module", params=["native", "emulated CUDA"])
def ops(request, jittor, emulation_folder):
    import ops

    if request.param == "native":
        yield ops
        return
    if jittor.flags.use_cuda:
        pytest.skip("the emulation is for machines without a GPU")
    code, library = jittor.code, toolkit.load(emulation_folder)
    header = f"{toolkit.kernel_header()}\n#define __CUDACC__\n"

    def emulated(*arguments, cuda_header=None, cuda_src=None, **on_cpu):
        if cuda_src:
            on_cpu.update(cpu_header=header + cuda_header, cpu_src=toolkit.with_calls(cuda_src))
        return code(*arguments, **on_cpu)

    before = toolkit.counts(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jittor, "code", emulated)
        yield ops
    assert toolkit.counts(library)["launches"] > before["launches"]


def numerical_gradient(f, x: np.ndarray) -> np.ndarray:
    """The gradient of a scalar function by central differences in float64."""
    gradient, step = np.zeros_like(x), 1e-6 * max(1.0, np.abs(x).max())
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + step
        above = f(x)
        x[i] = kept - step
        gradient[i] = (above - f(x)) / (2 * step)
        x[i] = kept
    return gradient


def close(ours, truth, tolerance):
    """Asserts equal shapes and a small difference relative to the largest value (or 0.01)."""
    ours, truth = np.asarray(ours), np.asarray(truth)
    assert ours.shape == truth.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - truth).max() <= tolerance * max(np.abs(truth).max(), 0.01)


@pytest.fixture(scope="module")
def agree(jittor):
    """Compares ``fused`` with ``plain`` and with ``truth``, a NumPy function or None, at float
    arguments: the value, and the gradients of the value times a random tensor."""
    def check(fused, plain, truth, *arguments, tolerance=2e-5):
        random = np.random.default_rng(0)
        variables = [jittor.array(a.astype(np.float32)) for a in arguments]
        exact = [v.numpy().astype(np.float64) for v in variables]
        upstream = random.normal(size=fused(*variables).shape).astype(np.float32)
        results = []
        for function in (fused, plain):
            y = function(*variables)
            gradients = jittor.grad((y * jittor.array(upstream)).sum(), variables)
            results.append([y.numpy(), *(g.numpy() for g in gradients)])
        if truth is not None:
            expected = [truth(*exact)]
            for i in range(len(exact)):
                def loss(x, i=i):
                    return (truth(*exact[:i], x, *exact[i + 1:]) * upstream).sum()
                expected.append(numerical_gradient(loss, exact[i].copy()))
            results.append(expected)
        for ours in results[1:]:
            for a, b in zip(results[0], ours):
                close(a, b, tolerance)
    return check


def cross_entropy(logits, target, smooth):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -(1 - smooth) * log_p[np.arange(len(target)), target] - smooth * log_p.mean(axis=1)


@pytest.mark.parametrize("rows, vocab", [(1, 2), (1, 33), (5, 17)])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_cross_entropy(ops, jittor, agree, rows, vocab, smooth):
    random = np.random.default_rng(rows + vocab)
    target = random.integers(vocab, size=rows)
    target[0], target[-1] = 0, vocab - 1
    ids = jittor.array(target.astype(np.int32))
    agree(lambda x: ops.cross_entropy(x, ids, smooth),
          lambda x: ops.plain_cross_entropy(x, ids, smooth),
          lambda x: cross_entropy(x, target, smooth), random.normal(scale=3, size=(rows, vocab)))


def test_cross_entropy_of_a_real_vocabulary(ops, jittor, agree):
    random = np.random.default_rng(0)
    ids = jittor.array(np.int32([50256, 0, 17]))
    agree(lambda x: ops.cross_entropy(x, ids, 0.1), lambda x: ops.plain_cross_entropy(x, ids, 0.1),
          None, random.normal(scale=3, size=(3, 50257)))


def test_cross_entropy_of_large_logits(ops, jittor):
    """exp of these logits overflows float32."""
    logits = np.array([[1e4, -1e4, 0.0], [-2e3, -2e3, -2e3], [500.0, 499.0, -500.0]])
    target = np.array([1, 2, 1])
    x = jittor.array(logits.astype(np.float32))
    for function in (ops.cross_entropy, ops.plain_cross_entropy):
        for smooth in (0.0, 0.1):
            loss = function(x, jittor.array(target.astype(np.int32)), smooth)
            close(loss.numpy(), cross_entropy(logits, target, smooth), 1e-6)
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            wanted = p / p.sum(axis=1, keepdims=True) - smooth / 3
            wanted[np.arange(3), target] -= 1 - smooth
            close(jittor.grad(loss.sum(), x).numpy(), wanted, 1e-5)


def layer_norm(x, weight, bias, epsilon=1e-5):
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=1, keepdims=True) + epsilon) * weight + bias


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (4, 15), (3, 33)])
def test_layer_norm(ops, agree, shape):
    random = np.random.default_rng(shape[1])
    agree(lambda *a: ops.layer_norm(*a, 1e-5), lambda *a: ops.plain_layer_norm(*a, 1e-5),
          layer_norm, random.normal(1.0, 2.0, shape), random.normal(1.0, 0.5, shape[1]),
          random.normal(size=shape[1]), tolerance=1e-3 if shape == (1, 1) else 2e-5)


def test_layer_norm_of_a_real_width_and_its_epsilon(ops, jittor, agree):
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(50, 768)), random.normal(1.0, 0.5, 768)
    x[0] = 3.0  # a row whose variance is 0
    agree(lambda *a: ops.layer_norm(*a, 1e-5), lambda *a: ops.plain_layer_norm(*a, 1e-5), None,
          x, weight, random.normal(size=768))
    small = x[1:4, :33] * 1e-3  # the variance is so small that epsilon matters
    one, zero = np.ones(33), np.zeros(33)
    ours = ops.layer_norm(*(jittor.array(a.astype(np.float32)) for a in (small, one, zero)), 1e-3)
    close(ours.numpy(), layer_norm(small, one, zero, 1e-3), 1e-5)


def test_layer_norm_far_from_zero(ops, jittor):
    x = np.random.default_rng(0).normal(1000.0, 1.0, (3, 33)).astype(np.float32)
    one, zero = np.ones(33, np.float32), np.zeros(33, np.float32)
    ours = ops.layer_norm(jittor.array(x), jittor.array(one), jittor.array(zero), 1e-5)
    close(ours.numpy(), layer_norm(x.astype(np.float64), one, zero), 1e-3)


def bias_gelu(x, bias):
    x = x + bias
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 33)])
def test_bias_gelu(ops, agree, shape):
    random = np.random.default_rng(shape[1])
    agree(ops.bias_gelu, ops.plain_bias_gelu, bias_gelu, random.normal(scale=2, size=shape),
          random.normal(size=shape[1]))


def test_bias_gelu_of_large_values(ops, jittor):
    values = np.float32([[-1e4, -100, -20, -5, -1e-3, 0, 1e-3, 5, 20, 100, 1e4]])
    x, bias = jittor.array(values), jittor.zeros(values.shape[1])
    y = ops.bias_gelu(x, bias)
    close(y.numpy(), bias_gelu(values.astype(np.float64), 0.0), 1e-6)
    slope = jittor.grad(y.sum(), x).numpy()[0]
    wanted = [numerical_gradient(lambda v: bias_gelu(v, 0.0).sum(), np.array([v]))[0]
              for v in values[0, 1:-1].astype(np.float64)]
    close(slope[1:-1], wanted, 1e-5)
    assert abs(slope[0]) < 1e-20 and slope[-1] == 1


def lora_up(y, bias, low, lora_B, scaling, columns):
    y, groups = y + bias, len(columns)
    rank, width = lora_B.shape[1], lora_B.shape[0] // groups
    for g, column in enumerate(columns):
        up = lora_B[g * width:(g + 1) * width]
        y[:, column:column + width] += scaling * low[:, g * rank:(g + 1) * rank] @ up.T
    return y


@pytest.mark.parametrize("rows, width, rank, columns, out", [
    (1, 1, 1, [0], 1), (4, 5, 3, [0, 10], 15), (3, 7, 2, [7], 21), (2, 4, 1, [0, 4, 8], 12)])
def test_lora_up(ops, agree, rows, width, rank, columns, out):
    random = np.random.default_rng(out)
    groups = len(columns)
    agree(lambda *a: ops.lora_up(*a, 2.5, columns), lambda *a: ops.plain_lora_up(*a, 2.5, columns),
          lambda *a: lora_up(*a, 2.5, columns), random.normal(size=(rows, out)),
          random.normal(size=out), random.normal(size=(rows, rank * groups)),
          random.normal(size=(width * groups, rank)))


@pytest.mark.parametrize("rows, inner, columns", [(1, 1, 1), (5, 3, 7), (4, 9, 2)])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_matmul(ops, jittor, agree, rows, inner, columns, transpose_a, transpose_b):
    """The plain twin is Jittor's own product, which its tuner hands to the same library."""
    random = np.random.default_rng(rows)

    def flip(x, yes):
        return x.transpose() if yes else x

    agree(lambda a, b: ops.matmul(a, b, transpose_a, transpose_b),
          lambda a, b: jittor.matmul(flip(a, transpose_a), flip(b, transpose_b)),
          lambda a, b: flip(a, transpose_a) @ flip(b, transpose_b),
          flip(random.normal(size=(rows, inner)), transpose_a),
          flip(random.normal(size=(inner, columns)), transpose_b))


def attention(qkv):
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))  # (B, H, T, D)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


def attention_of(lengths):
    """:func:`attention` within each sequence of a packed batch qkv (N, 3, H, D)."""
    ends = np.cumsum(lengths)
    return lambda qkv: np.concatenate([attention(qkv[None, end - length:end])[0]
                                       for length, end in zip(lengths, ends)])


@pytest.mark.parametrize("lengths, heads, depth", [
    ([1], 1, 1), ([1, 1], 2, 3), ([6], 1, 5), ([5, 2, 4], 3, 2)])
def test_causal_attention(ops, agree, lengths, heads, depth):
    qkv = np.random.default_rng(depth).normal(scale=1.5, size=(sum(lengths), 3, heads, depth))
    agree(lambda x: ops.causal_attention(x, lengths),
          lambda x: ops.plain_causal_attention(x, lengths), attention_of(lengths), qkv)


def test_causal_attention_of_a_real_size(ops, agree):
    qkv, lengths = np.random.default_rng(0).normal(size=(140, 3, 3, 64)), [70, 41, 29]
    agree(lambda x: ops.causal_attention(x, lengths),
          lambda x: ops.plain_causal_attention(x, lengths), None, qkv)


@pytest.mark.parametrize("lengths, prefixes, heads, depth", [
    ([3, 1], [(0, 0), (0, 3)], 1, 1),
    ([4, 2, 5, 1, 70, 3], [(0, 0), (0, 4), (0, 4), (0, 0), (11, 12), (1, 3)], 3, 8),
])
def test_causal_attention_behind_a_prefix(ops, jittor, lengths, prefixes, heads, depth):
    """As if each sequence stood alone, its prefix before it."""
    qkv = np.random.default_rng(depth).normal(scale=1.5, size=(sum(lengths), 3, heads, depth))
    sequences = np.split(qkv, np.cumsum(lengths)[:-1])
    truth = np.concatenate([
        attention(np.concatenate([qkv[begin:end], own])[None])[0][end - begin:]
        for own, (begin, end) in zip(sequences, prefixes)])
    for function in (ops.causal_attention, ops.plain_causal_attention):
        close(function(jittor.array(qkv.astype(np.float32)), lengths, prefixes).numpy(), truth,
              1e-5)


def test_causal_attention_of_growing_scores(ops, agree):
    """The CUDA kernel reads 64 keys in each step, and rescales its sums when the largest score
    changes. A head has more numbers than a block has threads (64)."""
    qkv = np.random.default_rng(0).normal(size=(150, 3, 1, 70))
    qkv[:, 1] *= np.arange(150)[:, None, None] / 30
    agree(lambda x: ops.causal_attention(x, [150]), lambda x: ops.plain_causal_attention(x, [150]),
          None, qkv)


def test_causal_attention_of_large_scores(ops, jittor):
    qkv = np.random.default_rng(0).normal(scale=60, size=(9, 3, 2, 8)).astype(np.float32)
    for function in (ops.causal_attention, ops.plain_causal_attention):
        x = jittor.array(qkv)
        y = function(x, [9])
        close(y.numpy(), attention(qkv[None].astype(np.float64))[0], 1e-3)
        assert np.isfinite(jittor.grad(y.sum(), x).numpy()).all()


def test_softmax_gives_no_weight_to_masked_scores(ops, jittor):
    scores = np.float32([[1.0, ops.MASKED, 3.0], [ops.MASKED, -5e3, ops.MASKED]])
    weights = ops.plain_softmax(jittor.array(scores)).numpy()
    assert weights[0, 1] == 0 and weights[1].tolist() == [0, 1, 0]
    close(weights[0, [0, 2]], [1 / (1 + np.e ** 2), 1 / (1 + np.e ** -2)], 1e-6)


@pytest.mark.parametrize("query_len, rows", [([4], [1, 1, 1]), ([1, 5, 3], [6, 6, 6]),
                                             ([2, 7], [3, 6, 1]), ([70, 130], [4, 3])])
def test_beam_attention(ops, jittor, query_len, rows):
    """Rows are dropped, duplicated and reordered; ``rows`` is their number in each step."""
    random = np.random.default_rng(sum(rows))
    heads, depth, steps, widest = 2, 5, len(rows), max(rows)
    prefix = random.normal(size=(sum(query_len), 3, heads, depth)).astype(np.float32)
    ends = np.cumsum(query_len)
    spans = np.stack([ends - query_len, ends], axis=1)
    tokens = [random.normal(size=(n, 3, heads, depth)).astype(np.float32) for n in rows]
    ancestors, stores = np.zeros((0, len(query_len)), np.int32), [None, None]
    for step in range(steps):
        origin = random.integers(len(spans), size=rows[step])
        ancestors = np.concatenate([ancestors[:, origin], np.arange(rows[step])[None]])
        spans = spans[origin]
        given = [jittor.array(a) for a in (tokens[step], prefix, spans.astype(np.int32))]
        past = jittor.array(ancestors.astype(np.int32))
        limits = steps, widest, max(query_len)
        fused, stores[0] = ops.beam_attention(*given, stores[0], past, *limits)
        fused = fused.numpy()
        plain, stores[1] = ops.plain_beam_attention(*given, stores[1], past, *limits)
        for row, (begin, end) in enumerate(spans):
            line = [tokens[s][ancestors[s, row]] for s in range(step + 1)]
            line = np.concatenate([prefix[begin:end], line]).astype(np.float64)
            wanted = attention(line[None])[0, -1]
            close(fused[row], wanted, 2e-5)
            close(plain.numpy()[row], wanted, 2e-5)


# Sizes with and without a remainder in gemm.h: tiles have 6 or 12 rows, panels 16 or 32 columns,
# weight blocks 256 or 128 rows (256 if packed), blocks of x 128 rows (96 for packed weights).
@pytest.mark.parametrize("rows, n_in, n_out", [
    (1, 1, 1), (5, 3, 16), (7, 256, 33), (13, 300, 20), (130, 40, 70), (3, 1100, 50),
    (200, 1100, 330)])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear(ops, jittor, agree, rows, n_in, n_out, transposed):
    random = np.random.default_rng(n_in)
    shape = (n_out, n_in) if transposed else (n_in, n_out)
    x, weight = random.normal(size=(rows, n_in)), random.normal(size=shape)
    bias, residual = random.normal(size=n_out), random.normal(size=(rows, n_out))
    agree(lambda *a: ops.linear(*a, transposed=transposed),
          lambda *a: ops.plain_linear(*a, transposed=transposed), None, x, weight, bias, residual)
    exact = x @ (weight.T if transposed else weight)
    x, weight, bias, residual = (jittor.array(a.astype(np.float32))
                                 for a in (x, weight, bias, residual))
    close(ops.linear(x, weight, transposed=transposed).numpy(), exact, 2e-5)
    packed = ops.pack_weight(weight, transposed)
    plain = ops.linear(x, weight, bias, residual, transposed).numpy()
    close(ops.linear(x, packed).numpy(), exact, 2e-5)
    close(ops.linear(x, packed, bias, residual).numpy(), plain, 2e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("precision, many_rows, tolerance", [
    ("float32", False, 1e-6), ("float32", True, 1e-6), ("bf16", True, 1e-2)])
def test_packed_weight(ops, jittor, precision, many_rows, tolerance, transposed):
    """Gradients, columns and the array of a packed weight beside those of the weight itself."""
    random = np.random.default_rng(1)
    numbers = random.normal(size=(70, 90) if transposed else (90, 70)).astype(np.float32)
    x, bias, residual, upstream = (
        jittor.array(random.normal(size=shape).astype(np.float32))
        for shape in ((40, 90), (70,), (40, 70), (40, 70)))
    weight = jittor.array(numbers)
    packed = ops.pack_weight(weight, transposed, precision, many_rows)
    results = []
    for matrix in (weight, packed):
        y = ops.linear(x, matrix, bias, residual, transposed)
        results.append(jittor.grad((y * upstream).sum(), [x, bias, residual]))
    for plain, ours in zip(*results):
        close(ours.numpy(), plain.numpy(), tolerance)
    array = np.asarray(packed)
    assert packed.shape == array.shape == numbers.shape and packed.size == numbers.size
    columns = array if transposed else array.T
    assert np.array_equal(ops.packed_columns(packed, jittor.array([3, 69, 3])).numpy(),
                          columns[[3, 69, 3]])
    if precision == "float32":
        assert np.array_equal(array, numbers)
    else:
        assert np.abs(array / numbers - 1).max() <= 2 ** -8  # half of bfloat16's last place


@pytest.mark.parametrize("packed, many_rows", [(False, False), (True, False), (True, True)])
def test_linear_repeats_itself(ops, jittor, packed, many_rows):
    """Work is assigned to threads in no fixed order; the result must not depend on it."""
    random = np.random.default_rng(0)
    x, weight = (jittor.array(random.normal(size=shape).astype(np.float32))
                 for shape in ((150, 1100), (1100, 900)))
    if packed:
        weight = ops.pack_weight(weight, many_rows=many_rows)
    first = ops.linear(x, weight).numpy()
    assert all(np.array_equal(ops.linear(x, weight).numpy(), first) for _ in range(5))


@pytest.mark.parametrize("vocab, k", [(1, 1), (5, 5), (300, 7), (50257, 10)])
def test_top_log_probs(ops, jittor, vocab, k):
    random = np.random.default_rng(vocab)
    logits = random.normal(scale=5, size=(4, vocab)).astype(np.float32)
    logits[1] = np.round(logits[1])  # of equal values, the lowest token ids are taken
    forbidden = [(0, int(np.argmax(logits[0]))), (2, vocab - 1)] if vocab > 1 else []
    seen = [(3, int(token)) for token in {0, vocab // 2, int(np.argmax(logits[3]))}]
    exact = logits.astype(np.float64)
    for row, token in seen:
        exact[row, token] *= 1.5 if exact[row, token] < 0 else 1 / 1.5
    for row, token in forbidden:
        exact[row, token] = -np.inf
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) \
        + exact.max(1, keepdims=True)
    wanted = np.sort(np.argsort(-exact, axis=1, kind="stable")[:, :k], axis=1)
    for given, function in ((jittor.array(logits), ops.top_log_probs),
                            (logits.copy(), ops.plain_top_log_probs)):
        values, tokens = function(given, k, forbidden, seen, 1.5)
        assert np.array_equal(tokens, wanted)
        assert np.allclose(values, np.take_along_axis(exact, wanted, axis=1), atol=1e-5)


def test_top_log_probs_where_too_few_are_allowed(ops, jittor):
    logits = np.float32([[0.0, 1.0, 2.0, 3.0]])
    forbidden = [(0, 3), (0, 1)]
    for given, function in ((jittor.array(logits), ops.top_log_probs),
                            (logits.copy(), ops.plain_top_log_probs)):
        values, tokens = function(given, 3, forbidden)
        assert tokens.tolist() == [[0, 1, 2]] and np.isneginf(values[0, 1])
        assert np.allclose(values[0, [0, 2]], np.log([1 / (1 + np.e ** 2), 1 / (1 + np.e ** -2)]))


def mask_of(ops, jittor, shape, p, seed):
    return ops.dropout(jittor.ones(shape), p, [seed]).numpy()


def test_dropout_rate_and_scaling(ops, jittor):
    for p in (0.1, 0.5):
        mask = mask_of(ops, jittor, (300, 257), p, 7)
        dropped = (mask == 0)
        assert np.allclose(mask[~dropped], 1 / (1 - p), rtol=1e-6)
        deviation = np.sqrt(p * (1 - p) / mask.size)
        assert abs(dropped.mean() - p) < 4 * deviation
        for axis in (0, 1):  # no row or column is dropped much more than others
            n = mask.shape[axis]
            assert np.abs(dropped.mean(axis=axis) - p).max() < 5 * np.sqrt(p * (1 - p) / n)
    assert (mask_of(ops, jittor, (3, 5), 0.0, 7) == 1).all()


def test_dropout_depends_on_seed_and_position_alone(ops, jittor):
    first = mask_of(ops, jittor, (40, 50), 0.3, 11)
    assert (first == mask_of(ops, jittor, (40, 50), 0.3, 11)).all()
    assert (first.ravel()[:60] == mask_of(ops, jittor, (2, 30), 0.3, 11).ravel()).all()
    x = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    assert np.array_equal(ops.dropout(jittor.array(x), 0.3, [11]).numpy(), x * first)
    for seed in (12, 11 + 2 ** 30):  # independent masks agree where both drop or both keep
        agreeing = ((first == 0) == (mask_of(ops, jittor, (40, 50), 0.3, seed) == 0)).mean()
        assert abs(agreeing - (0.3 ** 2 + 0.7 ** 2)) < 4 * np.sqrt(0.58 * 0.42 / 2000)


def test_dropout_is_the_hash_it_says(ops, jittor):
    """With a fixed hash, masks are the same on every device and with every compiler."""
    h = np.arange(2000, dtype=np.uint32) * np.uint32(0x9E3779B9) ^ np.uint32(2 ** 31 - 1)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    kept = (h >> np.uint32(8)) / 2.0 ** 24 >= 0.3
    assert ((mask_of(ops, jittor, (40, 50), 0.3, 2 ** 31 - 1) != 0).ravel() == kept).all()


def test_dropout_of_parts_is_that_of_each_alone(ops, jittor):
    x = np.random.default_rng(0).normal(size=(11, 50)).astype(np.float32)
    seeds, starts = [3, 8, 3, 5], [0, 1, 6, 9]
    together = ops.dropout(jittor.array(x), 0.3, seeds, starts).numpy()
    alone = [ops.dropout(jittor.array(part), 0.3, [seed]).numpy()
             for part, seed in zip(np.split(x, starts[1:]), seeds)]
    assert np.array_equal(together, np.concatenate(alone))
    with pytest.raises(ValueError, match="1 seeds for 2 parts"):
        ops.dropout(jittor.array(x), 0.3, [3], [0, 4])


@pytest.mark.parametrize("seeds, starts", [([5], [0]), ([5, 6], [0, 3])])
def test_dropout_gradient_has_the_same_mask(ops, jittor, seeds, starts):
    x = jittor.ones((7, 9))
    upstream = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    y = ops.dropout(x, 0.4, seeds, starts)
    gradient = jittor.grad((y * jittor.array(upstream)).sum(), x).numpy()
    assert np.allclose(gradient, y.numpy() * upstream, rtol=1e-6) and (gradient == 0).any()


def test_adamw_update(ops, jittor):
    random = np.random.default_rng(0)
    shape = (37, 11)
    given = [random.normal(size=shape) for _ in range(3)] + [random.uniform(size=shape)]
    rule = dict(beta1=0.9, beta2=0.999, epsilon=1e-6, step_size=0.01, decay=0.003)
    weight, gradient, m, v = given
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient ** 2
    moved = (weight - 0.01 * m / (np.sqrt(v) + 1e-6)) * (1 - 0.003)
    for function in (ops.adamw_update, ops.plain_adamw_update):
        results = function(*(jittor.array(a.astype(np.float32)) for a in given), **rule)
        for ours, wanted in zip(results, (moved, m, v)):
            close(ours.numpy(), wanted, 1e-6)


def test_an_operator_includes_its_file_by_digest(jittor, tmp_path, monkeypatch):
    """Jittor hashes an operator's text at each call, and compiles it again if the text changes."""
    from ops import native

    def header(text: str) -> str:
        (tmp_path / "part.h").write_text(text, encoding="utf-8")
        (tmp_path / "whole.h").write_text('#include "part.h"\n', encoding="utf-8")
        native.text_of.cache_clear()
        native.header.cache_clear()
        return native.header("whole.h")

    monkeypatch.setattr(native, "FOLDER", tmp_path)
    values = []
    for number in (4, 5, 4):
        line = header(f"const int NUMBER = {number};\n")
        assert len(line) < 100
        values.append(jittor.code((1,), "int32", [], cpu_header=line,
                                  cpu_src="out0_p[0] = NUMBER;").item())
    native.text_of.cache_clear()
    native.header.cache_clear()
    assert values == [4, 5, 4]

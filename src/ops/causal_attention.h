// Causal self-attention over whole sequences, and its gradient.
// qkv, dqkv: (tokens, 3, heads, D), the query, key and value of each token; starts:
// (sequences + 1), the first token of each sequence, then tokens; prefixes: (sequences, 2), the
// first and the last-plus-one of the other tokens that a sequence sees before its own, or nullptr;
// y, dy: (tokens, heads, D); log_sums: (tokens, heads), the log of the sum of exp(scores).

#include <cstdint>
#include <vector>

#include "vectors.h"

// A head of one sequence in memory of its own, which one thread works on: in qkv, the rows of a
// head are kilobytes apart, and a first-level cache can hold only a few of those at once.
enum Piece { Q, K, V, Y, DY, DQ, DK, DV };
template <int D> struct Head {
    const int T;
    std::vector<float> numbers;  // (pieces, T, D)
    Head(int T, int pieces) : T(T), numbers((int64_t)pieces * T * D) {}
    float* operator[](int piece) { return numbers.data() + (int64_t)piece * T * D; }
    // Reads the positions from `begin` to `end`.
    void read(int piece, const float* from, int64_t stride, int begin, int end) {
        for (int t = begin; t < end; t++, from += stride)
            std::copy_n(from, D, (*this)[piece] + t * D);
    }
    // Writes the positions from `begin` on.
    void write(int piece, float* to, int64_t stride, int begin = 0) {
        for (int t = begin; t < T; t++, to += stride) std::copy_n((*this)[piece] + t * D, D, to);
    }
};

// Computes Y and the log_sums of the head's positions from `begin` on; the latter are `heads`
// numbers apart.
template <int D> static void attend(Head<D>& head, int begin, float* log_sums, int heads) {
    const int T = head.T;
    const float scale = 1 / std::sqrt((float)D);
    float *q = head[Q], *k = head[K], *v = head[V], *y = head[Y];
    std::vector<float> p(T);
    for (int i = begin; i < T; i++) {
        inner_rows<D>(p.data(), q + i * D, k, i + 1, scale);
        log_sums[(int64_t)(i - begin) * heads] = softmax(p.data(), i + 1);
        add_rows<D>(y + i * D, p.data(), 1, v, i + 1);
    }
}

// `tokens` is here for the CUDA form, which launches a block for each token.
template <int D>
static void causal_attention(float* y, float* log_sums, const float* qkv, const int* starts,
        const int* prefixes, int tokens, int heads, int sequences) {
    const int C = heads * D;
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < sequences; b++)
        for (int h = 0; h < heads; h++) {
            const int64_t first = starts[b], before = prefixes ? prefixes[2 * b] : 0;
            const int seen = prefixes ? prefixes[2 * b + 1] - before : 0;
            Head<D> head(seen + starts[b + 1] - first, Y + 1);
            for (int i = Q; i <= V; i++) {
                head.read(i, qkv + (before * 3 + i) * C + h * D, 3 * C, 0, seen);
                head.read(i, qkv + (first * 3 + i) * C + h * D, 3 * C, seen, head.T);
            }
            attend(head, seen, log_sums + first * heads + h, heads);
            head.write(Y, y + first * C + h * D, C, seen);
        }
}

// Computes DQ, DK and DV from the probabilities p (T, T) and the gradients g of the scores, which
// are p_ij (dp_ij - sum over j of p_ij dp_ij) / sqrt(D). That sum is dy_i y_i (FlashAttention, Dao
// et al., 2022, appendix B). p is computed again from log_sums, so that no (T, T) array has to be
// kept from the forward pass.
template <int D> static void differentiate(Head<D>& head, const float* log_sums, int heads) {
    const int T = head.T;
    const float scale = 1 / std::sqrt((float)D);
    float *q = head[Q], *k = head[K], *v = head[V], *y = head[Y], *dy = head[DY];
    float *dq = head[DQ], *dk = head[DK], *dv = head[DV];
    std::vector<float> p(T * T), g(T * T);
    for (int i = 0; i < T; i++) {
        const float lse = log_sums[(int64_t)i * heads], mean = inner(dy + i * D, y + i * D, D);
        float *pi = &p[i * T], *gi = &g[i * T];
        inner_rows<D>(pi, q + i * D, k, i + 1, scale);
        inner_rows<D>(gi, dy + i * D, v, i + 1, 1);
        for (int j = 0; j <= i; j++) {
            pi[j] = std::exp(pi[j] - lse);
            gi[j] = (gi[j] - mean) * pi[j] * scale;
        }
        add_rows<D>(dq + i * D, gi, 1, k, i + 1);
    }
    for (int j = 0; j < T; j++) {
        add_rows<D>(dv + j * D, &p[j * T + j], T, dy + j * D, T - j);
        add_rows<D>(dk + j * D, &g[j * T + j], T, q + j * D, T - j);
    }
}

template <int D>
static void grad_causal_attention(float* dqkv, const float* qkv, const int* starts, const float* y,
        const float* log_sums, const float* dy, int tokens, int heads, int sequences) {
    const int C = heads * D;
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < sequences; b++)
        for (int h = 0; h < heads; h++) {
            const int64_t first = starts[b];
            Head<D> head(starts[b + 1] - first, DV + 1);
            for (int i = Q; i <= V; i++)
                head.read(i, qkv + (first * 3 + i) * C + h * D, 3 * C, 0, head.T);
            head.read(Y, y + first * C + h * D, C, 0, head.T);
            head.read(DY, dy + first * C + h * D, C, 0, head.T);
            differentiate(head, log_sums + first * heads + h, heads);
            for (int i = Q; i <= V; i++)
                head.write(DQ + i, dqkv + (first * 3 + i) * C + h * D, 3 * C);
        }
}

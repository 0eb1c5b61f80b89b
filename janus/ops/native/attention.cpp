// The per-edge terms of the attention's sums and both derivatives; the notation is that of janus/ops/attention.py. An
// edge has logits for each of k nodes, beside each other. Numbers are k, and the cap of the logits (0 for none).
#include "rows.h"

namespace {

// logits, message, u -> weight and value of each node
template <typename T, bool CAPPED>
void terms(const Arguments& call, const double* numbers) {
    const int nodes = static_cast<int>(numbers[0]);
    const T cap = CAPPED ? T(numbers[1]) : T(1);
    const auto logits = call.rows<const T>(0), message = call.rows<const T>(1), u = call.rows<const T>(2);
    const int64_t d = call.width;
    share_rows(call, [=, &call](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const T envelope = call.has(2) ? *u.at(row) : T(1);
            const T* __restrict m = message.at(row);
            for (int node = 0; node < nodes; ++node) {
                const T* __restrict s = logits.at(row) + node * d;
                T *__restrict w = call.rows<T>(3 + 2 * node).at(row), *__restrict y = call.rows<T>(4 + 2 * node).at(row);
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) {
                    w[i] = exponential(CAPPED ? cap * hyperbolic_tangent(s[i] / cap) : s[i]) * envelope;
                    y[i] = w[i] * m[i];
                }
            }
        }
    });
}

// logits, message, u, then of each node the gradients of weight and value -> of logits, message, u
template <typename T, bool CAPPED>
void terms_first(const Arguments& call, const double* numbers) {
    const int nodes = static_cast<int>(numbers[0]), out = 3 + 2 * nodes;
    const T cap = CAPPED ? T(numbers[1]) : T(1);
    const auto logits = call.rows<const T>(0), message = call.rows<const T>(1), u = call.rows<const T>(2);
    const auto of_logits = call.rows<T>(out), of_message = call.rows<T>(out + 1), of_u = call.rows<T>(out + 2);
    const int64_t d = call.width;
    share_rows(call, [=, &call](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const T envelope = call.has(2) ? *u.at(row) : T(1);
            const T* __restrict m = message.at(row);
            T* __restrict ym = of_message.at(row);
            std::fill_n(ym, d, T(0));
            T sum_u = 0;
            for (int node = 0; node < nodes; ++node) {
                const T* __restrict s = logits.at(row) + node * d;
                const T *__restrict gw = call.rows<const T>(3 + 2 * node).at(row);
                const T *__restrict gv = call.rows<const T>(4 + 2 * node).at(row);
                T* __restrict ys = of_logits.at(row) + node * d;
#pragma omp simd reduction(+ : sum_u)
                for (int64_t i = 0; i < d; ++i) {
                    const T tanh = CAPPED ? hyperbolic_tangent(s[i] / cap) : T(0);
                    const T exp = exponential(CAPPED ? cap * tanh : s[i]), slope = T(1) - tanh * tanh;
                    const T turned = (gw[i] + m[i] * gv[i]) * exp;
                    sum_u += turned;
                    ys[i] = turned * envelope * slope;
                    ym[i] += exp * envelope * gv[i];
                }
            }
            if (call.has(2)) *of_u.at(row) = sum_u;
        }
    });
}

// logits, message, u, of each node the gradients of weight and value, v_s, v_m, v_u
//   -> of logits, message and u, and of each node those of the gradients of weight and value
template <typename T, bool CAPPED>
void terms_second(const Arguments& call, const double* numbers) {
    const int nodes = static_cast<int>(numbers[0]), more = 3 + 2 * nodes, out = more + 3;
    const T cap = CAPPED ? T(numbers[1]) : T(0), bend = CAPPED ? T(-2) / cap : T(0);
    const auto logits = call.rows<const T>(0), message = call.rows<const T>(1), u = call.rows<const T>(2);
    const auto v_s = call.rows<const T>(more), v_m = call.rows<const T>(more + 1), v_u = call.rows<const T>(more + 2);
    const auto of_logits = call.rows<T>(out), of_message = call.rows<T>(out + 1), of_u = call.rows<T>(out + 2);
    const int64_t d = call.width;
    share_rows(call, [=, &call](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const T envelope = call.has(2) ? *u.at(row) : T(1), cotangent = call.has(2) ? *v_u.at(row) : T(0);
            const T *__restrict m = message.at(row), *__restrict vm = v_m.at(row);
            T* __restrict ym = of_message.at(row);
            std::fill_n(ym, d, T(0));
            T sum_u = 0;
            for (int node = 0; node < nodes; ++node) {
                const T *__restrict s = logits.at(row) + node * d, *__restrict vs = v_s.at(row) + node * d;
                const T *__restrict gw = call.rows<const T>(3 + 2 * node).at(row);
                const T *__restrict gv = call.rows<const T>(4 + 2 * node).at(row);
                T* __restrict ys = of_logits.at(row) + node * d;
                T *__restrict yw = call.rows<T>(out + 3 + 2 * node).at(row);
                T *__restrict yv = call.rows<T>(out + 4 + 2 * node).at(row);
#pragma omp simd reduction(+ : sum_u)
                for (int64_t i = 0; i < d; ++i) {
                    const T tanh = CAPPED ? hyperbolic_tangent(s[i] / cap) : T(0);
                    const T exp = exponential(CAPPED ? cap * tanh : s[i]), slope = T(1) - tanh * tanh;
                    const T h = gw[i] + m[i] * gv[i], turned = vs[i] * slope, vm_g = vm[i] * gv[i];
                    const T p = cotangent + turned * envelope, ep = exp * p;
                    sum_u += (turned * h + vm_g) * exp;
                    // p depends on s as well: c'' = -2 / cap tanh c'
                    ys[i] = (vm_g * envelope + (p + bend * tanh * vs[i] * envelope) * h) * exp * slope;
                    ym[i] += ep * gv[i];
                    yw[i] = ep;
                    yv[i] = exp * vm[i] * envelope + ep * m[i];
                }
            }
            if (call.has(2)) *of_u.at(row) = sum_u;
        }
    });
}

template <typename T>
void attention_value(const Arguments& call, const double* numbers) {
    numbers[1] != 0 ? terms<T, true>(call, numbers) : terms<T, false>(call, numbers);
}

template <typename T>
void attention_first(const Arguments& call, const double* numbers) {
    numbers[1] != 0 ? terms_first<T, true>(call, numbers) : terms_first<T, false>(call, numbers);
}

template <typename T>
void attention_second(const Arguments& call, const double* numbers) {
    numbers[1] != 0 ? terms_second<T, true>(call, numbers) : terms_second<T, false>(call, numbers);
}

}  // namespace

JANUS_KERNEL(attention_value)
JANUS_KERNEL(attention_first)
JANUS_KERNEL(attention_second)

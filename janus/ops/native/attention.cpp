// The attention's sums over the edges of a node and both derivatives; the notation is that of janus/ops/attention.py. An
// edge belongs to a node of each of k kinds and has logits for each, beside each other. Numbers are k, and the cap of the
// logits (0 for none). What is summed by node is zero before.
#include "rows.h"

namespace {

// logits, message, u, index of each kind -> weight and value of each kind
template <typename T, bool CAPPED>
void sums(const Arguments& call, const double* numbers) {
    const int kinds = static_cast<int>(numbers[0]), out = 3 + kinds;
    const T cap = CAPPED ? T(numbers[1]) : T(1);
    const auto logits = call.rows<const T>(0), message = call.rows<const T>(1), u = call.rows<const T>(2);
    const int64_t d = call.width;
    share_channels<T>(call, [=, &call](int64_t begin, int64_t end, int) {
        for (int64_t row = 0; row < call.num_rows; ++row) {
            const T envelope = call.has(2) ? *u.at(row) : T(1);
            const T* __restrict m = message.at(row);
            for (int kind = 0; kind < kinds; ++kind) {
                const int64_t node = call.index(3 + kind)[row];
                const T* __restrict s = logits.at(row) + kind * d;
                T *__restrict w = call.rows<T>(out + 2 * kind).at(node);
                T *__restrict y = call.rows<T>(out + 2 * kind + 1).at(node);
#pragma omp simd
                for (int64_t i = begin; i < end; ++i) {
                    const T weight = exponential(CAPPED ? cap * hyperbolic_tangent(s[i] / cap) : s[i]) * envelope;
                    w[i] += weight;
                    y[i] += weight * m[i];
                }
            }
        }
    });
}

// logits, message, u, index of each kind, gradients of weight and value of each kind -> of logits, message, u
template <typename T, bool CAPPED>
void sums_first(const Arguments& call, const double* numbers) {
    const int kinds = static_cast<int>(numbers[0]), grads = 3 + kinds, out = grads + 2 * kinds;
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
            for (int kind = 0; kind < kinds; ++kind) {
                const int64_t node = call.index(3 + kind)[row];
                const T* __restrict s = logits.at(row) + kind * d;
                const T* __restrict gw = call.rows<const T>(grads + 2 * kind).at(node);
                const T* __restrict gv = call.rows<const T>(grads + 2 * kind + 1).at(node);
                T* __restrict ys = of_logits.at(row) + kind * d;
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

// logits, message, u, v_s, v_m, v_u, index of each kind, gradients of weight and value of each kind
//   -> of logits, message and u, and of the gradients of weight and value of each kind
template <typename T, bool CAPPED>
void sums_second(const Arguments& call, const double* numbers) {
    const int kinds = static_cast<int>(numbers[0]), grads = 6 + kinds, out = grads + 2 * kinds;
    const T cap = CAPPED ? T(numbers[1]) : T(1), bend = CAPPED ? T(-2) / cap : T(0);
    const auto logits = call.rows<const T>(0), message = call.rows<const T>(1), u = call.rows<const T>(2);
    const auto v_s = call.rows<const T>(3), v_m = call.rows<const T>(4), v_u = call.rows<const T>(5);
    const auto of_logits = call.rows<T>(out), of_message = call.rows<T>(out + 1);
    const int64_t d = call.width;
    PartialSums<T> sums_u(call.has(2) ? call.num_rows : 0);
    share_channels<T>(call, [=, &call, &sums_u](int64_t begin, int64_t end, int thread) {
        T* of_u = sums_u.of(thread);
        for (int64_t row = 0; row < call.num_rows; ++row) {
            const T envelope = call.has(2) ? *u.at(row) : T(1), cotangent = call.has(2) ? *v_u.at(row) : T(0);
            const T *__restrict m = message.at(row), *__restrict vm = v_m.at(row);
            T* __restrict ym = of_message.at(row);
            std::fill(ym + begin, ym + end, T(0));
            T sum_u = 0;
            for (int kind = 0; kind < kinds; ++kind) {
                const int64_t node = call.index(6 + kind)[row];
                const T *__restrict s = logits.at(row) + kind * d, *__restrict vs = v_s.at(row) + kind * d;
                const T* __restrict gw = call.rows<const T>(grads + 2 * kind).at(node);
                const T* __restrict gv = call.rows<const T>(grads + 2 * kind + 1).at(node);
                T* __restrict ys = of_logits.at(row) + kind * d;
                T* __restrict yw = call.rows<T>(out + 3 + 2 * kind).at(node);
                T* __restrict yv = call.rows<T>(out + 4 + 2 * kind).at(node);
#pragma omp simd reduction(+ : sum_u)
                for (int64_t i = begin; i < end; ++i) {
                    const T tanh = CAPPED ? hyperbolic_tangent(s[i] / cap) : T(0);
                    const T exp = exponential(CAPPED ? cap * tanh : s[i]), slope = T(1) - tanh * tanh;
                    const T h = gw[i] + m[i] * gv[i], turned = vs[i] * slope, vm_g = vm[i] * gv[i];
                    const T p = cotangent + turned * envelope, ep = exp * p;
                    sum_u += (turned * h + vm_g) * exp;
                    // p depends on s as well: c'' = -2 / cap tanh c'
                    ys[i] = (vm_g * envelope + (p + bend * tanh * vs[i] * envelope) * h) * exp * slope;
                    ym[i] += ep * gv[i];
                    yw[i] += ep;
                    yv[i] += exp * vm[i] * envelope + ep * m[i];
                }
            }
            if (call.has(2)) of_u[row] = sum_u;
        }
    });
    if (call.has(2)) {
        T* of_u = call.rows<T>(out + 2).data;
        std::fill_n(of_u, call.num_rows, T(0));
        sums_u.add_to(of_u);
    }
}

template <typename T>
void attention_sums(const Arguments& call, const double* numbers) {
    numbers[1] != 0 ? sums<T, true>(call, numbers) : sums<T, false>(call, numbers);
}

template <typename T>
void attention_sums_first(const Arguments& call, const double* numbers) {
    numbers[1] != 0 ? sums_first<T, true>(call, numbers) : sums_first<T, false>(call, numbers);
}

template <typename T>
void attention_sums_second(const Arguments& call, const double* numbers) {
    numbers[1] != 0 ? sums_second<T, true>(call, numbers) : sums_second<T, false>(call, numbers);
}

}  // namespace

JANUS_KERNEL(attention_sums)
JANUS_KERNEL(attention_sums_first)
JANUS_KERNEL(attention_sums_second)

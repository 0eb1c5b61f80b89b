// SiLU and its derivatives. The columns of x are k parts, whose values and gradients are tensors of their own. Number: k.
#include "rows.h"

namespace {

// x -> value of each part
template <typename T>
void silu_value(const Arguments& call, const double* numbers) {
    const int parts = static_cast<int>(numbers[0]);
    const auto x = call.rows<const T>(0);
    const int64_t d = call.width;
    share_rows(call, [=, &call](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            for (int part = 0; part < parts; ++part) {
                const T* __restrict a = x.at(row) + part * d;
                T* __restrict y = call.rows<T>(1 + part).at(row);
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) y[i] = a[i] * sigmoid(a[i]);
            }
        }
    });
}

// x, gradient of each part -> gradient of x
template <typename T>
void silu_first(const Arguments& call, const double* numbers) {
    const int parts = static_cast<int>(numbers[0]);
    const auto x = call.rows<const T>(0);
    const auto of_x = call.rows<T>(1 + parts);
    const int64_t d = call.width;
    share_rows(call, [=, &call](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            for (int part = 0; part < parts; ++part) {
                const T *__restrict a = x.at(row) + part * d, *__restrict g = call.rows<const T>(1 + part).at(row);
                T* __restrict y = of_x.at(row) + part * d;
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) {
                    const T s = sigmoid(a[i]);
                    y[i] = g[i] * s * (T(1) + a[i] * (T(1) - s));
                }
            }
        }
    });
}

// x, gradient g of each part, cotangent v -> gradients of <v, g silu'(x)> for x and for each part of g
template <typename T>
void silu_second(const Arguments& call, const double* numbers) {
    const int parts = static_cast<int>(numbers[0]);
    const auto x = call.rows<const T>(0), cotangent = call.rows<const T>(1 + parts);
    const auto of_x = call.rows<T>(2 + parts);
    const int64_t d = call.width;
    share_rows(call, [=, &call](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            for (int part = 0; part < parts; ++part) {
                const T *__restrict a = x.at(row) + part * d, *__restrict v = cotangent.at(row) + part * d;
                const T* __restrict g = call.rows<const T>(1 + part).at(row);
                T *__restrict y = of_x.at(row) + part * d, *__restrict z = call.rows<T>(3 + parts + part).at(row);
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) {
                    const T s = sigmoid(a[i]), rest = T(1) - s;
                    y[i] = v[i] * g[i] * s * rest * (T(2) + a[i] - T(2) * a[i] * s);
                    z[i] = v[i] * s * (T(1) + a[i] * rest);
                }
            }
        }
    });
}

}  // namespace

JANUS_KERNEL(silu_value)
JANUS_KERNEL(silu_first)
JANUS_KERNEL(silu_second)

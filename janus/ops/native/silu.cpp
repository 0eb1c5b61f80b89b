// The derivatives of SiLU.
#include "rows.h"

namespace {

// x, grad, cotangent -> gradients of <cotangent, grad silu'(x)> for x and for grad
template <typename T>
void silu_second(const Arguments& call, const double*) {
    const auto x = call.rows<const T>(0), grad = call.rows<const T>(1), cotangent = call.rows<const T>(2);
    const auto of_x = call.rows<T>(3), of_grad = call.rows<T>(4);
    share_rows(call, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const T *__restrict a = x.at(row), *__restrict g = grad.at(row), *__restrict v = cotangent.at(row);
            T *__restrict y = of_x.at(row), *__restrict z = of_grad.at(row);
#pragma omp simd
            for (int64_t i = 0; i < call.width; ++i) {
                const T s = sigmoid(a[i]), rest = T(1) - s;
                y[i] = v[i] * g[i] * s * rest * (T(2) + a[i] - T(2) * a[i] * s);
                z[i] = v[i] * s * (T(1) + a[i] * rest);
            }
        }
    });
}

}  // namespace

JANUS_KERNEL(silu_second)

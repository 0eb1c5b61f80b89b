// Rows gathered from several places and added, in one pass.
#include "rows.h"

namespace {

// Numbers: how many parts k. Tensors: k of values, then k of indices (int64; null for a row of its own), then the sum.
template <typename T>
void gathered_sum(const Arguments& call, const double* numbers) {
    const int parts = static_cast<int>(numbers[0]);
    const auto out = call.rows<T>(2 * parts);
    share_rows(call, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            T* __restrict y = out.at(row);
            for (int part = 0; part < parts; ++part) {
                const auto* index = static_cast<const int64_t*>(call.tensors[parts + part]);
                const T* __restrict x = call.rows<const T>(part).at(index == nullptr ? row : index[row]);
                if (part == 0) {
                    std::copy_n(x, call.width, y);
                } else {
#pragma omp simd
                    for (int64_t i = 0; i < call.width; ++i) y[i] += x[i];
                }
            }
        }
    });
}

}  // namespace

JANUS_KERNEL(gathered_sum)

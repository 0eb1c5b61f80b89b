// Sums over the rows of a segment, and rows gathered from several places and added, in one pass each.
#include "rows.h"

namespace {

// rows, index of each (int64) -> sums by index, zero before
template <typename T>
void segment_sum(const Arguments& call, const double*) {
    const auto x = call.rows<const T>(0);
    const auto out = call.rows<T>(2);
    const int64_t* index = call.index(1);
    const int64_t num_rows = call.num_rows;
    share_channels<T>(call, [=](int64_t begin, int64_t end, int) {
        for (int64_t row = 0; row < num_rows; ++row) {
            const T* __restrict a = x.at(row);
            T* __restrict y = out.at(index[row]);
#pragma omp simd
            for (int64_t i = begin; i < end; ++i) y[i] += a[i];
        }
    });
}

// Numbers: how many parts k. Tensors: k of values, then k of indices (int64; null for a row of its own), then the sum.
template <typename T>
void gathered_sum(const Arguments& call, const double* numbers) {
    const int parts = static_cast<int>(numbers[0]);
    const auto out = call.rows<T>(2 * parts);
    share_rows(call, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            T* __restrict y = out.at(row);
            for (int part = 0; part < parts; ++part) {
                const int64_t* index = call.index(parts + part);
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

JANUS_KERNEL(segment_sum)
JANUS_KERNEL(gathered_sum)

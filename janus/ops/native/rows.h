// What the kernels share: how rows are given, how threads divide them, and exponentials that compilers vectorise.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// A tensor (N, width): channels lie beside each other, rows may be apart, as in half of a product.
template <typename T>
struct Rows {
    T* data;
    int64_t stride;
    T* at(int64_t row) const { return data + row * stride; }
};

// All arguments of a kernel: tensors by address and row stride, in the order that its function in Python has.
struct Arguments {
    int64_t num_rows, width;
    void* const* tensors;
    const int64_t* strides;

    template <typename T>
    Rows<T> rows(int which) const { return {static_cast<T*>(tensors[which]), strides[which]}; }
    const int64_t* index(int which) const { return static_cast<const int64_t*>(tensors[which]); }
    bool has(int which) const { return tensors[which] != nullptr; }
};

constexpr int64_t kSmall = 1 << 14;  // numbers for which waking a second thread costs more than it gains

// Calls body(first row, end, number of the thread) on every thread with an even share of the rows.
template <typename Body>
void share_rows(const Arguments& call, const Body& body) {
#pragma omp parallel if (call.num_rows * call.width > kSmall)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        body(call.num_rows * thread / threads, call.num_rows * (thread + 1) / threads, static_cast<int>(thread));
    }
}

// Calls body(first channel, end, number of the thread) on every thread with a share of the channels, whole cache lines,
// for all rows: what several rows add to belongs to one thread, and is added in the order of the rows whatever the number
// of threads. More threads than lines have nothing to do.
template <typename T, typename Body>
void share_channels(const Arguments& call, const Body& body) {
    const int64_t line = 64 / sizeof(T), lines = (call.width + line - 1) / line;
    const int most = static_cast<int>(std::clamp<int64_t>(lines, 1, omp_get_max_threads()));
#pragma omp parallel if (call.num_rows * call.width > kSmall) num_threads(most)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        body(
            lines * thread / threads * line, std::min(lines * (thread + 1) / threads * line, call.width),
            static_cast<int>(thread)
        );
    }
}

// Sums over rows: a part for each thread, added in the order of the threads, so that the same bits come out each time.
template <typename T>
class PartialSums {
  public:
    explicit PartialSums(int64_t size) : size_(size), parts_(size * omp_get_max_threads(), T(0)) {}
    T* of(int thread) { return parts_.data() + size_ * thread; }
    void add_to(T* total) const {
        for (int64_t i = 0; i < static_cast<int64_t>(parts_.size()); ++i) total[i % size_] += parts_[i];
    }

  private:
    int64_t size_;
    std::vector<T> parts_;
};

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2. Beyond the bounds, which are close to those of the format, x is cut off.
template <typename T>
struct Exponential;

template <>
struct Exponential<float> {
    using Integer = int32_t;
    static constexpr float kLowest = -87.0f, kHighest = 88.0f, kShift = 12582912.0f;  // 1.5 * 2^23
    static constexpr float kLog2Upper = 0.693359375f, kLog2Lower = -2.12194440e-4f;
    static constexpr int kMantissa = 23, kBias = 127;
    // (exp(r) - 1 - r) / r^2 with the coefficients of the Cephes library
    static float series(float r) {
        float p = 1.9875691500e-4f;
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        return p * r + 5.0000001201e-1f;
    }
};

template <>
struct Exponential<double> {
    using Integer = int64_t;
    static constexpr double kLowest = -708.0, kHighest = 709.0, kShift = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double kLog2Upper = 6.93145751953125e-1, kLog2Lower = 1.42860682030941723212e-6;
    static constexpr int kMantissa = 52, kBias = 1023;
    // Taylor's, whose next term is below a unit in the last place
    static double series(double r) {
        double p = 1.0 / 6227020800.0;
        p = p * r + 1.0 / 479001600.0;
        p = p * r + 1.0 / 39916800.0;
        p = p * r + 1.0 / 3628800.0;
        p = p * r + 1.0 / 362880.0;
        p = p * r + 1.0 / 40320.0;
        p = p * r + 1.0 / 5040.0;
        p = p * r + 1.0 / 720.0;
        p = p * r + 1.0 / 120.0;
        p = p * r + 1.0 / 24.0;
        p = p * r + 1.0 / 6.0;
        return p * r + 0.5;
    }
};

// 2^n and exp(r) - 1. A NaN stays one.
template <typename T>
inline void split_exponential(T x, T& power, T& rest) {
    using E = Exponential<T>;
    x = x < E::kLowest ? E::kLowest : x;
    x = x > E::kHighest ? E::kHighest : x;
    const T shifted = x * T(1.4426950408889634) + E::kShift;  // the nearest integer is in its last bits
    const T n = shifted - E::kShift;
    const T r = (x - n * E::kLog2Upper) - n * E::kLog2Lower;
    typename E::Integer bits;
    std::memcpy(&bits, &shifted, sizeof(T));
    bits = (bits + E::kBias) << E::kMantissa;
    std::memcpy(&power, &bits, sizeof(T));
    rest = r + r * r * E::series(r);
}

template <typename T>
inline T exponential(T x) {
    T power, rest;
    split_exponential(x, power, rest);
    return power + power * rest;
}

template <typename T>
inline T sigmoid(T x) {
    return T(1) / (T(1) + exponential(-x));
}

// By exp(2 x) - 1, which near zero keeps the precision that 1 - 2 / (exp(2 x) + 1) loses.
template <typename T>
inline T hyperbolic_tangent(T x) {
    T power, rest;
    split_exponential(T(2) * x, power, rest);
    const T less_one = power * rest + (power - T(1));
    return less_one / (less_one + T(2));
}

// A kernel for both number formats, by name, as Python calls it.
#define JANUS_KERNEL(name)                                                                              \
    extern "C" void name##_float(int64_t num_rows, int64_t width, void* const* tensors,                  \
                                 const int64_t* strides, const double* numbers) {                        \
        name<float>(Arguments{num_rows, width, tensors, strides}, numbers);                              \
    }                                                                                                    \
    extern "C" void name##_double(int64_t num_rows, int64_t width, void* const* tensors,                 \
                                  const int64_t* strides, const double* numbers) {                       \
        name<double>(Arguments{num_rows, width, tensors, strides}, numbers);                             \
    }

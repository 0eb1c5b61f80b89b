// SiLU(norm(core)) * sigmoid(norm(gate)) and both derivatives; the notation is that of janus/ops/gated_norm.py. A row
// is read once, and everything between input and output stays in the first cache.
#include "rows.h"

namespace {

template <typename T>
struct Norm {
    const T *weight, *bias;  // bias may be null
    T eps;
    bool center;

    // m(z) and r of a row
    void moments(const T* z, int64_t width, T& mean, T& inverse) const {
        T sum = 0, squares = 0;
        if (center) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += z[i];
        }
        mean = sum / T(width);
        const T m = mean;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += (z[i] - m) * (z[i] - m);
        inverse = T(1) / std::sqrt(squares / T(width) + eps);
    }
};

// Tensors 2 and 3 are weight and bias (2, d); numbers are eps and whether the norm subtracts the mean.
template <typename T>
struct Norms {
    Norm<T> core, gate;
    std::vector<T> no_bias;

    Norms(const Arguments& call, const double* numbers) {
        const int64_t d = call.width;
        const auto weight = call.rows<const T>(2);
        if (!call.has(3)) no_bias.assign(2 * d, T(0));
        const T* bias = call.has(3) ? call.rows<const T>(3).data : no_bias.data();
        const bool center = numbers[1] != 0;
        core = {weight.data, bias, T(numbers[0]), center};
        gate = {weight.data + d, bias + d, T(numbers[0]), center};
    }
};

// core, gate, weight, bias -> y
template <typename T>
void gated_norm_value(const Arguments& call, const double* numbers) {
    const Norms<T> norms(call, numbers);
    const auto core = call.rows<const T>(0), gate = call.rows<const T>(1);
    const auto out = call.rows<T>(4);
    share_rows(call, [&](int64_t begin, int64_t end, int) {
        const int64_t d = call.width;
        const T *__restrict wc = norms.core.weight, *__restrict bc = norms.core.bias;
        const T *__restrict wg = norms.gate.weight, *__restrict bg = norms.gate.bias;
        for (int64_t row = begin; row < end; ++row) {
            const T *__restrict zc = core.at(row), *__restrict zg = gate.at(row);
            T* __restrict y = out.at(row);
            T mc, rc, mg, rg;
            norms.core.moments(zc, d, mc, rc);
            norms.gate.moments(zg, d, mg, rg);
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) {
                const T ac = (zc[i] - mc) * rc * wc[i] + bc[i], ag = (zg[i] - mg) * rg * wg[i] + bg[i];
                // one division for both sigmoids
                y[i] = ac / ((T(1) + exponential(-ac)) * (T(1) + exponential(-ag)));
            }
        }
    });
}

template <typename T, bool AFFINE>
void norm_gradients(const Arguments& call, const double* numbers) {
    const Norms<T> norms(call, numbers);
    const auto core = call.rows<const T>(0), gate = call.rows<const T>(1), grad = call.rows<const T>(4);
    const auto of_core = call.rows<T>(5), of_gate = call.rows<T>(6);
    const int64_t d = call.width;
    PartialSums<T> sums(AFFINE ? 4 * d : 0);
    share_rows(call, [&](int64_t begin, int64_t end, int thread) {
        std::vector<T> scratch(4 * d);
        T *__restrict xc = scratch.data(), *__restrict xg = xc + d, *__restrict qc = xg + d, *__restrict qg = qc + d;
        const T *__restrict wc = norms.core.weight, *__restrict bc = norms.core.bias;
        const T *__restrict wg = norms.gate.weight, *__restrict bg = norms.gate.bias;
        T* __restrict total = sums.of(thread);
        for (int64_t row = begin; row < end; ++row) {
            const T *__restrict zc = core.at(row), *__restrict zg = gate.at(row), *__restrict g = grad.at(row);
            T *__restrict yc = of_core.at(row), *__restrict yg = of_gate.at(row);
            T mc, rc, mg, rg;
            norms.core.moments(zc, d, mc, rc);
            norms.gate.moments(zg, d, mg, rg);
            T sum_c = 0, dot_c = 0, sum_g = 0, dot_g = 0;
#pragma omp simd reduction(+ : sum_c, dot_c, sum_g, dot_g)
            for (int64_t i = 0; i < d; ++i) {
                const T x_c = (zc[i] - mc) * rc, x_g = (zg[i] - mg) * rg;
                const T ac = x_c * wc[i] + bc[i], ag = x_g * wg[i] + bg[i];
                const T sc = sigmoid(ac), sg = sigmoid(ag);
                const T gc = g[i] * sg * sc * (T(1) + ac * (T(1) - sc));
                const T gg = g[i] * ac * sc * sg * (T(1) - sg);
                xc[i] = x_c, xg[i] = x_g, qc[i] = gc * wc[i], qg[i] = gg * wg[i];
                sum_c += qc[i], dot_c += x_c * qc[i], sum_g += qg[i], dot_g += x_g * qg[i];
                if constexpr (AFFINE) {
                    total[i] += gc * x_c, total[d + i] += gg * x_g, total[2 * d + i] += gc, total[3 * d + i] += gg;
                }
            }
            sum_c = norms.core.center ? sum_c / T(d) : T(0), sum_g = norms.gate.center ? sum_g / T(d) : T(0);
            dot_c /= T(d), dot_g /= T(d);
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) {
                yc[i] = rc * (qc[i] - sum_c - xc[i] * dot_c);
                yg[i] = rg * (qg[i] - sum_g - xg[i] * dot_g);
            }
        }
    });
    if (AFFINE) {
        std::vector<T> total(4 * d, T(0));
        sums.add_to(total.data());
        std::copy_n(total.data(), 2 * d, call.rows<T>(7).data);
        std::copy_n(total.data() + 2 * d, 2 * d, call.rows<T>(8).data);
    }
}

// core, gate, weight, bias, grad -> of core, of gate, and (unless null) of weight and bias, (2, d) each
template <typename T>
void gated_norm_first(const Arguments& call, const double* numbers) {
    call.has(7) ? norm_gradients<T, true>(call, numbers) : norm_gradients<T, false>(call, numbers);
}

// core, gate, weight, bias, grad, v_core, v_gate -> of core, gate and grad, and of weight and bias (2, d)
template <typename T>
void gated_norm_second(const Arguments& call, const double* numbers) {
    const Norms<T> norms(call, numbers);
    const auto core = call.rows<const T>(0), gate = call.rows<const T>(1), grad = call.rows<const T>(4);
    const auto v_core = call.rows<const T>(5), v_gate = call.rows<const T>(6);
    const auto of_core = call.rows<T>(7), of_gate = call.rows<T>(8), of_grad = call.rows<T>(9);
    const bool center = norms.core.center;
    const int64_t d = call.width;
    PartialSums<T> sums(4 * d);
    share_rows(call, [&](int64_t begin, int64_t end, int thread) {
        std::vector<T> scratch(6 * d);
        T *__restrict xc = scratch.data(), *__restrict xg = xc + d, *__restrict uc = xg + d, *__restrict ug = uc + d;
        T *__restrict qc = ug + d, *__restrict qg = qc + d;
        const T *__restrict wc = norms.core.weight, *__restrict bc = norms.core.bias;
        const T *__restrict wg = norms.gate.weight, *__restrict bg = norms.gate.bias;
        T* __restrict total = sums.of(thread);
        const T mean = T(1) / T(d);
        for (int64_t row = begin; row < end; ++row) {
            const T *__restrict zc = core.at(row), *__restrict zg = gate.at(row), *__restrict g = grad.at(row);
            const T *__restrict vc = v_core.at(row), *__restrict vg = v_gate.at(row);
            T *__restrict yc = of_core.at(row), *__restrict yg = of_gate.at(row), *__restrict yd = of_grad.at(row);
            T mc, rc, mg, rg;
            norms.core.moments(zc, d, mc, rc);
            norms.gate.moments(zg, d, mg, rg);
            T sum_vc = 0, dot_vc = 0, sum_vg = 0, dot_vg = 0;
#pragma omp simd reduction(+ : sum_vc, dot_vc, sum_vg, dot_vg)
            for (int64_t i = 0; i < d; ++i) {
                xc[i] = (zc[i] - mc) * rc, xg[i] = (zg[i] - mg) * rg;
                sum_vc += vc[i], dot_vc += xc[i] * vc[i], sum_vg += vg[i], dot_vg += xg[i] * vg[i];
            }
            sum_vc = center ? sum_vc * mean : T(0), sum_vg = center ? sum_vg * mean : T(0);
            dot_vc *= mean, dot_vg *= mean;
            T from_xc = 0, from_uc = 0, sum_qc = 0, dot_qc = 0, from_xg = 0, from_ug = 0, sum_qg = 0, dot_qg = 0;
#pragma omp simd reduction(+ : from_xc, from_uc, sum_qc, dot_qc, from_xg, from_ug, sum_qg, dot_qg)
            for (int64_t i = 0; i < d; ++i) {
                const T u_c = rc * (vc[i] - sum_vc - xc[i] * dot_vc), u_g = rg * (vg[i] - sum_vg - xg[i] * dot_vg);
                const T ac = xc[i] * wc[i] + bc[i], ag = xg[i] * wg[i] + bg[i];
                const T sc = sigmoid(ac), sg = sigmoid(ag);
                const T silu = ac * sc, silu_slope = sc * (T(1) + ac * (T(1) - sc)), gate_bend = sg * (T(1) - sg);
                const T p = u_c * wc[i];
                const T core_slope = silu_slope * p, gate_slope = gate_bend * u_g * wg[i];
                const T graded = g[i] * sg, graded_slope = gate_slope * g[i];
                const T gc = silu_slope * graded, gg = gate_bend * silu * g[i];
                // silu''(a) = s (1 - s) (2 + a - 2 a s), sigmoid''(a) = s (1 - s) (1 - 2 s)
                const T kc = sc * (T(1) - sc) * (T(2) + ac - T(2) * silu) * p * graded + silu_slope * graded_slope;
                const T kg = silu * graded_slope * (T(1) - T(2) * sg) + gate_bend * core_slope * g[i];
                yd[i] = core_slope * sg + silu * gate_slope;
                total[i] += gc * u_c + kc * xc[i], total[d + i] += gg * u_g + kg * xg[i];
                total[2 * d + i] += kc, total[3 * d + i] += kg;
                uc[i] = u_c, ug[i] = u_g;
                qc[i] = (kc - gc * rc * dot_vc) * wc[i], qg[i] = (kg - gg * rg * dot_vg) * wg[i];
                from_xc += wc[i] * gc * u_c, from_uc += wc[i] * gc * xc[i], sum_qc += qc[i], dot_qc += xc[i] * qc[i];
                from_xg += wg[i] * gg * u_g, from_ug += wg[i] * gg * xg[i], sum_qg += qg[i], dot_qg += xg[i] * qg[i];
            }
            sum_qc = center ? sum_qc * mean : T(0), sum_qg = center ? sum_qg * mean : T(0);
            const T xc_factor = (dot_qc + from_xc) * mean, xg_factor = (dot_qg + from_xg) * mean;
            from_uc *= mean, from_ug *= mean;
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) {
                yc[i] = rc * (qc[i] - sum_qc - xc[i] * xc_factor - uc[i] * from_uc);
                yg[i] = rg * (qg[i] - sum_qg - xg[i] * xg_factor - ug[i] * from_ug);
            }
        }
    });
    std::vector<T> total(4 * d, T(0));
    sums.add_to(total.data());
    std::copy_n(total.data(), 2 * d, call.rows<T>(10).data);
    std::copy_n(total.data() + 2 * d, 2 * d, call.rows<T>(11).data);
}

}  // namespace

JANUS_KERNEL(gated_norm_value)
JANUS_KERNEL(gated_norm_first)
JANUS_KERNEL(gated_norm_second)

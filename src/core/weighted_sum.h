#pragma once

#include "blocks.h"

namespace fusionbench::ARCH {

template <class E>
void sum_chunk(const WeightedSum& a, Rows<E> rows, size_t count, double* out) {
    constexpr size_t PARTS = LANES / W;  // side by side, so that none waits for itself
    const F64 scale = all(a.scale), divisor = all(a.divisor);
    const bool divide = a.divisor != 1;
    for (size_t i = 0; i < count; i += LANES) {
        F64 first[PARTS], total[PARTS];
        for (size_t part = 0; part < PARTS; ++part) {
            first[part] = rows.base(i + part * W);
            total[part] = F64{};
        }
        for (size_t other = 0; other + 1 < a.in.count; ++other) {
            const F64 coefficient = all(a.coefficients[other]);
            for (size_t part = 0; part < PARTS; ++part)
                total[part] += coefficient * rows.difference(other, i + part * W, first[part]);
        }
        for (size_t part = 0; part < PARTS; ++part) {
            if (divide) total[part] /= divisor;
            store(out + i + part * W, scale * first[part] + total[part]);
        }
    }
}

inline bool weighted_sum(const WeightedSum& a) {
    return with_element(a.in, [&](auto element) {
        using E = decltype(element);
        Memory memory(PITCH * (a.in.count * sizeof(E) + sizeof(double)));
        double* sums = memory.take<double>(PITCH);
        const Rows<E> rows{memory.take<E>(a.in.count * PITCH)};
        bool finite = true;
        for (size_t start = 0; start < a.in.elements; start += CHUNK) {
            const size_t count = least(CHUNK, a.in.elements - start);
            finite &= rows.read(a.in, start, count);
            sum_chunk(a, rows, count, sums);
            finite &= encode(sums, a.out, start, count);
        }
        return finite;
    });
}

}  // namespace fusionbench::ARCH

#pragma once

#include "selection.h"

namespace fusionbench::ARCH {

constexpr size_t PARTS = LANES / W;  // of a sum, which are added up at the very end

// Adds to the sums of `first` times each of COUNT rows from `others` on.
template <size_t COUNT>
void multiply_chunk(const double* first, const double* others, size_t count, double* sums) {
    F64 total[COUNT][PARTS];
    memcpy(&total, sums, sizeof total);
    for (size_t i = 0; i < count; i += LANES)
        for (size_t part = 0; part < PARTS; ++part) {
            const F64 x = load<F64>(first + i + part * W);
            for (size_t k = 0; k < COUNT; ++k) total[k][part] += x * load<F64>(others + k * PITCH + i + part * W);
        }
    memcpy(sums, &total, sizeof total);
}

inline double lane_sum(double* lanes) {
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline void products_chunk(size_t models, const double* values, size_t count, double* gram) {
    constexpr size_t AT_ONCE = W / 2;  // sums of so many fit the registers
    for (size_t a = 0; a < models; ++a) {
        const double* first = values + a * PITCH;
        size_t b = a;
        for (; b + AT_ONCE <= models; b += AT_ONCE)
            multiply_chunk<AT_ONCE>(first, values + b * PITCH, count, gram + (a * models + b) * LANES);
        for (; b < models; ++b) multiply_chunk<1>(first, values + b * PITCH, count, gram + (a * models + b) * LANES);
    }
}

inline bool products(const Products& a) {
    return with_element(a.in, [&](auto element) {
        using E = decltype(element);
        const Selection* s = a.selection;
        const size_t models = a.in.count - (s ? 1 : 0), sums = models * models * LANES;
        Memory memory(sums * sizeof(double) + (s ? Selected<E>::bytes(a.in, *s) : models * PITCH * sizeof(double)));
        double* gram = memory.take<double>(sums);
        memset(gram, 0, sums * sizeof(double));
        bool finite = true;
        const auto each_chunk = [&](const double* values, auto read) {
            for (size_t start = 0; start < a.in.elements; start += CHUNK) {
                const size_t count = least(CHUNK, a.in.elements - start);
                finite &= read(start, count);
                products_chunk(models, values, count, gram);
            }
        };
        if (s) {
            const Selected<E> selected(a.in, *s, nullptr, memory);
            each_chunk(selected.model(0), [&](size_t start, size_t count) { return selected.read(start, count); });
        } else {
            const Rows<double> rows{memory.take<double>(models * PITCH)};
            each_chunk(rows[0], [&](size_t start, size_t count) { return rows.read(a.in, start, count); });
        }
        for (size_t i = 0; i < models; ++i)
            for (size_t j = i; j < models; ++j)
                a.gram[i * models + j] = a.gram[j * models + i] = lane_sum(gram + (i * models + j) * LANES);
        return finite;
    });
}

inline bool sums(const Sums& a) {
    return with_element(a.in, [&](auto element) {
        using E = decltype(element);
        const size_t models = a.in.count - 1;
        Memory memory(2 * models * LANES * sizeof(double) + Selected<E>::bytes(a.in, a.selection));
        double* all = memory.take<double>(models * LANES);
        double* some = memory.take<double>(models * LANES);
        memset(all, 0, models * LANES * sizeof(double));
        memset(some, 0, models * LANES * sizeof(double));
        const Selected<E> selected(a.in, a.selection, nullptr, memory);
        bool finite = true;
        for (size_t start = 0; start < a.in.elements; start += CHUNK) {
            const size_t count = least(CHUNK, a.in.elements - start);
            finite &= selected.read(start, count);
            for (size_t m = 0; m < models; ++m) {
                F64 of_all[PARTS], of_some[PARTS];
                memcpy(&of_all, all + m * LANES, sizeof of_all);
                memcpy(&of_some, some + m * LANES, sizeof of_some);
                for (size_t i = 0; i < count; i += LANES)
                    for (size_t part = 0; part < PARTS; ++part) {
                        of_all[part] += absolute(selected.difference(m, i + part * W));
                        of_some[part] += absolute(load<F64>(selected.model(m) + i + part * W));
                    }
                memcpy(all + m * LANES, &of_all, sizeof of_all);
                memcpy(some + m * LANES, &of_some, sizeof of_some);
            }
        }
        for (size_t m = 0; m < models; ++m) {
            a.all[m] = lane_sum(all + m * LANES);
            a.selected[m] = lane_sum(some + m * LANES);
        }
        return finite;
    });
}

}  // namespace fusionbench::ARCH

#pragma once

#include "selection.h"

namespace fusionbench::ARCH {

constexpr double FEWEST = 1e-8;  // weights that sum to less are not divided by

// Multiplies what is left of them by 1 / chance.
template <class E>
void boost_chunk(const MaskedMerge& a, const Selected<E>& selected, size_t start, size_t count) {
    for (size_t m = 0; m + 1 < a.in.count; ++m)
        for (size_t i = 0; i < count; ++i) {
            const uint64_t chance = selected.by_rank->chance(m, start + i);
            selected.model(m)[i] *= double(ALWAYS) / double(chance ? chance : 1);
        }
}

// N models, or any number where it is 0: their rows follow that of the base.
template <Elect ELECT, Combine COMBINE, size_t N>
void combine_chunk(const MaskedMerge& a, const double* rows, size_t count, double* merged) {
    const size_t models = N ? N : a.in.count - 1;
    const double* weights = a.weights;
    const F64 zero{}, tie = all(a.on_tie != 0 ? 0 : __builtin_inf()), scaling = all(a.scaling);
    for (size_t i = 0; i < count; i += W) {
        const auto value = [&](size_t m) { return load<F64>(rows + (m + 1) * PITCH + i); };
        F64 sum{}, flip{}, threshold{};  // what agrees with the sign is above the threshold, when it is flipped
        if constexpr (ELECT == Elect::none ? COMBINE != Combine::max : true)
#pragma GCC unroll 8
            for (size_t m = 0; m < models; ++m) sum += value(m);
        if constexpr (ELECT == Elect::count) {
            F64 votes{};
#pragma GCC unroll 8
            for (size_t m = 0; m < models; ++m) {
                votes = add_where(less(zero, value(m)), votes, all(1));
                votes = add_where(less(value(m), zero), votes, all(-1));
            }
            sum = select(differ(votes, zero), votes, sum);
        }
        if constexpr (ELECT != Elect::none) {
            flip = (F64)((I64)sum & INT64_MIN);
            threshold = select(less(zero, absolute(sum)), zero, tie);
        }
        const auto agrees = [&](size_t m) { return less(threshold, (F64)((I64)value(m) ^ (I64)flip)); };
        if constexpr (COMBINE == Combine::max) {
            sum = ELECT == Elect::none ? value(0) : only(agrees(0), value(0));
#pragma GCC unroll 8
            for (size_t m = 1; m < models; ++m) {
                const Mask larger = less(absolute(sum), absolute(value(m)));
                sum = select(ELECT == Elect::none ? larger : larger & agrees(m), value(m), sum);
            }
        } else if constexpr (ELECT != Elect::none || COMBINE == Combine::mean) {
            F64 agreed{}, divisor{};
#pragma GCC unroll 8
            for (size_t m = 0; m < models; ++m) {
                const Mask counted = ELECT == Elect::none ? differ(value(m), zero) : agrees(m);
                agreed = m == 0 ? only(counted, value(m)) : add_where(counted, agreed, value(m));
                divisor = m == 0 ? only(counted, all(weights[m])) : add_where(counted, divisor, all(weights[m]));
            }
            if constexpr (ELECT != Elect::none) sum = agreed;
            if constexpr (COMBINE == Combine::mean)
                sum /= select(less(absolute(divisor), all(FEWEST)), all(1), divisor);
        }
        store(merged + i, load<F64>(rows + i) + scaling * sum);
    }
}

using CombineChunk = decltype(&combine_chunk<Elect::none, Combine::sum, 0>);

template <Elect ELECT, Combine COMBINE>
CombineChunk combine_chunk_of(size_t models) {
    constexpr CombineChunk OF[] = {
        combine_chunk<ELECT, COMBINE, 0>, combine_chunk<ELECT, COMBINE, 1>, combine_chunk<ELECT, COMBINE, 2>,
        combine_chunk<ELECT, COMBINE, 3>, combine_chunk<ELECT, COMBINE, 4>, combine_chunk<ELECT, COMBINE, 5>,
        combine_chunk<ELECT, COMBINE, 6>, combine_chunk<ELECT, COMBINE, 7>, combine_chunk<ELECT, COMBINE, 8>,
    };
    return OF[models <= 8 ? models : 0];
}

template <Elect ELECT>
CombineChunk combine_chunk_of(Combine combine, size_t models) {
    switch (combine) {
        case Combine::sum: return combine_chunk_of<ELECT, Combine::sum>(models);
        case Combine::mean: return combine_chunk_of<ELECT, Combine::mean>(models);
        default: return combine_chunk_of<ELECT, Combine::max>(models);
    }
}

inline CombineChunk combine_chunk_of(Elect elect, Combine combine, size_t models) {
    switch (elect) {
        case Elect::none: return combine_chunk_of<Elect::none>(combine, models);
        case Elect::mass: return combine_chunk_of<Elect::mass>(combine, models);
        default: return combine_chunk_of<Elect::count>(combine, models);
    }
}

inline bool masked_merge(const MaskedMerge& a) {
    return with_element(a.in, [&](auto element) {
        using E = decltype(element);
        Memory memory(Selected<E>::bytes(a.in, a.selection) + PITCH * sizeof(double));
        const Selected<E> selected(a.in, a.selection, a.factors, memory);
        double* merged = memory.take<double>(PITCH);
        const CombineChunk combine_chunk = combine_chunk_of(a.elect, a.combine, a.in.count - 1);
        bool finite = true;
        for (size_t start = 0; start < a.in.elements; start += CHUNK) {
            const size_t count = least(CHUNK, a.in.elements - start);
            finite &= selected.read(start, count);
            if (a.selection.exact) boost_chunk(a, selected, start, count);
            combine_chunk(a, selected.base(), count, merged);
            finite &= encode(merged, a.out, start, count);
        }
        return finite;
    });
}

}  // namespace fusionbench::ARCH

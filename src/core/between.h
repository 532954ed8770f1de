#pragma once

#include "histogram.h"

namespace fusionbench::ARCH {

// Adds what of a chunk is from `first` to `last` to what was found; returns how many are above.
inline size_t take_between(const uint32_t* bits, size_t count, uint32_t first, uint32_t last, uint32_t* found,
                           size_t room, int64_t& within) {
    const PairI32 low = PairI32{} + int32_t(first), high = PairI32{} + int32_t(last);
    size_t above = 0, next = size_t(within);
    const bool fits = next + CHUNK + PAIR <= room;  // so that whole vectors may be written
    for (size_t i = 0; i < count; i += PAIR) {
        const PairI32 some = load<PairI32>(bits + i);  // dropped ones are below zero
        unsigned larger = bits_of(some > high), inside = bits_of((some >= low) & (some <= high));
        if (i + PAIR > count) {
            larger &= (1u << (count - i)) - 1;
            inside &= (1u << (count - i)) - 1;
        }
        above += __builtin_popcount(larger);
#ifdef __AVX512F__
        if (fits) {
            _mm512_storeu_si512(found + next, _mm512_maskz_compress_epi32(__mmask16(inside), (__m512i)some));
            next += __builtin_popcount(inside);
            continue;
        }
#endif
        for (; inside != 0; inside &= inside - 1, ++next)
            if (fits || next < room) found[next] = bits[i + __builtin_ctz(inside)];
    }
    within = int64_t(next);
    return above;
}

inline bool between(const Between& a) {
    return with_element(a.in, [&](auto element) {
        using E = decltype(element);
        const size_t models = a.in.count - 1;
        Memory memory(PITCH * (a.in.count * sizeof(E) + sizeof(uint32_t) + sizeof(int64_t)) +
                      (a.selection.by_rank ? ByRank<E>::bytes(a.in, a.selection) : 0));
        std::optional<ByRank<E>> by_rank;
        if (a.selection.by_rank) by_rank.emplace(a.in, a.selection, memory);
        const Rows<E> rows{memory.take<E>(a.in.count * PITCH)};
        uint32_t* bits = memory.take<uint32_t>(PITCH);
        int64_t* kept = memory.take<int64_t>(PITCH);
        bool finite = true;
        for (size_t start = 0; start < a.in.elements; start += CHUNK) {
            const size_t count = least(CHUNK, a.in.elements - start);
            finite &= rows.read(a.in, start, count);
            for (size_t m = 0; m < models; ++m) {
                magnitudes(rows[0], rows[m + 1], count, bits);
                if (a.selection.random) {
                    keep_at_random(a.selection, by_rank, m, start, count, kept);
                    drop(kept, count, bits);
                }
                for (size_t k = m; k < a.bounds * models; k += models)
                    a.above[k] += int64_t(take_between(bits, count, a.first[k], a.last[k], a.found + k * a.room,
                                                       a.room, a.within[k]));
            }
        }
        return finite;
    });
}

}  // namespace fusionbench::ARCH

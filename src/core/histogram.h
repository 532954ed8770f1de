#pragma once

#include "selection.h"

namespace fusionbench::ARCH {

constexpr uint32_t DROPPED = 0x80000000;  // no magnitude has this bit
constexpr size_t HIGH = size_t{1} << (31 - LOW_BITS);
constexpr size_t LOW = size_t{1} << LOW_BITS;

inline void drop(const int64_t* kept, size_t count, uint32_t* bits) {
    for (size_t i = 0; i < count; i += W) {
        const I32 keep = __builtin_convertvector(load<I64>(kept + i), I32);
        store(bits + i, (load<U32>(bits + i) & (U32)keep) | (~(U32)keep & DROPPED));
    }
}

// Counts by the high bits, which are put together and set back to zero in the end.
class HighCounts {
public:
    void count(const uint32_t* bits, size_t count) {
        for (size_t i = 0; i < count; i += PAIR) {
            const PairU32 some = load<PairU32>(bits + i);
            smallest = some - 1 < smallest ? some - 1 : smallest;  // but zero
            largest = (PairI32)some > largest ? (PairI32)some : largest;
        }
        size_t i = 0;
        for (; i + COUNTERS_APART <= count; i += COUNTERS_APART)
            for (size_t k = 0; k < COUNTERS_APART; ++k) ++counters[bits[i + k] >> LOW_BITS][k];
        for (; i < count; ++i) ++counters[bits[i] >> LOW_BITS][0];
    }

    // Far fewer of them than there are were used, which are near each other.
    void add_to(int64_t* counts) {
        uint32_t from = UINT32_MAX, to = 0;
        for (size_t i = 0; i < PAIR; ++i) {
            if (smallest[i] < from) from = smallest[i];
            if (uint32_t(largest[i]) > to) to = largest[i];
        }
        const auto take = [&](size_t bucket) {
            uint32_t sum = 0;
            for (uint32_t& counter : counters[bucket]) sum += counter, counter = 0;
            return sum;
        };
        counts[0] += take(0);
        for (size_t i = from >> LOW_BITS; i <= to >> LOW_BITS; ++i) counts[i] += take(i);
        take(COUNTERS - 1);  // what was dropped
    }

private:
    uint32_t (*counters)[COUNTERS_APART] = zero_counters();
    PairU32 smallest = PairU32{} - 1;
    PairI32 largest{};
};

// Few match: most vectors of them are only looked at.
inline void count_low(const uint32_t* bits, size_t count, uint32_t prefix, int64_t* counts) {
    for (size_t i = 0; i < count; i += PAIR) {
        unsigned same = bits_of(load<PairU32>(bits + i) >> LOW_BITS == prefix);
        if (i + PAIR > count) same &= (1u << (count - i)) - 1;
        for (; same != 0; same &= same - 1) ++counts[bits[i + __builtin_ctz(same)] & (LOW - 1)];
    }
}

// Calls `count_chunk` with the bits of every chunk, of one model's differences or of all models' variances.
template <class E, class Function>
bool each_chunk(const Histogram& a, const std::optional<ByRank<E>>& by_rank, size_t model, Memory memory,
                Function count_chunk) {
    const size_t models = a.in.count - 1;
    const Rows<E> rows{memory.take<E>(a.in.count * PITCH)};
    uint32_t* bits = memory.take<uint32_t>(PITCH);
    int64_t* kept = memory.take<int64_t>(PITCH);
    const Block pair[] = {a.in.blocks[0], a.in.blocks[model + 1]};
    const Blocks read = a.variance ? a.in : Blocks{pair, 2, a.in.elements, a.in.wide};
    bool finite = true;
    for (size_t start = 0; start < a.in.elements; start += CHUNK) {
        const size_t count = least(CHUNK, a.in.elements - start);
        finite &= rows.read(read, start, count);
        if (a.variance) {
            variances(rows, models, count, reinterpret_cast<float*>(bits));
        } else {
            magnitudes(rows[0], rows[1], count, bits);
            if (a.selection.random) {
                keep_at_random(a.selection, by_rank, model, start, count, kept);
                drop(kept, count, bits);
            }
        }
        count_chunk(bits, count);
    }
    return finite;
}

inline bool histogram(const Histogram& a) {
    return with_element(a.in, [&](auto element) {
        using E = decltype(element);
        Memory memory(PITCH * (a.in.count * sizeof(E) + sizeof(uint32_t) + sizeof(int64_t)) +
                      (a.selection.by_rank ? ByRank<E>::bytes(a.in, a.selection) : 0));
        std::optional<ByRank<E>> by_rank;
        if (a.selection.by_rank && !a.variance) by_rank.emplace(a.in, a.selection, memory);
        bool finite = true;
        for (size_t row = 0; row < (a.variance ? 1 : a.in.count - 1); ++row) {
            if (!a.prefixes) {
                HighCounts counts;
                finite &= each_chunk<E>(a, by_rank, row, memory, [&](const uint32_t* bits, size_t n) { counts.count(bits, n); });
                counts.add_to(a.counts + row * HIGH);
                continue;
            }
            const int64_t prefix = a.prefixes[row];
            const bool possible = 0 <= prefix && prefix < int64_t(HIGH);
            finite &= each_chunk<E>(a, by_rank, row, memory, [&](const uint32_t* bits, size_t n) {
                if (possible) count_low(bits, n, uint32_t(prefix), a.counts + row * LOW);
            });
        }
        return finite;
    });
}

}  // namespace fusionbench::ARCH

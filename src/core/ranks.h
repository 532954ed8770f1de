// Elements kept at random, with chances by the ranks of their magnitudes in their rows.
#pragma once

#include "blocks.h"

namespace fusionbench::ARCH {

// SplitMix64: 32 bits for each element, of which any can be had without the others.
class RandomBits {
public:
    RandomBits(uint64_t key, uint64_t index) {
        for (size_t i = 0; i < W; ++i) state[i] = key + (index + i + 1) * STEP;
    }

    // Of the next W elements.
    U64 next() {
        const U64 z = times(state ^ state >> 30, 0xBF58476D1CE4E5B9);
        state += W * STEP;
        const U64 high = high_of_times(z ^ z >> 27, 0x94D049BB133111EB);
        return high ^ high >> 31;
    }

private:
    static constexpr uint64_t STEP = 0x9E3779B97F4A7C15;
    U64 state;
};

template <class E>
void magnitudes(const E* base, const E* model, size_t count, uint32_t* bits) {
    constexpr size_t N = sizeof(E) == 4 ? 2 * W : W;
    for (size_t i = 0; i < count; i += N) {
        const auto difference = load<Vector<E, N>>(model + i) - load<Vector<E, N>>(base + i);
        const auto narrow = __builtin_convertvector(difference, Vector<float, N>);
        store(bits + i, (Vector<uint32_t, N>)narrow & 0x7FFFFFFF);
    }
}

constexpr size_t DIGIT = 11;  // bits by which a pass sorts
constexpr uint32_t VALUES = 1 << DIGIT;

template <size_t D>
uint32_t digit(uint64_t magnitude) { return uint32_t(magnitude) >> D * DIGIT & (VALUES - 1); }

// Sorts by one digit after the other, from the lowest, and equal ones stay in order: no two magnitudes are compared.
inline void rank_row(const uint32_t* bits, size_t columns, uint64_t* first, uint64_t* second, uint32_t* ranks) {
    uint32_t places[3][VALUES] = {};
    for (size_t i = 0; i < columns; ++i) {
        ++places[0][digit<0>(bits[i])];
        ++places[1][digit<1>(bits[i])];
        ++places[2][digit<2>(bits[i])];
    }
    for (auto& of_digit : places) {
        uint32_t next = 0;
        for (uint32_t& place : of_digit) {
            const uint32_t count = place;
            place = next;
            next += count;
        }
    }
    for (size_t i = 0; i < columns; ++i) first[places[0][digit<0>(bits[i])]++] = uint64_t(i) << 32 | bits[i];
    for (size_t i = 0; i < columns; ++i) second[places[1][digit<1>(first[i])]++] = first[i];
    for (size_t i = 0; i < columns; ++i) ranks[second[i] >> 32] = places[2][digit<2>(second[i])]++;
}

// What is kept of the models' differences, each of which has a chance by its rank. Random bits are mostly below the
// chances of all magnitudes as large as this, within some percents, or above: few ranks have to be known.
template <class E>
class ByRank {
public:
    static size_t bytes(const Blocks& in, const Selection& s) {
        const size_t models = in.count - 1, padded = s.columns + PITCH;
        return models * (words(in) * sizeof(uint64_t) + (s.exact ? in.elements * sizeof(uint32_t) : 0)) +
               2 * PITCH * sizeof(E) + padded * (2 * sizeof(uint64_t) + 3 * sizeof(uint32_t) + sizeof(uint16_t)) +
               (BUCKETS + 1) * sizeof(Bucket);
    }

    ByRank(const Blocks& in, const Selection& s, Memory& memory)
        : elements(in.elements), stride(words(in)), columns(s.columns), s(s), kept(memory.take<uint64_t>(stride * (in.count - 1))),
          exact(s.exact ? memory.take<uint32_t>(elements * (in.count - 1)) : nullptr),
          buckets(memory.take<Bucket>(BUCKETS + 1)), first(memory.take<uint64_t>(columns)),
          second(memory.take<uint64_t>(columns)), bits(memory.take<uint32_t>(columns + PITCH)),
          random(memory.take<uint32_t>(columns + PITCH)), ranks(memory.take<uint32_t>(columns)),
          bucket_of(memory.take<uint16_t>(columns + PITCH)) {
        const Rows<E> rows{memory.take<E>(2 * PITCH)};
        for (size_t m = 0; m + 1 < in.count; ++m) {
            const Block pair[] = {in.blocks[0], in.blocks[m + 1]};
            uint64_t word = 0;
            for (size_t row = 0; row < elements; row += columns) {
                for (size_t start = 0; start < columns; start += CHUNK) {
                    const size_t count = least(CHUNK, columns - start);
                    rows.read({pair, 2, elements, in.wide}, row + start, count);
                    magnitudes(rows[0], rows[1], count, bits + start);
                }
                RandomBits stream(s.keys[m], s.offset + row);
                for (size_t i = 0; i < columns; i += W) store(random + i, __builtin_convertvector(stream.next(), U32));
                if (exact) keep_ranked(m, row, word);
                else keep_row(m, row, word);
            }
            kept[m * stride + elements / 64] = word;
        }
    }

    // Of the elements from `i` on, all bits or none.
    I64 is_kept(size_t model, size_t i) const {
        I64 lanes{};
        for (size_t lane = 0; lane < W; ++lane) lanes[lane] = int64_t{1} << lane;
        return (lanes & int64_t(kept[model * stride + i / 64] >> i % 64)) != 0;
    }

    // Of an element, if they are asked for.
    uint64_t chance(size_t model, size_t i) const { return s.by_rank[model][exact[model * elements + i]]; }

private:
    // Magnitudes near each other: how many, and the chances of the first and of the last.
    struct Bucket {
        uint32_t counts[2];
        uint64_t lowest, highest;
    };
    static constexpr unsigned BUCKET_BITS = 9;
    static constexpr size_t BUCKETS = size_t{1} << BUCKET_BITS;
    static constexpr size_t COUNTED = 64;  // ranks in a row, before it is sorted

    size_t elements, stride, columns;
    const Selection& s;
    uint64_t* kept;
    uint32_t* exact;
    Bucket* buckets;
    uint64_t *first, *second;
    uint32_t *bits, *random, *ranks;
    uint16_t* bucket_of;

    static size_t words(const Blocks& in) { return in.elements / 64 + 1; }

    // Sets the bits of a row, which begins within a word that is not complete yet; `keep` says which.
    template <class Keep>
    void put(size_t model, size_t row, uint64_t& word, Keep keep) {
        uint64_t* to = kept + model * stride + row / 64;
        uint64_t bits = word;
        unsigned place = row % 64;
        for (size_t i = 0; i < columns; ++i) {
            bits |= uint64_t(keep(i)) << place;
            if (++place < 64) continue;
            *to++ = bits;
            bits = place = 0;
        }
        word = bits;
    }

    void keep_ranked(size_t model, size_t row, uint64_t& word) {
        uint32_t* of_row = exact + model * elements + row;
        rank_row(bits, columns, first, second, of_row);
        const uint64_t* chances = s.by_rank[model];
        put(model, row, word, [&](size_t i) { return random[i] < chances[of_row[i]]; });
    }

    void keep_row(size_t model, size_t row, uint64_t& word) {
        const uint64_t* chances = s.by_rank[model];
        fill_buckets(chances);
        size_t zeros = 0, counted = 0;
        const Bucket* of = buckets;
        const uint32_t *row_bits = bits, *drawn = random;
        const uint16_t* which = bucket_of;
        put(model, row, word, [=, &zeros, &counted](size_t i) {
            const Bucket& bucket = of[which[i]];
            const uint64_t one = drawn[i];
            const bool zero = row_bits[i] == 0;
            bool keep = one < bucket.lowest;
            if (keep != (one < bucket.highest)) keep = one < chances[zero ? zeros : rank_of(i, counted)];
            zeros += zero;
            return keep;
        });
    }

    // Zeros in the first, and the others by their highest bits.
    void fill_buckets(const uint64_t* chances) {
        uint32_t smallest = UINT32_MAX, largest = 0;
        const size_t columns = this->columns;
        const uint32_t* bits = this->bits;
        uint16_t* bucket_of = this->bucket_of;
        for (size_t i = 0; i < columns; ++i) {
            smallest = bits[i] - 1 < smallest ? bits[i] - 1 : smallest;  // but zero
            largest = bits[i] > largest ? bits[i] : largest;
        }
        unsigned shift = 0;
        while (largest && (largest - 1 - smallest) >> shift >= BUCKETS) ++shift;
        memset(buckets, 0, (BUCKETS + 1) * sizeof(Bucket));
        for (size_t i = 0; i < columns; ++i)
            bucket_of[i] = bits[i] == 0 ? 0 : uint16_t(1 + ((bits[i] - 1 - smallest) >> shift));
        for (size_t i = 0; i < columns; ++i) ++buckets[bucket_of[i]].counts[i % 2];
        size_t before = 0;
        for (size_t b = 0; b <= BUCKETS; ++b) {
            buckets[b].lowest = chances[least(before, columns - 1)];
            before += buckets[b].counts[0] + buckets[b].counts[1];
            buckets[b].highest = chances[before ? before - 1 : 0];
        }
    }

    // How many come before it: counted or, for many, found for all of the row at once.
    __attribute__((noinline)) uint32_t rank_of(size_t one, size_t& asked) {
        if (++asked == COUNTED) rank_row(bits, columns, first, second, ranks);
        if (asked >= COUNTED) return ranks[one];
        uint32_t before = 0;
        for (size_t i = 0; i < one; ++i) before += bits[i] <= bits[one];
        for (size_t i = one + 1; i < columns; ++i) before += bits[i] < bits[one];
        return before;
    }
};

}  // namespace fusionbench::ARCH

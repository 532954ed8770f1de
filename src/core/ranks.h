#pragma once

#include "histogram.h"

namespace fusionbench::ARCH {

constexpr size_t DIGIT = 11;  // bits by which a pass sorts
constexpr uint32_t VALUES = 1 << DIGIT;

template <size_t D>
uint32_t digit(uint64_t magnitude) { return uint32_t(magnitude) >> D * DIGIT & (VALUES - 1); }

// Sorts by one digit after the other, from the lowest, and equal ones stay in order: no two magnitudes are compared.
inline void rank_row(const uint32_t* bits, size_t columns, uint64_t* first, uint64_t* second, int32_t* ranks) {
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

inline void ranks(const Ranks& a) {
    with_element(a.in, [&](auto element) {
        using E = decltype(element);
        Memory memory(2 * PITCH * sizeof(E) + a.columns * (2 * sizeof(uint64_t) + sizeof(uint32_t)) +
                      PITCH * sizeof(uint32_t));
        const Rows<E> rows{memory.take<E>(2 * PITCH)};
        uint64_t* first = memory.take<uint64_t>(a.columns);
        uint64_t* second = memory.take<uint64_t>(a.columns);
        uint32_t* bits = memory.take<uint32_t>(a.columns + PITCH);
        for (size_t row = 0; row < a.in.elements; row += a.columns) {
            for (size_t start = 0; start < a.columns; start += CHUNK) {
                const size_t count = least(CHUNK, a.columns - start);
                rows.read(a.in, row + start, count);
                magnitudes(rows[0], rows[1], count, bits + start);
            }
            rank_row(bits, a.columns, first, second, a.ranks + row);
        }
    });
}

}  // namespace fusionbench::ARCH

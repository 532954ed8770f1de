// What is selected of the models' differences from the base.
#pragma once

#include <optional>

#include "ranks.h"

namespace fusionbench::ARCH {

// All bits set where an element of a model is kept at random; `start` is the chunk's first element in its block.
template <class E>
void keep_at_random(const Selection& s, const std::optional<ByRank<E>>& by_rank, size_t model, size_t start,
                    size_t count, int64_t* kept) {
    if (by_rank) {
        for (size_t i = 0; i < count; i += W) store(kept + i, by_rank->is_kept(model, start + i));
        return;
    }
    const I64 chance = I64{} + int64_t(s.chances[model]);
    RandomBits stream(s.keys[model], s.offset + start);
    for (size_t i = 0; i < count; i += W) store(kept + i, (I64)stream.next() < chance);
}

// The variance of each element over the models, in float32.
template <class E>
void variances(Rows<E> rows, size_t models, size_t count, float* found) {
    const double number = models;
    for (size_t i = 0; i < count; i += W) {
        const F64 base = rows.base(i);
        F64 mean{}, squares{};
        for (size_t m = 0; m < models; ++m) mean += rows.difference(m, i, base);
        mean /= number;
        for (size_t m = 0; m < models; ++m) {
            const F64 distance = rows.difference(m, i, base) - mean;
            squares += distance * distance;
        }
        store(found + i, narrow(squares / number));
    }
}

// What is selected, a chunk at a time.
template <class E>
class Selected {
public:
    static size_t bytes(const Blocks& in, const Selection& s) {
        const size_t rare = is_rare(s) ? (in.count - 1) * sizeof(int64_t) + sizeof(float) : 0;
        return PITCH * (in.count * (sizeof(E) + sizeof(double)) + rare) + (s.by_rank ? ByRank<E>::bytes(in, s) : 0);
    }

    Selected(const Blocks& in, const Selection& s, const double* factors, Memory& memory)
        : in(in), selection(s), factors(factors), rows{memory.take<E>(in.count * PITCH)},
          values(memory.take<double>(in.count * PITCH)) {
        if (!is_rare(s)) return;
        kept = memory.take<int64_t>((in.count - 1) * PITCH);
        variance = memory.take<float>(PITCH);
        if (s.by_rank) by_rank.emplace(in, s, memory);
    }

    // Whether all that is read is finite.
    bool read(size_t start, size_t count) const {
        const bool finite = rows.read(in, start, count);
        if (kept) find_kept(start, count);
        const size_t whole = (count + LANES - 1) / LANES * LANES;  // with the zeros at the end
        for (size_t i = 0; i < whole; i += W) store(base() + i, rows.base(i));
        for (size_t m = 0; m + 1 < in.count; ++m) {
            const F64 least = all(selection.least[m]), factor = all(factors ? factors[m] : 1);
            const int64_t* also = kept + m * PITCH;
            const auto select = [&](auto is_kept) {
                for (size_t i = 0; i < whole; i += W) {
                    const F64 value = difference(m, i);
                    store(model(m) + i, only(is_kept(i, absolute(value)), factor * value));
                }
            };
            if (kept) select([&](size_t i, F64 size) { return at_most(least, size) & where(load<I64>(also + i)); });
            else select([&](size_t, F64 size) { return at_most(least, size); });
        }
        return finite;
    }

    double* base() const { return values; }
    // What is selected of its differences, times its factor, and 0 for the others.
    double* model(size_t m) const { return values + (m + 1) * PITCH; }
    // Of the chunk that was read, whether it is selected or not.
    F64 difference(size_t m, size_t i) const { return rows.difference(m, i, load<F64>(base() + i)); }

    std::optional<ByRank<E>> by_rank;  // what is kept, where chances are by rank

private:
    Blocks in;
    const Selection& selection;
    const double* factors;
    Rows<E> rows;
    double* values;
    int64_t* kept = nullptr;  // where more than a threshold from below is asked for: rows of all bits or none
    float* variance = nullptr;

    static bool is_rare(const Selection& s) { return s.cut || s.random || s.least_variance > 0; }

    void find_kept(size_t start, size_t count) const {
        const size_t models = in.count - 1;
        const bool varied = selection.least_variance > 0;
        if (varied) variances(rows, models, count, variance);
        for (size_t m = 0; m < models; ++m) {
            int64_t* row = kept + m * PITCH;
            if (selection.random) keep_at_random(selection, by_rank, m, start, count, row);
            if (!selection.cut && !varied) continue;
            for (size_t i = 0; i < count; i += W) {
                I64 keep = selection.random ? load<I64>(row + i) : ~I64{};
                if (selection.cut) keep &= absolute(rows.difference(m, i, rows.base(i))) < selection.beyond[m];
                if (varied) keep &= load_f64(variance + i) >= selection.least_variance;
                store(row + i, keep);
            }
        }
    }
};

}  // namespace fusionbench::ARCH

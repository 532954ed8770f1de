// What the passes are given. Plain data only: kernels.cpp is compiled for several kinds of processors, and of a
// function that was defined here, the linker could take the one that needs the newest.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusionbench {

enum class Dtype { f64, f32, f16, bf16 };
enum class Elect { none, mass, count };
enum class Combine { sum, mean, max };

struct Block {
    const uint8_t* data;
    Dtype dtype;
};

// The base or first model, then the others; all of as many elements.
struct Blocks {
    const Block* blocks;
    size_t count;
    size_t elements;
    bool wide;  // one of them is of float64
};

struct Output {
    uint8_t* data;
    Dtype dtype;
};

// Every array has one entry for each model.
struct Selection {
    const double* least;   // magnitudes below are dropped
    const double* beyond;  // and those from here on, where `cut` says so
    const uint64_t* keys;
    const uint64_t* chances;
    const uint64_t* const* by_rank;  // or null: chances by rank, which do not fall
    size_t columns;                  // of a row in which magnitudes are ranked
    bool exact;                      // the chance of each element is asked for
    bool cut;
    bool random;
    float least_variance;
    uint64_t offset;
};

struct WeightedSum {
    Blocks in;
    double scale;
    const double* coefficients;
    double divisor;
    Output out;
};

struct MaskedMerge {
    Blocks in;
    Selection selection;
    const double* factors;
    const double* weights;
    Elect elect;
    double on_tie;
    Combine combine;
    double scaling;
    Output out;
};

struct Products {
    Blocks in;
    const Selection* selection;  // or null: of the blocks themselves
    double* gram;
};

// Of the magnitudes of all differences, and of those that are selected.
struct Sums {
    Blocks in;
    Selection selection;
    double* all;
    double* selected;
};

struct Histogram {
    Blocks in;
    const int64_t* prefixes;  // or null: the high bits are counted
    Selection selection;
    bool variance;
    int64_t* counts;
};

// Of each model, the magnitudes from `first` to `last`, as they come, and how many are above. One row of the arrays for
// each pair of bounds, with one entry for each model.
struct Between {
    Blocks in;
    Selection selection;
    size_t bounds;
    const uint32_t* first;
    const uint32_t* last;
    size_t room;       // for those of one model, and one pair
    uint32_t* found;   // rows of this length
    int64_t* within;   // how many were found: more than there is room for are counted only
    int64_t* above;
};

// Each says whether all numbers are finite.
struct Passes {
    bool (*weighted_sum)(const WeightedSum&);
    bool (*masked_merge)(const MaskedMerge&);
    bool (*products)(const Products&);
    bool (*sums)(const Sums&);
    bool (*histogram)(const Histogram&);
    bool (*between)(const Between&);
};

namespace baseline {
extern const Passes passes;
}
#ifdef FUSIONBENCH_X86
namespace v3 {
extern const Passes passes;
}
namespace v4 {
extern const Passes passes;
}
#endif

constexpr unsigned LOW_BITS = 16;             // of a magnitude's 31
constexpr uint64_t ALWAYS = uint64_t{1} << 32;  // the chance of what is kept in any case

// Memory of this thread, until it asks again: no page is faulted in twice.
void* scratch(size_t bytes);

// Counters of this thread, all zero, as they have to be left: for each value of a magnitude's high bits, and one more.
// Four of each, for one element after the other: a counter that waits for its last value to be stored waits long.
constexpr size_t COUNTERS = (size_t{1} << (31 - LOW_BITS)) + 1, COUNTERS_APART = 4;
uint32_t (*zero_counters())[COUNTERS_APART];

}  // namespace fusionbench

// The passes as functions of Python: arguments are checked here, and nowhere else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "passes.h"

namespace nb = nanobind;

namespace fusionbench {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Chances = nb::ndarray<const uint64_t, nb::c_contig, nb::device::cpu>;
using Given = std::vector<std::pair<Array<const uint8_t>, std::string>>;

const Passes* passes = nullptr;  // those of the architecture that was chosen
std::string chosen;

[[noreturn]] void wrong(const std::string& line) { throw std::invalid_argument(line); }

void expect(const char* what, size_t found, size_t expected) {
    if (found != expected)
        wrong(std::string(what) + ": " + std::to_string(found) + " given, " + std::to_string(expected) + " expected.");
}

Dtype dtype_of(const std::string& name) {
    if (name == "F64") return Dtype::f64;
    if (name == "F32") return Dtype::f32;
    if (name == "F16") return Dtype::f16;
    if (name == "BF16") return Dtype::bf16;
    wrong("The core's passes are made over F64, F32, F16, BF16, not over '" + name + "'.");
}

size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Blocks of as many elements each, `least` of them or more.
struct CheckedBlocks {
    std::vector<Block> blocks;
    Blocks in{};

    CheckedBlocks(const Given& given, size_t least) {
        if (given.size() < least)
            wrong("Blocks: " + std::to_string(given.size()) + " given, " + std::to_string(least) +
                  " or more expected.");
        for (const auto& [bytes, name] : given) {
            const Dtype dtype = dtype_of(name);
            const size_t elements = bytes.size() / size_of(dtype);
            if (blocks.empty()) in.elements = elements;
            expect("Bytes of a block", bytes.size(), in.elements * size_of(dtype));
            in.wide |= dtype == Dtype::f64;
            blocks.push_back({bytes.data(), dtype});
        }
        in.blocks = blocks.data();
        in.count = blocks.size();
    }
};

Output output(Array<uint8_t>& out, const std::string& name, size_t elements) {
    const Dtype dtype = dtype_of(name);
    expect("Bytes to write to", out.size(), elements * size_of(dtype));
    return {out.data(), dtype};
}

// One entry for each model, where one for all was given.
template <class T, class Given>
std::vector<T> of_each(const char* what, const Given& given, size_t models) {
    const T* data = given.data();
    if (given.size() == 1) return std::vector<T>(models, data[0]);
    expect(what, given.size(), models);
    return std::vector<T>(data, data + models);
}

// The smallest float64 that float32 rounds to this or more.
double rounded_to(float least) {
    if (std::isnan(least)) return least;
    if (least <= 0) return 0;
    const double below = std::nextafter(least, 0.0f);
    const double middle = (below + (std::isinf(least) ? 0x1p128 : double(least))) / 2;
    uint32_t bits;
    std::memcpy(&bits, &least, sizeof bits);
    return bits % 2 == 0 ? middle : std::nextafter(middle, std::numeric_limits<double>::infinity());
}

// The smallest float64 that float32 rounds to more than this.
double rounded_above(float most) {
    if (std::isnan(most) || most < 0) return 0;
    if (std::isinf(most)) return std::numeric_limits<double>::infinity();
    return rounded_to(std::nextafter(most, std::numeric_limits<float>::infinity()));
}

struct CheckedSelection {
    std::vector<double> least, beyond;
    std::vector<uint64_t> keys, chances;
    std::vector<const uint64_t*> by_rank;
    Selection selection{};

    CheckedSelection(const Array<const uint64_t>& keys_given, const Chances& chances_given, uint64_t offset,
                     size_t models, size_t elements)
        : least(models, 0.0), beyond(models, 0.0), keys(of_each<uint64_t>("Keys", keys_given, models)) {
        selection.offset = offset;
        if (chances_given.ndim() == 1) {
            chances = of_each<uint64_t>("Chances", chances_given, models);
            for (const uint64_t chance : chances) selection.random |= chance < ALWAYS;
        } else if (chances_given.ndim() == 2) {
            const size_t rows = chances_given.shape(0);
            if (rows != 1) expect("Rows of chances", rows, models);
            const size_t columns = chances_given.shape(1);
            if (columns == 0 || elements % columns != 0)
                wrong("Chances by rank: " + std::to_string(columns) + " given, of " + std::to_string(elements) +
                      " elements.");
            chances.resize(models);
            for (size_t i = 0; i < models; ++i) {
                by_rank.push_back(chances_given.data() + (rows == 1 ? 0 : i * columns));
                if (!std::is_sorted(by_rank[i], by_rank[i] + columns)) wrong("Chances by rank: one is below the last.");
            }
            selection.by_rank = by_rank.data();
            selection.columns = columns;
            selection.random = true;
        } else {
            wrong("Chances: " + std::to_string(chances_given.ndim()) + " dimensions given, 1 or 2 expected.");
        }
        selection.least = least.data();
        selection.beyond = beyond.data();
        selection.keys = keys.data();
        selection.chances = chances.data();
    }

    void thresholds(const Array<const float>& low, const Array<const float>& high, double least_variance) {
        const auto lows = of_each<float>("Low thresholds", low, least.size());
        const auto highs = of_each<float>("High thresholds", high, least.size());
        for (size_t i = 0; i < least.size(); ++i) {
            least[i] = rounded_to(lows[i]);
            beyond[i] = rounded_above(highs[i]);
            selection.cut |= !(highs[i] == std::numeric_limits<float>::infinity());
        }
        selection.least_variance = float(least_variance);
    }
};

bool weighted_sum(const Given& blocks, double scale, const Array<const double>& coefficients, double divisor,
                  Array<uint8_t> out, const std::string& dtype) {
    const CheckedBlocks checked(blocks, 1);
    expect("Coefficients", coefficients.size(), checked.in.count - 1);
    const WeightedSum sum{checked.in, scale, coefficients.data(), divisor, output(out, dtype, checked.in.elements)};
    const nb::gil_scoped_release released;
    return passes->weighted_sum(sum);
}

bool masked_merge(const Given& blocks, const Array<const float>& low, const Array<const float>& high,
                  const Array<const uint64_t>& keys, const Chances& chances, double least_variance, uint64_t offset,
                  const Array<const double>& factors, const Array<const double>& weights, bool divide, int elect,
                  double on_tie, int combine, double scaling, Array<uint8_t> out, const std::string& dtype) {
    const CheckedBlocks checked(blocks, 2);
    const size_t models = checked.in.count - 1;
    CheckedSelection selected(keys, chances, offset, models, checked.in.elements);
    selected.thresholds(low, high, least_variance);
    const auto each_factor = of_each<double>("Factors", factors, models);
    const auto each_weight = of_each<double>("Weights", weights, models);
    if (elect < 0 || elect > 2) wrong("Elect: " + std::to_string(elect) + " given, 0, 1 or 2 expected.");
    if (combine < 0 || combine > 2) wrong("Combine: " + std::to_string(combine) + " given, 0, 1 or 2 expected.");
    if (on_tie != 0 && on_tie != 1) wrong("On tie: " + std::to_string(on_tie) + " given, 0 or 1 expected.");
    selected.selection.exact = divide && selected.selection.by_rank;
    const MaskedMerge merge{checked.in, selected.selection, each_factor.data(), each_weight.data(), Elect(elect),
                            on_tie, Combine(combine), scaling, output(out, dtype, checked.in.elements)};
    const nb::gil_scoped_release released;
    return passes->masked_merge(merge);
}

bool products(const Given& blocks, bool differences, const Array<const float>& low, const Array<const float>& high,
              const Array<const uint64_t>& keys, const Chances& chances, double least_variance, uint64_t offset,
              Table<double> gram) {
    const CheckedBlocks checked(blocks, differences ? 2 : 1);
    const size_t models = checked.in.count - differences;
    std::optional<CheckedSelection> selected;
    if (differences) {
        selected.emplace(keys, chances, offset, models, checked.in.elements);
        selected->thresholds(low, high, least_variance);
    }
    expect("Rows of products", gram.shape(0), models);
    expect("Columns of products", gram.shape(1), models);
    const Products all{checked.in, selected ? &selected->selection : nullptr, gram.data()};
    const nb::gil_scoped_release released;
    return passes->products(all);
}

bool sums(const Given& blocks, const Array<const float>& low, const Array<const float>& high,
          const Array<const uint64_t>& keys, const Chances& chances, double least_variance, uint64_t offset,
          Array<double> all, Array<double> selected) {
    const CheckedBlocks checked(blocks, 2);
    const size_t models = checked.in.count - 1;
    CheckedSelection some(keys, chances, offset, models, checked.in.elements);
    some.thresholds(low, high, least_variance);
    expect("Sums", all.size(), models);
    expect("Sums", selected.size(), models);
    const Sums both{checked.in, some.selection, all.data(), selected.data()};
    const nb::gil_scoped_release released;
    return passes->sums(both);
}

bool histogram(const Given& blocks, const std::optional<Array<const int64_t>>& prefixes,
               const Array<const uint64_t>& keys, const Chances& chances, uint64_t offset, bool variance,
               Table<int64_t> counts) {
    const CheckedBlocks checked(blocks, 2);
    const size_t models = checked.in.count - 1;
    const CheckedSelection selected(keys, chances, offset, models, checked.in.elements);
    const size_t rows = variance ? 1 : models;
    if (checked.in.elements > UINT32_MAX) wrong("A histogram counts no more than 2**32 - 1 elements at a time.");
    if (prefixes) expect("Prefixes", prefixes->size(), rows);
    expect("Rows of counts", counts.shape(0), rows);
    expect("Counts", counts.shape(1), size_t{1} << (prefixes ? LOW_BITS : 31 - LOW_BITS));
    const Histogram all{checked.in, prefixes ? prefixes->data() : nullptr, selected.selection, variance, counts.data()};
    const nb::gil_scoped_release released;
    return passes->histogram(all);
}

bool between(const Given& blocks, const Table<const uint32_t>& first, const Table<const uint32_t>& last,
             const Array<const uint64_t>& keys, const Chances& chances, uint64_t offset, Table<uint32_t> found,
             Table<int64_t> within, Table<int64_t> above) {
    const CheckedBlocks checked(blocks, 2);
    const size_t models = checked.in.count - 1, bounds = first.shape(0);
    const CheckedSelection selected(keys, chances, offset, models, checked.in.elements);
    const auto expect_shape = [&](const char* rows, const char* columns, const auto& table) {
        expect(rows, table.shape(0), bounds);
        expect(columns, table.shape(1), models);
    };
    expect_shape("Rows of bounds", "Bounds", first);
    expect_shape("Rows of bounds", "Bounds", last);
    expect_shape("Rows of counts", "Counts", within);
    expect_shape("Rows of counts", "Counts", above);
    expect("Rows to write to", found.shape(0), bounds * models);
    for (size_t i = 0; i < bounds * models; ++i) {
        if (first.data()[i] > INT32_MAX || last.data()[i] > INT32_MAX) wrong("Bounds: magnitudes have 31 bits.");
        within.data()[i] = above.data()[i] = 0;
    }
    const Between all{checked.in, selected.selection, bounds, first.data(), last.data(), found.shape(1),
                      found.data(), within.data(), above.data()};
    const nb::gil_scoped_release released;
    return passes->between(all);
}

struct Architecture {
    const char* name;
    const Passes* passes;
    bool here;  // this processor can
};

std::vector<Architecture> architectures() {
#ifdef FUSIONBENCH_X86
    __builtin_cpu_init();
    const bool baseline = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return {{"v4", &v4::passes, v4}, {"v3", &v3::passes, v3}, {"baseline", &baseline::passes, baseline}};
#else
    return {{"baseline", &baseline::passes, true}};
#endif
}

// Takes the passes of this architecture from now on, or of the newest this processor can.
void choose(const std::string& name) {
    std::string known;
    for (const Architecture& architecture : architectures()) {
        if (!architecture.here) continue;
        if (name.empty() || name == architecture.name) {
            passes = architecture.passes;
            chosen = architecture.name;
            return;
        }
        known += std::string(known.empty() ? "" : ", ") + architecture.name;
    }
    wrong("FUSIONBENCH_CORE_ARCH is '" + name + "'; this processor can " + (known.empty() ? "none" : known) + ".");
}

}  // namespace
}  // namespace fusionbench

NB_MODULE(_core, m) {
    using namespace fusionbench;
    using namespace nb::literals;
    choose("");
    m.def("choose", &choose, "architecture"_a = "");
    m.def("chosen", [] { return chosen; });
    m.def("weighted_sum", &weighted_sum, "blocks"_a, "scale"_a, "coefficients"_a, "divisor"_a, "out"_a.noconvert(),
          "dtype"_a);
    m.def("masked_merge", &masked_merge, "blocks"_a, "low"_a, "high"_a, "keys"_a, "chances"_a, "least_variance"_a,
          "offset"_a, "factors"_a, "weights"_a, "divide"_a, "elect"_a, "on_tie"_a, "combine"_a, "scaling"_a, "out"_a.noconvert(),
          "dtype"_a);
    m.def("products", &products, "blocks"_a, "differences"_a, "low"_a, "high"_a, "keys"_a, "chances"_a,
          "least_variance"_a, "offset"_a, "gram"_a.noconvert());
    m.def("sums", &sums, "blocks"_a, "low"_a, "high"_a, "keys"_a, "chances"_a, "least_variance"_a, "offset"_a,
          "all"_a.noconvert(), "selected"_a.noconvert());
    m.def("between", &between, "blocks"_a, "first"_a, "last"_a, "keys"_a, "chances"_a, "offset"_a,
          "found"_a.noconvert(), "within"_a.noconvert(), "above"_a.noconvert());
    m.def("histogram", &histogram, "blocks"_a, "prefixes"_a.none(), "keys"_a, "chances"_a, "offset"_a, "variance"_a,
          "counts"_a.noconvert());
}

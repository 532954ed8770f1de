#include <memory>
#include <new>

#include "passes.h"

namespace fusionbench {
namespace {

constexpr size_t KEPT = size_t{1} << 23;  // more than this is given back
constexpr std::align_val_t ALIGNMENT{64};

struct Free {
    void operator()(void* memory) const { operator delete(memory, ALIGNMENT); }
};

thread_local std::unique_ptr<void, Free> memory;
thread_local size_t size = 0;
thread_local std::unique_ptr<uint32_t[][COUNTERS_APART]> counters;

}  // namespace

void* scratch(size_t bytes) {
    if (bytes > size || (size > KEPT && bytes <= KEPT)) {
        size = 0;
        memory.reset();
        memory.reset(operator new(bytes, ALIGNMENT));
        size = bytes;
    }
    return memory.get();
}

uint32_t (*zero_counters())[COUNTERS_APART] {
    if (!counters) counters = std::make_unique<uint32_t[][COUNTERS_APART]>(COUNTERS);
    return counters.get();
}

}  // namespace fusionbench

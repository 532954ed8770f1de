// The passes for one kind of processor: compiled once for each, with ARCH for the name of the namespace.
#include "between.h"
#include "histogram.h"
#include "masked_merge.h"
#include "products.h"
#include "weighted_sum.h"

namespace fusionbench::ARCH {

extern const Passes passes{weighted_sum, masked_merge, products, sums, histogram, between};

}  // namespace fusionbench::ARCH

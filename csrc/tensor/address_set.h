// A set of addresses, to find gradients that are given twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gradfuse {

// Open addressing: on thousands of small tensors a std::unordered_set costs more than the kernels.
class AddressSet {
 public:
  explicit AddressSet(size_t most) : shift_(64) {
    size_t size = 1;
    while (size < 2 * most + 1) size *= 2, --shift_;
    slots_.assign(size, nullptr);
  }
  // Whether the address was not there before.
  bool insert(const void* p) {
    const size_t mask = slots_.size() - 1;
    size_t i = shift_ == 64 ? 0 : (reinterpret_cast<uint64_t>(p) * 0x9e3779b97f4a7c15u) >> shift_;
    for (; slots_[i]; i = (i + 1) & mask)
      if (slots_[i] == p) return false;
    slots_[i] = p;
    return true;
  }

 private:
  std::vector<const void*> slots_;
  int shift_;
};

}  // namespace gradfuse

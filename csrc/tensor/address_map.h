// The tensor that lies at an address first, to find gradients that are given twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace gradfuse {

// Open addressing: on thousands of small tensors a std::unordered_map costs more than the kernels.
class AddressMap {
 public:
  explicit AddressMap(size_t most) : shift_(64) {
    size_t size = 1;
    while (size < 2 * most + 1) size *= 2, --shift_;
    slots_.assign(size, {nullptr, 0});
  }
  // Keeps the index for an address, and returns none; or, if it has one already, returns that.
  std::optional<size_t> insert(const void* address, size_t index) {
    const size_t mask = slots_.size() - 1;
    size_t i =
        shift_ == 64 ? 0 : (reinterpret_cast<uint64_t>(address) * 0x9e3779b97f4a7c15u) >> shift_;
    for (; slots_[i].address; i = (i + 1) & mask)
      if (slots_[i].address == address) return slots_[i].index;
    slots_[i] = {address, index};
    return std::nullopt;
  }

 private:
  struct Slot {
    const void* address;
    size_t index;
  };
  std::vector<Slot> slots_;
  int shift_;
};

}  // namespace gradfuse

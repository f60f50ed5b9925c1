// Philox4x32-10, random numbers by counter instead of by state: any of them is computed alone, so
// all devices, threads and instruction sets see the same ones.
//
// Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3.
#pragma once

#include <cstdint>

#include "common.h"

namespace gradfuse {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFirst = 0xd2511f53u, kPhiloxSecond = 0xcd9e8d57u;  // multipliers
constexpr uint32_t kPhiloxLow = 0x9e3779b9u, kPhiloxHigh = 0xbb67ae85u;  // added to the key

struct Philox {
  uint32_t word[4];
};

// A block of four random words from a counter of four and a key of two.
GRADFUSE_HD Philox philox(Philox c, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = uint64_t{kPhiloxFirst} * c.word[0];
    const uint64_t second = uint64_t{kPhiloxSecond} * c.word[2];
    c = {{static_cast<uint32_t>(second >> 32) ^ c.word[1] ^ key_low, static_cast<uint32_t>(second),
          static_cast<uint32_t>(first >> 32) ^ c.word[3] ^ key_high, static_cast<uint32_t>(first)}};
    key_low += kPhiloxLow;
    key_high += kPhiloxHigh;
  }
  return c;
}

// The random numbers of one call, by block. A call draws its key and its offset, the upper half of
// the counter, from torch's generator.
struct RandomStream {
  uint64_t key, offset;
};
GRADFUSE_HD Philox random_block(RandomStream s, uint64_t block) {
  return philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                  static_cast<uint32_t>(s.offset), static_cast<uint32_t>(s.offset >> 32)}},
                static_cast<uint32_t>(s.key), static_cast<uint32_t>(s.key >> 32));
}

}  // namespace gradfuse

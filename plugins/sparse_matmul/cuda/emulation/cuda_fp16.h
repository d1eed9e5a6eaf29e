// float16 for the emulation: a number of 16 bits that converts to and from float, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;

  __half() = default;
  explicit __half(float value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    std::memcpy(&bits, &rounded, sizeof bits);
  }
  explicit operator float() const {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
  }
};

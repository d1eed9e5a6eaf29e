// The instructions of tensor cores, by the tables of the PTX ISA ("Warp level matrix multiply-accumulate
// instructions"): which element of a matrix a lane's register holds. With g = lane / 4, t = lane % 4:
//   C, D of m16n8   d[i]: row g + 8 (i / 2), column 2 t + i % 2
// 16-bit numbers, two of a register; element i of A (0..7) and of B:
//   A of m16n8k16   a[i]: row g, for i of 2, 3, 6, 7: g + 8; column 2 t + i % 2, for i >= 4: + 8
//   B of m16n8k16   b[i]: row 2 t + i % 2, for i >= 2: + 8; column g
//   B of m16n8k32   b[i]: row 2 t + i % 2 + 8 (i / 2); column g                           (mma.sp)
// int8, four of a register; element i of A (0..15) and of B:
//   A of m16n8k32   a[i]: row g, for i of 4..7, 12..15: g + 8; column 4 t + i % 4, for i >= 8: + 16
//   B of m16n8k32   b[i]: row 4 t + i % 4, for i >= 4: + 16; column g
//   B of m16n8k64   b[i]: row 4 t + i % 4 + 16 (i / 4); column g                          (mma.sp)
// A of mma.sp has the fragments of the instruction of half its k, whose columns 2 j, 2 j + 1 are the stored two of the
// k 4 j .. 4 j + 3. Metadata (nibble j of a row for these four; bits 0-1 and 2-3 say where the two are):
//   m16n8k32, 16 bits   lanes with t / 2 = selector: k 16 (t % 2) ..+15, row g in bits 0-15, row g + 8 in bits 16-31
//   m16n8k64, 8 bits    all lanes (selector 0): k 32 (t / 2) ..+31 of row g + 8 (t % 2)
#pragma once

namespace emulation {

inline float float_of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) {
    const float small = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -small : small;
  }
  const uint32_t wide = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t half_of_float(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7fff);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = -24;
  if (size > 0) std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const auto count = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
  // 1024..2048 units are a normal number; 2048 carries into the exponent.
  const uint32_t made = unit == -24 && count < 1024 ? count : (static_cast<uint32_t>(unit + 24) << 10) + count;
  return static_cast<uint16_t>(sign | made);
}
inline float float_of_bfloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t bfloat_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Element i of a lane's registers.
template <typename T>
struct Element;
template <>
struct Element<__half> {
  static constexpr int kBytes = 2;
  static float of(const uint32_t* r, int i) { return float_of_half(static_cast<uint16_t>(r[i / 2] >> (i % 2 * 16))); }
};
template <>
struct Element<__nv_bfloat16> {
  static constexpr int kBytes = 2;
  static float of(const uint32_t* r, int i) { return float_of_bfloat(static_cast<uint16_t>(r[i / 2] >> (i % 2 * 16))); }
};
template <>
struct Element<int8_t> {
  static constexpr int kBytes = 1;
  static int32_t of(const uint32_t* r, int i) { return static_cast<int8_t>(r[i / 4] >> (i % 4 * 8)); }
};

template <typename Sum>
struct Lane {
  Sum* d;
  const uint32_t *a, *b;
  uint32_t metadata;
};

// A [16][columns] from its fragments, or the stored half of A.
template <typename T, typename V, typename L>
void gather_a(V (*a)[32], L lane) {
  constexpr int kOf = 4 / Element<T>::kBytes;  // in a register
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4 * kOf; ++i) {
      const int row = l / 4 + 8 * (i / kOf % 2), column = l % 4 * kOf + i % kOf + 4 * kOf * (i / (2 * kOf));
      a[row][column] = Element<T>::of(lane(l).a, i);
    }
}
// B [k][8] from its fragments of `registers`.
template <typename T, typename V, typename L>
void gather_b(V (*b)[8], L lane, int registers) {
  constexpr int kOf = 4 / Element<T>::kBytes;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < registers * kOf; ++i)
      b[l % 4 * kOf + i % kOf + 4 * kOf * (i / kOf)][l / 4] = Element<T>::of(lane(l).b, i);
}
template <typename V, typename L>
void product(const V (*a)[64], const V (*b)[8], int k, L lane) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i / 2), column = l % 4 * 2 + i % 2;
      V sum = 0;
      for (int j = 0; j < k; ++j) sum += a[row][j] * b[j][column];
      lane(l).d[i] += sum;
    }
}

template <typename T, typename V>
void multiply(V* d, const uint32_t* a, const uint32_t* b) {
  Lane<V> mine{d, a, b, 0};
  together("mma", mine, [](auto lane) {
    constexpr int kK = 32 / Element<T>::kBytes;
    V a_half[16][32] = {}, a_all[16][64] = {}, b_all[64][8] = {};
    gather_a<T>(a_half, lane);
    gather_b<T>(b_all, lane, 2);
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kK; ++k) a_all[row][k] = a_half[row][k];
    product(a_all, b_all, kK, lane);
  });
}

// The nibble that says where the stored two of row's k 4 j .. 4 j + 3 are.
template <typename T, typename L>
uint32_t nibble(L lane, int row, int j, int selector) {
  const int g = row % 8, lower = row / 8;
  if (Element<T>::kBytes == 2) return lane(g * 4 + selector * 2 + j / 4).metadata >> (16 * lower + j % 4 * 4) & 15;
  return lane(g * 4 + j / 8 * 2 + lower).metadata >> (j % 8 * 4) & 15;
}

template <typename T, typename V>
void multiply_sparse(V* d, const uint4& a, const uint32_t* b, uint32_t metadata, int selector) {
  const uint32_t registers[4] = {a.x, a.y, a.z, a.w};
  Lane<V> mine{d, registers, b, metadata};
  together(selector ? "mma.sp, selector 1" : "mma.sp, selector 0", mine, [=](auto lane) {
    constexpr int kK = 64 / Element<T>::kBytes;
    V a_half[16][32] = {}, a_all[16][64] = {}, b_all[64][8] = {};
    gather_a<T>(a_half, lane);
    gather_b<T>(b_all, lane, 4);
    for (int row = 0; row < 16; ++row)
      for (int j = 0; j < kK / 4; ++j) {
        const uint32_t where = nibble<T>(lane, row, j, selector);
        if ((where & 3) >= where >> 2) stop("metadata of mma.sp is not in ascending order");
        a_all[row][4 * j + (where & 3)] = a_half[row][2 * j];
        a_all[row][4 * j + (where >> 2)] = a_half[row][2 * j + 1];
      }
    product(a_all, b_all, kK, lane);
  });
}

}  // namespace emulation

inline uint16_t __ushort_as_half(uint16_t bits) { return bits; }
inline uint16_t __half_as_ushort(uint16_t bits) { return bits; }
inline float __half2float(uint16_t bits) { return emulation::float_of_half(bits); }
inline uint16_t __float2half_rn(float value) { return emulation::half_of_float(value); }
inline uint16_t __ushort_as_bfloat16(uint16_t bits) { return bits; }
inline uint16_t __bfloat16_as_ushort(uint16_t bits) { return bits; }
inline float __bfloat162float(uint16_t bits) { return emulation::float_of_bfloat(bits); }
inline uint16_t __float2bfloat16_rn(float value) { return emulation::bfloat_of_float(value); }

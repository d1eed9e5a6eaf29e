#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace optimize::sparse_matmul {
namespace {

constexpr const char* kNames[] = {"scalar", "neon", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avx512 = false, amx = false;
};

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux gives tile registers only to processes that ask for them.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return cpu;
  const bool fma = c >> 12 & 1, popcnt = c >> 23 & 1;
  const uint64_t state = enabled_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  const auto bit = [](uint32_t word, int i) { return (word >> i & 1) != 0; };
  cpu.avx2 = (state & 0x6) == 0x6 && fma && popcnt && bit(b, 5) && bit(b, 8);
  cpu.avx512 = cpu.avx2 && (state & 0xe6) == 0xe6 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) &&
               bit(c, 1) && bit(c, 6) && bit(c, 11);  // F DQ BW VL, VBMI VBMI2 VNNI
  cpu.amx = cpu.avx512 && (state & 0x60000) == 0x60000 && bit(d, 24) && bit(d, 25) && request_tiles();
  return cpu;
}

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}
#endif

#if defined(__aarch64__)
// The kernels for Arm use the dot products of Armv8.2, which Apple's 64-bit processors have had since 2019.
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#else
  return true;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int32_t>(isa)]; }

bool has_isa(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return cpu().avx2;
    case Isa::avx512:
      return cpu().avx512;
    case Isa::amx:
      return cpu().amx;
#endif
#if defined(__aarch64__)
    case Isa::neon:
      return has_dot_products();
#endif
    default:
      return false;
  }
}

Isa best_isa() {
  const char* wanted = std::getenv("OPTIMIZE_ISA");
  Isa best = Isa::scalar;
  for (int32_t i = 0; i <= static_cast<int32_t>(Isa::amx); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!has_isa(isa)) continue;
    best = isa;
    if (wanted && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  }
  return best;
}

std::unique_ptr<Kernel> make_kernel(const Weight& weight, Isa isa) {
  return weight.layout == Layout::n64k1 ? make_f32(weight, isa) : make_s8(weight, isa);
}

}  // namespace optimize::sparse_matmul

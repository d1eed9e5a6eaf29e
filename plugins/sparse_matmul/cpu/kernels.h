// CPU kernels of SparseMatMul and the choice between instruction sets.
#pragma once

#include <memory>
#include <string>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {

// Instruction sets with kernels of their own. Each includes what the ones before it on its machine have.
enum class Isa : int32_t {
  scalar = 0,  // any machine
  neon = 1,    // Arm, with dot products
  avx2 = 2,    // x86-64 with AVX2 and FMA
  avx512 = 3,  // AVX-512 F, BW, DQ, VL, VNNI, VBMI and VBMI2
  amx = 4,     // avx512 and AMX-INT8, granted by the operating system
};

// The best set of this machine, or the one the environment variable OPTIMIZE_ISA names, if the machine has it.
Isa best_isa();
bool has_isa(Isa isa);
const char* isa_name(Isa isa);

// A kernel for a validated weight. `isa` must be one that has_isa() accepts.
std::unique_ptr<Kernel> make_kernel(const Weight& weight, Isa isa);
std::unique_ptr<Kernel> make_f32(const Weight& weight, Isa isa);  // layout n64k1
std::unique_ptr<Kernel> make_s8(const Weight& weight, Isa isa);   // layout n16k4
std::unique_ptr<Kernel> make_s8_dense(const Weight& weight, Isa isa);  // null where it has none for the set
std::unique_ptr<Kernel> make_s8_portable(const Weight& weight, Isa isa);  // of avx2 and neon, else null

}  // namespace optimize::sparse_matmul

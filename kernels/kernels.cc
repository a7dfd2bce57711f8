#include "kernels/kernels.h"

namespace spillway {

GemmArgs GemmOf(const GateUpArgs& args) {
  return {.a = args.a,
          .a_dtype = args.a_dtype,
          .num_rows = args.num_rows,
          .weight = args.weight,
          .out = args.product,
          .next = args.next};
}

SiluMulArgs SiluMulOf(const GateUpArgs& args) {
  return {.gate_up = args.product,
          .num_tokens = args.num_rows,
          .inner = args.weight->rows() / 2,
          .out = args.out,
          .out_dtype = args.out_dtype};
}

void Kernels::GateUp(Stream& stream, const GateUpArgs& args) const {
  Gemm(stream, GemmOf(args));
  SiluMul(stream, SiluMulOf(args));
}

}  // namespace spillway

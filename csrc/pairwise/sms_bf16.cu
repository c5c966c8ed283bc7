#include "pairwise/sms.h"

namespace evaat::sms {

int panel_bf16(const Panel& p, int source, int mode, void* stream) { return panel<__nv_bfloat16>(p, source, mode, stream); }

}  // namespace evaat::sms

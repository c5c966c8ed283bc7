#include "pairwise/sms.h"

namespace evaat::sms {

int panel_fp16(const Panel& p, int source, int mode, void* stream) { return panel<__half>(p, source, mode, stream); }

}  // namespace evaat::sms

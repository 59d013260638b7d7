#include "vectors.h"

extern "C" int64_t lanes() { return LANES; }

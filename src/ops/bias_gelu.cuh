// bias_gelu.h on a GPU. One block computes one row.

#include "bias_gelu.h"

// cross_entropy.h on a GPU. One block computes one row.

#include "cross_entropy.h"

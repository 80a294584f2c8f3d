// dropout.h on a GPU. One thread computes one number.

#include "dropout.h"

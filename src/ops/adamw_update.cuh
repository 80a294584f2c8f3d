// adamw_update.h on a GPU. One thread updates one weight.

#include "adamw_update.h"

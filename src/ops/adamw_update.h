// One update of AdamW. All arrays hold count numbers. rest1 and rest2 are 1 - beta1 and 1 - beta2,
// which in single precision would lose digits. On a GPU, one thread updates one weight.

#include "device.h"

KERNEL void adamw_update(float* new_weight, float* new_m, float* new_v, const float* weight,
        const float* gradient, const float* m, const float* v, int64_t count, float beta1,
        float rest1, float beta2, float rest2, float epsilon, float step_size, float decay) {
    FOR_EACH (i, count) {
        const float g = gradient[i];
        const float m_i = new_m[i] = beta1 * m[i] + rest1 * g;
        const float v_i = new_v[i] = beta2 * v[i] + rest2 * g * g;
        const float moved = weight[i] - step_size * m_i / (std::sqrt(v_i) + epsilon);
        new_weight[i] = moved - decay * moved;
    }
}

#include "kernels.h"

#include <string.h>

static int can_run(const struct skv_kernels *kernels)
{
#if defined(__x86_64__)
    if (kernels == &skv_kernels_avx2)
        return __builtin_cpu_supports("avx2");
#endif
    return kernels == &skv_kernels_portable;
}

const struct skv_kernels *skv_kernels_find(const char *name)
{
    static const struct skv_kernels *const by_speed[] = {
#if defined(__x86_64__)
        &skv_kernels_avx2,
#endif
        &skv_kernels_portable,
    };
    for (size_t i = 0; i < sizeof(by_speed) / sizeof(by_speed[0]); i++)
        if ((!name || !strcmp(name, by_speed[i]->name)) && can_run(by_speed[i]))
            return by_speed[i];
    return NULL;
}

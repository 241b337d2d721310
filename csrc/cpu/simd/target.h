// What a file of this folder does with the list of features it names once,
//
//   #define SFACE_FEATURES(feature, separator) feature("avx2") separator feature("fma") …
//
// Compile what stands between SFACE_TARGET_BEGIN(SFACE_FEATURES) and SFACE_TARGET_END for a CPU with these features,
// and ask this CPU for them: SFACE_SUPPORTED(SFACE_FEATURES).
#pragma once

#define SFACE_SUPPORTED(features) (features(__builtin_cpu_supports, &&))

#define SFACE_NAME(feature) feature
#define SFACE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SFACE_PUSH_TARGET(names) SFACE_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define SFACE_TARGET_END SFACE_PRAGMA(clang attribute pop)
#else
#define SFACE_PUSH_TARGET(names) SFACE_PRAGMA(GCC push_options) SFACE_PRAGMA(GCC target(names))
#define SFACE_TARGET_END SFACE_PRAGMA(GCC pop_options)
#endif
#define SFACE_TARGET_BEGIN(features) SFACE_PUSH_TARGET(features(SFACE_NAME, ","))

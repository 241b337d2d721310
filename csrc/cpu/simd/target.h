// Compile what stands between SFACE_TARGET_BEGIN(features) and SFACE_TARGET_END for a CPU with these features.
#pragma once

#define SFACE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SFACE_TARGET_BEGIN(features) \
  SFACE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SFACE_TARGET_END SFACE_PRAGMA(clang attribute pop)
#else
#define SFACE_TARGET_BEGIN(features) SFACE_PRAGMA(GCC push_options) SFACE_PRAGMA(GCC target(features))
#define SFACE_TARGET_END SFACE_PRAGMA(GCC pop_options)
#endif

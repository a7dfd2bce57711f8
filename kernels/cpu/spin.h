#pragma once

// A short, bounded wait before a thread goes to sleep. Bounded because a spinning thread takes a core from the one it
// waits for.

namespace spillway::cpu {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 10 to 20 microseconds. True as soon as `reached` is.
template <typename Reached>
bool SpinUntil(Reached reached) {
  for (int i = 0; i < 300; ++i) {
    if (reached()) return true;
    Pause();
  }
  return reached();
}

// Before that, a little work at a time, while do_some() says that there was some.
template <typename Reached, typename DoSome>
bool SpinUntil(Reached reached, DoSome do_some) {
  while (!reached()) {
    if (!do_some()) return SpinUntil(reached);
  }
  return true;
}

}  // namespace spillway::cpu

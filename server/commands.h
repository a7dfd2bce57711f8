#pragma once

// The program's commands. Each returns the exit code of the process.

#include "server/options.h"

namespace spillway {

inline constexpr int kExitFailed = 1;         // did not start, or a check or benchmark failed
inline constexpr int kExitUsage = 2;          // the command line is wrong
inline constexpr int kExitEngineFailed = 3;   // the engine failed or stalled while serving
inline constexpr int kExitInterrupted = 130;  // a second signal while draining

int ServeCommand(const Options& options, const Environment& environment);
int RunCommand(const Options& options, const Environment& environment);
int BenchThroughputCommand(const Options& options, const Environment& environment);
int BenchServeCommand(const Options& options, const Environment& environment);
int CheckCommand(const Options& options, const Environment& environment);
int PlanCommand(const Options& options, const Environment& environment);
int ReplayCommand(const Options& options, const Environment& environment);

}  // namespace spillway

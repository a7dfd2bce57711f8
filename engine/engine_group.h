#pragma once

// Several engines of one model as one: data parallelism. Each engine has its own device tier and threads; the host tier
// below them is shared, so what one has computed the others load.
//
// A request goes, with all its choices, to one engine: to the one that was last given the longest prefix of its prompt,
// unless sequences wait there and another engine has none waiting; else to the one with the fewest sequences, the first
// of equals.

#include <memory>
#include <vector>

#include "engine/engine.h"

namespace spillway {

// `engines` has at least one; they share model, limits and prefix_hash_seed. The group is alive while all of them are:
// its failure names the engine, its cost model is the first one's. Limits are each engine's own, capacity_tokens is
// that of one.
std::unique_ptr<Engine> MakeEngineGroup(std::vector<std::unique_ptr<Engine>> engines);

}  // namespace spillway

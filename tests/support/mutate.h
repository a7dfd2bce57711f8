#pragma once

// Seeded damage to valid inputs, for parsers of foreign bytes.

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace spillway {

class Mutator {
 public:
  explicit Mutator(std::uint32_t seed) : random_(seed) {}

  std::size_t Below(std::size_t limit) { return limit == 0 ? 0 : random_() % limit; }

  // Flips, overwrites, drops, repeats or cuts off a few bytes.
  std::string Bytes(std::string bytes) {
    for (std::size_t i = 0, count = 1 + Below(4); i < count && !bytes.empty(); ++i) {
      const std::size_t at = Below(bytes.size());
      switch (Below(6)) {
        case 0:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << Below(8)));
          break;
        case 1:
          bytes[at] = static_cast<char>(Below(256));
          break;
        case 2:
          bytes.erase(at, 1 + Below(16));
          break;
        case 3:
          bytes.insert(at, bytes.substr(Below(bytes.size()), 1 + Below(16)));
          break;
        case 4:
          bytes[at] = "0123456789-.eE[]{}\",:\\"[Below(22)];
          break;
        default:
          if (Below(4) == 0) bytes.resize(at);
      }
    }
    return bytes;
  }

  // Replaces, removes, repeats or swaps a few values anywhere in the document: it stays JSON.
  nlohmann::json Document(nlohmann::json document) {
    for (std::size_t i = 0, count = 1 + Below(3); i < count; ++i) {
      std::vector<nlohmann::json*> nodes;
      Collect(document, nodes);
      nlohmann::json& node = *nodes[Below(nodes.size())];
      switch (Below(4)) {
        case 0:
          node = Odd();
          break;
        case 1:
          if (node.is_structured() && !node.empty()) node.erase(std::next(node.begin(), Offset(node.size())));
          break;
        case 2: {
          nlohmann::json other = *nodes[Below(nodes.size())];
          node = std::move(other);
          break;
        }
        default:
          if (node.is_array() && !node.empty()) {
            nlohmann::json again = node[Below(node.size())];
            node.push_back(std::move(again));
          } else if (node.is_string()) {
            node = node.get<std::string>() + std::string(Below(3), "(*\\["[Below(4)]);
          }
      }
    }
    return document;
  }

 private:
  std::ptrdiff_t Offset(std::size_t limit) { return static_cast<std::ptrdiff_t>(Below(limit)); }

  nlohmann::json Odd() {
    const nlohmann::json odd = {nullptr,
                                true,
                                false,
                                -1,
                                0,
                                1,
                                7,
                                1e300,
                                -0.5,
                                UINT64_MAX,
                                INT64_MIN,
                                4194304,
                                "",
                                "\u2581",
                                "a",
                                " ",
                                "x*",
                                "(a+)+$",
                                "<0xZZ>",
                                nlohmann::json::array(),
                                nlohmann::json::object(),
                                std::string(300, 'q'),
                                "Sequence",
                                "Split",
                                "Strip",
                                "Fuse"};
    return odd[Below(odd.size())];
  }

  static void Collect(nlohmann::json& node, std::vector<nlohmann::json*>& nodes) {
    nodes.push_back(&node);
    if (!node.is_structured()) return;
    for (nlohmann::json& child : node) Collect(child, nodes);
  }

  std::mt19937 random_;
};

}  // namespace spillway

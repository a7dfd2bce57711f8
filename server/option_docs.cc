#include <fmt/format.h>

#include <algorithm>

#include "absl/strings/str_replace.h"
#include "server/option_table.h"

// docs/from-vllm.md, written from the table.

namespace spillway {
namespace {

std::string Cell(std::string_view text) { return absl::StrReplaceAll(std::string(text), {{"|", "\\|"}}); }

std::string DefaultCell(const OptionRow& row) {
  if (!row.default_note.empty()) return Cell(row.default_note);
  const std::string value = ShowOption(row, Options());
  return value.empty() ? "none" : fmt::format("`{}`", value);
}

void AppendRows(std::string& page, bool from_vllm) {
  for (const OptionRow& row : OptionTable()) {
    if (!Takes(row, Command::kServe) || row.vllm.empty() == from_vllm) continue;
    const std::string flag = fmt::format("--{}", row.name);
    if (from_vllm) page += fmt::format("| `{}` ", row.vllm);
    page += row.vllm == flag ? "| same" : fmt::format("| {}`{}`", from_vllm ? "renamed " : "", flag);
    const std::string range = DescribeRange(row);
    page += fmt::format(" | {} | {} | {} |\n", DefaultCell(row), range.empty() ? "any" : Cell(range), Cell(row.help));
  }
}

}  // namespace

std::string FromVllmPage() {
  std::string page =
      "# From `vllm serve` to `spillway serve`\n"
      "\n"
      "Written by `spillway from-vllm` from the program's option table; a test fails where this page is older than "
      "the\n"
      "table. Every option can also be set as a `SPILLWAY_<NAME>` variable (`SPILLWAY_MAX_NUM_SEQS=64`) or in the "
      "YAML\n"
      "file of `--config` (`max-num-seqs: 64`); a flag goes before a variable, a variable before the file. Sizes take\n"
      "suffixes and fractions: `k m g t` are powers of 1000, `K M G T` and `KiB MiB GiB TiB` of 1024.\n"
      "\n"
      "## Taken\n"
      "\n"
      "| vLLM | Spillway | default | range | meaning |\n"
      "|---|---|---|---|---|\n";
  AppendRows(page, /*from_vllm=*/true);
  page +=
      "\n## Spillway's own\n"
      "\n"
      "| Spillway | default | range | meaning |\n"
      "|---|---|---|---|\n";
  AppendRows(page, /*from_vllm=*/false);
  absl::StrAppend(
      &page,
      "\n## Refused\n"
      "\n"
      "Passing one of these stops the start with the same reason. A flag that is in no table is refused with "
      "the nearest\nname that exists.\n"
      "\n"
      "| vLLM | why |\n"
      "|---|---|\n");
  std::vector<RefusedFlag> refused(RefusedFlags().begin(), RefusedFlags().end());
  std::ranges::sort(refused, {}, &RefusedFlag::name);
  for (const RefusedFlag& flag : refused) {
    page += fmt::format("| `--{}` | {} |\n", flag.name, Cell(flag.reason));
  }
  return page;
}

}  // namespace spillway

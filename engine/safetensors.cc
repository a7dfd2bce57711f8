#include "engine/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/json_file.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kMaxIndexBytes = 100'000'000;
constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kMaxRank = 32;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

struct StoredType {
  std::string_view name;
  std::size_t size_bytes;
};
// Every whole-byte type of the format: a file may hold tensors that nobody asks for. A type that is not in this list is
// kept without a check of its size.
constexpr std::array kStoredTypes = {
    StoredType{"F64", 8},     StoredType{"F32", 4},     StoredType{"F16", 2},     StoredType{"BF16", 2},
    StoredType{"I64", 8},     StoredType{"I32", 4},     StoredType{"I16", 2},     StoredType{"I8", 1},
    StoredType{"U64", 8},     StoredType{"U32", 4},     StoredType{"U16", 2},     StoredType{"U8", 1},
    StoredType{"BOOL", 1},    StoredType{"F8_E4M3", 1}, StoredType{"F8_E5M2", 1}, StoredType{"C64", 8},
    StoredType{"F8_E8M0", 1},
};

class MappedFile {
 public:
  static absl::StatusOr<std::unique_ptr<MappedFile>> Map(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
    absl::StatusOr<std::unique_ptr<MappedFile>> mapped = MapOpened(file, path);
    ::close(file);
    return mapped;
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { ::munmap(data_, size_bytes_); }

  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  std::size_t size_bytes() const { return size_bytes_; }

 private:
  MappedFile(void* data, std::size_t size_bytes) : data_(data), size_bytes_(size_bytes) {}

  static absl::StatusOr<std::unique_ptr<MappedFile>> MapOpened(int file, const std::string& path) {
    struct stat facts = {};
    if (::fstat(file, &facts) != 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot stat ", path));
    if (!S_ISREG(facts.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
    const auto size_bytes = static_cast<std::size_t>(facts.st_size);
    if (size_bytes < kLengthBytes) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": truncated: ", size_bytes, " bytes, wanted at least 8"));
    }
    void* data = ::mmap(nullptr, size_bytes, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) return absl::ErrnoToStatus(errno, absl::StrCat("cannot map ", path));
    return std::unique_ptr<MappedFile>(new MappedFile(data, size_bytes));
  }

  void* data_;
  std::size_t size_bytes_;
};

struct Entry {
  std::string stored_type;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  std::size_t size_bytes = 0;
};
using Entries = std::map<std::string, Entry, std::less<>>;

std::optional<std::size_t> StoredSize(std::string_view name) {
  const auto* found =
      std::find_if(kStoredTypes.begin(), kStoredTypes.end(), [&](const StoredType& type) { return type.name == name; });
  if (found == kStoredTypes.end()) return std::nullopt;
  return found->size_bytes;
}

// One tensor's line of the header. Offsets are relative to the data section [data, data + data_bytes).
absl::StatusOr<Entry> ReadEntry(const json& line, const std::byte* data, std::size_t data_bytes,
                                const std::string& where) {
  const auto wrong = [&](const auto&... text) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", text...));
  };
  Entry entry;
  ASSIGN_OR_RETURN(std::optional<std::string> type, ReadString(line, "dtype", where));
  if (!type) return wrong("dtype is missing");
  entry.stored_type = *std::move(type);

  const json* shape = FindMember(line, "shape");
  if (shape == nullptr || !shape->is_array()) return wrong("shape is missing or not an array");
  if (shape->size() > kMaxRank) return wrong("shape has ", shape->size(), " dimensions, the limit is ", kMaxRank);
  std::uint64_t count = 1;
  bool overflows = false;
  for (const json& dimension : *shape) {
    if (!dimension.is_number_unsigned() || dimension.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX)) {
      return wrong("dimension ", Shown(dimension), " of shape is not an integer from 0 to 2^63 - 1");
    }
    overflows |= __builtin_mul_overflow(count, dimension.get<std::uint64_t>(), &count);
    entry.shape.push_back(dimension.get<std::int64_t>());
  }

  const json* offsets = FindMember(line, "data_offsets");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_unsigned() ||
      !(*offsets)[1].is_number_unsigned()) {
    return wrong("data_offsets is not a pair of integers from 0");
  }
  const auto begin = (*offsets)[0].get<std::uint64_t>();
  const auto end = (*offsets)[1].get<std::uint64_t>();
  if (begin > end || end > data_bytes) {
    return wrong("data_offsets [", begin, ", ", end, ") leave the data section of ", data_bytes, " bytes");
  }
  entry.data = data + begin;
  entry.size_bytes = end - begin;

  if (const std::optional<std::size_t> element_bytes = StoredSize(entry.stored_type)) {
    std::uint64_t wanted = 0;
    overflows |= __builtin_mul_overflow(count, *element_bytes, &wanted);
    if (overflows) return wrong("the size of its shape exceeds 64 bits");
    if (wanted != entry.size_bytes) {
      return wrong("data_offsets hold ", entry.size_bytes, " bytes, its shape and dtype ", Excerpt(entry.stored_type),
                   " need ", wanted);
    }
  }
  return entry;
}

// The tensors must tile the data section: no two share a byte and no byte is nobody's.
absl::Status CheckTiling(const Entries& entries, const std::byte* data, std::size_t data_bytes,
                         const std::string& path) {
  std::vector<std::tuple<std::size_t, std::size_t, std::string_view>> ranges;
  ranges.reserve(entries.size());
  for (const auto& [name, entry] : entries) {
    const auto begin = static_cast<std::size_t>(entry.data - data);
    ranges.emplace_back(begin, begin + entry.size_bytes, name);
  }
  std::sort(ranges.begin(), ranges.end());
  std::size_t covered = 0;
  for (const auto& [begin, end, name] : ranges) {
    if (begin != covered) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor '", Excerpt(name), "' begins at byte ", begin, " of the data, ",
                       begin < covered ? "overlapping" : "leaving a hole after", " the tensor that ends at ", covered));
    }
    covered = end;
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": the tensors end at byte ", covered, " of ", data_bytes, " bytes of data"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Entries> ReadHeader(const MappedFile& file, const std::string& path) {
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= std::to_integer<std::uint64_t>(file.data()[i]) << (8 * i);
  }
  if (header_bytes > kMaxHeaderBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": a header of ", header_bytes, " bytes, the limit is ", kMaxHeaderBytes));
  }
  if (header_bytes > file.size_bytes() - kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": truncated: a header of ", header_bytes, " bytes in a file of ", file.size_bytes()));
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, header_bytes);
  if (!text.starts_with("{")) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": the header does not begin with '{'"));
  }
  ASSIGN_OR_RETURN(const json header, ParseJson(text, path, DuplicateKeys::kRefuse));
  const std::byte* data = file.data() + kLengthBytes + header_bytes;
  const std::size_t data_bytes = file.size_bytes() - kLengthBytes - header_bytes;
  Entries entries;
  for (const auto& [name, line] : header.items()) {
    if (name == "__metadata__") continue;
    ASSIGN_OR_RETURN(Entry entry,
                     ReadEntry(line, data, data_bytes, absl::StrCat(path, ": tensor '", Excerpt(name), "'")));
    entries.emplace(name, std::move(entry));
  }
  RETURN_IF_ERROR(CheckTiling(entries, data, data_bytes, path));
  return entries;
}

class MappedCheckpoint final : public Checkpoint {
 public:
  MappedCheckpoint(std::vector<std::unique_ptr<MappedFile>> files, Entries entries)
      : files_(std::move(files)), entries_(std::move(entries)) {}

  absl::StatusOr<TensorView> Find(std::string_view name) const override {
    const auto found = entries_.find(name);
    if (found == entries_.end()) {
      return absl::NotFoundError(absl::StrCat("the checkpoint has no tensor '", Excerpt(name), "'"));
    }
    const Entry& entry = found->second;
    for (const auto& [stored, dtype] :
         {std::pair<std::string_view, DType>{"F32", DType::kF32}, {"F16", DType::kF16}, {"BF16", DType::kBF16}}) {
      if (entry.stored_type == stored) return TensorView{dtype, entry.shape, entry.data, entry.size_bytes};
    }
    return absl::InvalidArgumentError(absl::StrCat("tensor '", Excerpt(name), "' is stored as ",
                                                   Excerpt(entry.stored_type), ", wanted F32, F16 or BF16"));
  }

  std::vector<std::string> Names() const override {
    std::vector<std::string> names;
    names.reserve(entries_.size());
    for (const auto& [name, entry] : entries_) names.push_back(name);
    return names;
  }

  std::size_t total_bytes() const override {
    std::size_t total = 0;
    for (const auto& [name, entry] : entries_) total += entry.size_bytes;
    return total;
  }

  void Release(const TensorView& tensor) const override {
    // Only pages that are wholly this tensor's: its neighbours may still be in use.
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
    const std::uintptr_t begin = (address + page - 1) / page * page;
    const std::uintptr_t end = (address + tensor.size_bytes) / page * page;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

 private:
  std::vector<std::unique_ptr<MappedFile>> files_;
  Entries entries_;
};

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenShards(const std::string& folder) {
  const std::string index_path = absl::StrCat(folder, "/", kIndexFile);
  ASSIGN_OR_RETURN(const json index, ReadJsonFile(index_path, kMaxIndexBytes, DuplicateKeys::kRefuse));
  const json* weight_map = FindMember(index, "weight_map");
  if (weight_map == nullptr || !weight_map->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, ": weight_map is missing or not an object"));
  }
  std::vector<std::unique_ptr<MappedFile>> files;
  std::map<std::string, Entries> shards;
  Entries entries;
  for (const auto& [name, shard] : weight_map->items()) {
    if (!shard.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": the file of '", Excerpt(name), "' is not a string"));
    }
    const auto file_name = shard.get<std::string>();
    // A plain name: the index must not reach files outside its folder.
    if (file_name.empty() || file_name[0] == '.' || file_name.find('/') != std::string::npos ||
        file_name.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": '", Excerpt(file_name), "' is not the name of a file of this folder"));
    }
    auto opened = shards.find(file_name);
    if (opened == shards.end()) {
      const std::string path = absl::StrCat(folder, "/", file_name);
      absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Map(path);
      if (absl::IsNotFound(file.status())) {
        return absl::InvalidArgumentError(absl::StrCat(index_path, " names a shard that is missing: ", path));
      }
      RETURN_IF_ERROR(file.status());
      ASSIGN_OR_RETURN(Entries read, ReadHeader(**file, path));
      files.push_back(*std::move(file));
      opened = shards.emplace(file_name, std::move(read)).first;
    }
    const auto found = opened->second.find(name);
    if (found == opened->second.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, " places tensor '", Excerpt(name), "' in ", file_name, ", which does not have it"));
    }
    entries.emplace(name, std::move(found->second));
    opened->second.erase(found);
  }
  return std::make_unique<MappedCheckpoint>(std::move(files), std::move(entries));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::OpenFile(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Map(path));
  ASSIGN_OR_RETURN(Entries entries, ReadHeader(*file, path));
  std::vector<std::unique_ptr<MappedFile>> files;
  files.push_back(std::move(file));
  return std::make_unique<MappedCheckpoint>(std::move(files), std::move(entries));
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& folder) {
  absl::StatusOr<std::unique_ptr<Checkpoint>> single = OpenFile(absl::StrCat(folder, "/", kSingleFile));
  if (!absl::IsNotFound(single.status())) return single;
  absl::StatusOr<std::unique_ptr<Checkpoint>> sharded = OpenShards(folder);
  if (!absl::IsNotFound(sharded.status())) return sharded;
  return absl::NotFoundError(absl::StrCat("no weights in ", folder, ": looked for ", kSingleFile, " and ", kIndexFile));
}

}  // namespace spillway
